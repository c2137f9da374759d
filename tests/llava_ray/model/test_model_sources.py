"""What can be wrong with the folders and names that a model is made from."""

import json
import shutil
from pathlib import Path

import fakes
import pytest
import torch
import transformers

from llava_ray.errors import ModelError
from llava_ray.model.assembly import assemble
from llava_ray.model.formats.sources import load_padding_tokenizer
from llava_ray.model.network.packing import PROVEN, check_packing


@pytest.mark.parametrize("key", ["model_name_or_path", "vision_tower"])
@pytest.mark.parametrize("name", ["nobody/nothing-7b", "/not/here", "a name with spaces"])
def test_no_such_model_names_path_and_remedy(key: str, name: str, folders) -> None:
    part = {"model_name_or_path": "language model", "vision_tower": "vision tower"}[key]
    with pytest.raises(ModelError, match=rf"no such {part}: '{name}' is neither a folder .* without network"):
        assemble(folders.config(**{key: name}), "pad")


def test_plain_language_model_needs_a_tower(folders) -> None:
    with pytest.raises(ModelError, match=r"vision_tower is not set; name a CLIP, SigLIP or DINOv2 tower"):
        assemble(folders.config(vision_tower=None), "pad")


def test_folder_without_a_model(folders, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=str(tmp_path)):
        assemble(folders.config(model_name_or_path=str(tmp_path)), "pad")


@pytest.fixture
def damaged(folders, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders.language_model(), tmp_path / "damaged"))


def test_cut_weights(damaged: Path, folders) -> None:
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"damaged/model\.safetensors is not a whole safetensors file"):
        assemble(folders.config(model_name_or_path=str(damaged)), "pad")


def test_no_weights(damaged: Path, folders) -> None:
    (damaged / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"damaged \(plain language model\) is incomplete: it holds no weights"):
        assemble(folders.config(model_name_or_path=str(damaged)), "pad")


def test_lost_tensors_are_not_made_up(damaged: Path, folders) -> None:
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"lacks 9 tensors, the first is model\.layers\.2"):
        assemble(folders.config(model_name_or_path=str(damaged)), "pad")


def test_tower_whose_processor_makes_another_size(folders, tmp_path: Path) -> None:
    tower = fakes.make_vision_tower(tmp_path / "tower", "siglip")
    settings = json.loads((tower / "preprocessor_config.json").read_text())
    settings["crop_size"] = {"height": 24, "width": 24}
    (tower / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"makes 24 x 24 pixels, but the tower takes 32 x 32"):
        assemble(folders.config(vision_tower=str(tower)), "pad")


def test_tower_without_image_processor(folders, tmp_path: Path) -> None:
    tower = fakes.make_vision_tower(tmp_path / "tower")
    (tower / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"image processor in .*tower cannot be loaded"):
        assemble(folders.config(vision_tower=str(tower)), "pad")


def test_end_token_pads_where_there_is_no_unknown_token(tmp_path: Path) -> None:
    fakes.make_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["unk_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_padding_tokenizer(tmp_path)
    assert (tokenizer.pad_token, len(tokenizer)) == ("</s>", 300)


def test_every_proven_kind_is_tested() -> None:
    tested = {getattr(transformers, config)().model_type for config, _, _ in fakes.LANGUAGE_MODELS.values()}
    assert tested == PROVEN


SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 1}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        # Makes its mask without looking at position_ids.
        (
            transformers.OPTConfig(
                **SMALL, ffn_dim=32, num_attention_heads=2, word_embed_proj_dim=32, max_position_embeddings=64
            ),
            "let packed samples see each other",
        ),
        # Positions are biases of the attention.
        (transformers.MptConfig(vocab_size=50, d_model=32, n_layers=2, n_heads=2), "take no position_ids"),
        # A state runs through the row.
        (transformers.MambaConfig(**SMALL, state_size=4), "take no position_ids"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_language_models_that_mix_samples_are_refused(config: transformers.PreTrainedConfig, says: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=f"'{config.model_type}' {says}.*llama"):
        check_packing(model.eval())


@pytest.mark.parametrize(
    "config",
    [
        transformers.GPTNeoXConfig(**SMALL, intermediate_size=32, num_attention_heads=2),
        transformers.Olmo2Config(**SMALL, intermediate_size=32, num_attention_heads=2, pad_token_id=0),
        transformers.GraniteConfig(**SMALL, intermediate_size=32, num_attention_heads=2),
    ],
    ids=lambda config: config.model_type,
)
def test_other_language_models_are_tried(config: transformers.PreTrainedConfig) -> None:
    assert config.model_type not in PROVEN
    check_packing(transformers.AutoModelForCausalLM.from_config(config).eval())

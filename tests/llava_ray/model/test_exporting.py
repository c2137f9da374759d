"""Round trips through every layout: the same bits, the same settings."""

from pathlib import Path

import fakes
import pytest
import torch
from losses import token_losses
from originals import copy_golden
from published import assert_same_weights, make_original, read

from llava_ray.chat.conversation import read_turns
from llava_ray.chat.tokens import tokenize_conversation
from llava_ray.errors import BundleError, ModelError
from llava_ray.model.formats.bundle.write import export_bundle
from llava_ray.model.formats.hub.write import export_hub
from llava_ray.model.formats.manifest import read_manifest
from llava_ray.model.formats.model_opening import open_model
from llava_ray.model.formats.original.write import export_original, export_projector
from llava_ray.model.formats.projector_files import load_projector_weights
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.tensors.weight_files import wrap_tensor, write_weight_file

pytestmark = pytest.mark.slow

# Of two versions of transformers: the same setting under two names, and the same numbers in two ways.
RENAMED = {"dtype": "torch_dtype"}
REPLACED = {"transformers_version", "rope_parameters"}


def assert_kept(found: dict, expected: dict) -> None:
    """Every setting is there with its value; others may have been added."""
    found, expected = ({RENAMED.get(key, key): value for key, value in config.items()} for config in (found, expected))
    assert {key: found.get(key) for key in expected.keys() - REPLACED} == {
        key: value for key, value in expected.items() if key not in REPLACED
    }
    rope = expected.get("rope_parameters") or found
    assert found.get("rope_theta") == rope.get("rope_theta")


@pytest.mark.parametrize("name", ["v15_mlp_pad", "v16_anyres"])
def test_original_to_bundle_to_hub_to_bundle_to_original(name: str, tmp_path: Path) -> None:
    source = copy_golden(name, tmp_path / "source")
    first = open_model(source, version="vicuna_v1", vision_tower=str(source / "tower"))
    export_bundle(first, tmp_path / "bundle")
    export_hub(open_model(tmp_path / "bundle"), tmp_path / "hub")
    export_bundle(open_model(tmp_path / "hub"), tmp_path / "bundle2")
    export_original(open_model(tmp_path / "bundle2"), tmp_path / "original")
    for folder in ("bundle", "hub", "bundle2", "original"):
        reopened = open_model(tmp_path / folder)
        if folder != "hub":  # its table is longer
            assert_same_weights(reopened, first)
        assert_kept(reopened.tower_config, first.tower_config)
        assert reopened.preprocessor == first.preprocessor
    assert_kept(read(tmp_path / "original/config.json"), read(source / "config.json"))
    before, after = read_manifest(tmp_path / "bundle"), read_manifest(tmp_path / "bundle2")
    assert after.model_copy(update={"language_model": before.language_model}) == before
    assert read(tmp_path / "bundle/language_model/config.json") == read(tmp_path / "bundle2/language_model/config.json")


def test_the_longer_table_of_the_hub_begins_with_the_language_models_own_rows(tmp_path: Path) -> None:
    source = copy_golden("v15_mlp_pad", tmp_path / "source")
    first = open_model(source, version="v1", vision_tower=str(source / "tower"))
    export_hub(first, tmp_path / "hub")
    hub = open_model(tmp_path / "hub")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        long, own = hub.tensors[name].load(), first.tensors[name].load()
        assert (long.shape[0], own.shape[0], hub.num_rows) == (32064, 32000, 32000)
        assert torch.equal(long[:32000], own)
        assert torch.equal(long[32000:], own.mean(0, dtype=torch.float32).to(own.dtype).expand(64, -1))
    assert hub.tensors.keys() == first.tensors.keys()


@pytest.mark.parametrize("projector_type", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu", "identity"])
def test_original_to_bundle_to_original_of_every_projector(projector_type: str, folders, tmp_path: Path) -> None:
    tower = folders.tower()
    if projector_type == "identity":
        tower = fakes.make_vision_tower(tmp_path / "narrow", hidden_size=fakes.WIDTH)
    source = make_original(tmp_path / "source", folders.language_model(), tower, projector_type)
    first = open_model(source, version="v1", vision_tower=str(tower))
    export_bundle(first, tmp_path / "bundle")
    export_original(open_model(tmp_path / "bundle"), tmp_path / "original")
    assert_same_weights(open_model(tmp_path / "bundle"), first)
    assert_same_weights(open_model(tmp_path / "original"), first)
    assert_kept(read(tmp_path / "original/config.json"), read(source / "config.json"))


def test_what_the_bundle_computes_is_what_the_original_did(tmp_path: Path, folders, samples, pack) -> None:
    """A bundle written file by file is one that can be loaded, with the same result as one put together."""
    source = make_original(tmp_path / "source", folders.language_model(), folders.tower())
    export_projector(open_model(source, version="v1", vision_tower=str(folders.tower())), tmp_path / "projector")
    export_bundle(open_model(source, version="v1", vision_tower=str(folders.tower())), tmp_path / "bundle")
    loaded = load_pretrained_model(tmp_path / "bundle")
    built = folders.assemble(pretrain_mm_mlp_adapter=str(tmp_path / "projector/mm_projector.bin"))
    with torch.no_grad():
        expected = token_losses(built.llava, *pack(built, samples(built.image_tokens.num_features)).inputs)
        found = token_losses(loaded.llava, *pack(loaded, samples(loaded.image_tokens.num_features)).inputs)
    assert torch.equal(found, expected)


def test_a_projector_alone_has_llavas_names_and_settings(folders, tmp_path: Path) -> None:
    source = make_original(tmp_path / "source", folders.language_model(), folders.tower(), "mlp3x_gelu")
    export_projector(open_model(source, version="v1", vision_tower=str(folders.tower())), tmp_path / "projector")
    tensors = torch.load(tmp_path / "projector/mm_projector.bin", weights_only=True)
    assert set(tensors) == {f"model.mm_projector.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert set(load_projector_weights(tmp_path / "projector")) == {
        f"{i}.{k}" for i in (0, 2, 4) for k in ("weight", "bias")
    }
    assert read(tmp_path / "projector/config.json")["mm_projector_type"] == "mlp3x_gelu"


def test_a_bundle_from_the_original_splits_text_the_same_way(tmp_path: Path) -> None:
    source = copy_golden("v15_mlp_pad", tmp_path / "source")
    first = open_model(source, version="v1", vision_tower=str(source / "tower"))
    export_hub(first, tmp_path / "hub")
    export_bundle(open_model(tmp_path / "hub"), tmp_path / "bundle")
    export_bundle(first, tmp_path / "direct")
    there, direct = load_pretrained_model(tmp_path / "bundle"), load_pretrained_model(tmp_path / "direct")
    turns = read_turns([{"from": "human", "value": "<image>\nTwo  spaces"}, {"from": "gpt", "value": " 一 \n\n  x"}])
    expected = tokenize_conversation(turns, direct.template, direct.tokenizer)
    assert tokenize_conversation(turns, there.template, there.tokenizer) == expected
    assert "<image>" not in there.tokenizer.get_vocab()
    assert there.tokenizer.pad_token == "<unk>"
    assert there.tokenizer.chat_template is None
    assert (tmp_path / "bundle/tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()


def test_a_bundle_that_names_its_parts_becomes_one_that_holds_them(folders, tmp_path: Path) -> None:
    from llava_ray.model.saving import save_bundle

    save_bundle(tmp_path / "named", folders.assemble(), include="projector")
    export_bundle(open_model(tmp_path / "named"), tmp_path / "whole")
    manifest = read_manifest(tmp_path / "whole")
    assert manifest.language_model.inside
    assert manifest.vision_tower.inside
    assert manifest.language_model.base == str(folders.language_model())
    assert_same_weights(open_model(tmp_path / "whole"), open_model(tmp_path / "named"))


def test_a_wrong_base_is_refused(folders, tmp_path: Path) -> None:
    from llava_ray.model.saving import save_bundle

    save_bundle(tmp_path / "named", folders.assemble(), include="projector")
    other = fakes.make_language_model(tmp_path / "other", seed=9)
    with pytest.raises(BundleError, match=rf"the language model in {other} is not the one"):
        open_model(tmp_path / "named", model_base=str(other))


@pytest.mark.parametrize(
    ("language_model", "tower", "message"),
    [
        ("qwen2", "clip", "language model: the original layout has llama and mistral only, this one is 'qwen2'"),
        (
            "llama",
            "siglip",
            "vision tower: the original code loads CLIP towers only, this one is 'siglip_vision_model'",
        ),
    ],
)
def test_the_original_layout_refuses_what_its_code_cannot_load(
    language_model, tower, message, folders, tmp_path
) -> None:
    from llava_ray.model.saving import save_bundle

    save_bundle(tmp_path / "bundle", folders.assemble(language_model, tower))
    with pytest.raises(ModelError, match=message):
        export_original(open_model(tmp_path / "bundle"), tmp_path / "original")
    assert not (tmp_path / "original").exists()


def test_nothing_is_overwritten_and_nothing_half_written(folders, tmp_path: Path) -> None:
    source = make_original(tmp_path / "source", folders.language_model(), folders.tower())
    model = open_model(source, version="v1", vision_tower=str(folders.tower()))
    export_bundle(model, tmp_path / "bundle")
    before = (tmp_path / "bundle/llava.json").read_bytes()
    with pytest.raises(ModelError, match="exists already; an export overwrites nothing"):
        export_original(model, tmp_path / "bundle")
    assert (tmp_path / "bundle/llava.json").read_bytes() == before
    (source / "model.safetensors").write_bytes(b"gone")
    with pytest.raises(ModelError, match=r"model.safetensors"):
        export_original(model, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "source"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_hidden_size": 64}, "the projector in .* goes from width 48 to 32, but .* have 64 and 32"),
        ({"mm_hidden_size": None}, "config.json"),
        ({"mm_patch_merge_type": "other"}, "mm_patch_merge_type"),
    ],
)
def test_a_config_that_is_not_the_weights_is_refused(change, message, folders, tmp_path: Path) -> None:
    import json

    source = make_original(tmp_path / "source", folders.language_model(), folders.tower())
    (source / "config.json").write_text(json.dumps(read(source / "config.json") | change))
    with pytest.raises(ModelError, match=message):
        open_model(source, version="v1", vision_tower=str(folders.tower()))


def test_a_layout_that_does_not_name_its_template_asks_for_it(folders, tmp_path: Path) -> None:
    source = make_original(tmp_path / "source", folders.language_model(), folders.tower())
    with pytest.raises(ModelError, match="does not say which conversation template it was trained with"):
        open_model(source, vision_tower=str(folders.tower()))


def test_other_folders_are_refused_by_name(folders, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"{tmp_path} is not a known kind of model folder"):
        open_model(tmp_path)
    with pytest.raises(ModelError, match=r"is a plain language model, without projector and tower"):
        open_model(folders.language_model())


def test_a_model_without_its_projector_is_refused(folders, tmp_path: Path) -> None:
    source = make_original(tmp_path / "source", folders.language_model(), folders.tower())
    write_weight_file(source / "model.safetensors", {"model.norm.weight": wrap_tensor(torch.ones(fakes.WIDTH))})
    with pytest.raises(ModelError, match="no tensor of the projector is in its weight files"):
        open_model(source, version="v1", vision_tower=str(folders.tower()))

"""What a folder is, read from its JSON and headers; and what is refused before anything is loaded."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fakes
import originals
import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_ray.errors import BundleError, ModelError
from llava_ray.model.assembly import LlavaParts, assemble
from llava_ray.model.formats.hub.settings import read_hub_settings
from llava_ray.model.formats.layout import LayoutKind
from llava_ray.model.formats.layouts import TOWER_TYPES, read_layout
from llava_ray.model.formats.original.settings import original_language_config, read_original_settings
from llava_ray.model.formats.stated_settings import find_version
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.network.tower_families import FAMILIES, WITH_TEXT_PART
from llava_ray.model.saving import save_bundle

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def parts(folders) -> LlavaParts:
    return folders.assemble()


@pytest.fixture
def load(folders):
    """Load a folder with all that it may need but a base."""
    return lambda folder, base=None: load_pretrained_model(folder, base, vision_tower=folders.tower(), version="v1")


def test_every_tower_that_can_be_loaded_is_recognised_without_torch() -> None:
    assert set(TOWER_TYPES) == {*FAMILIES, *WITH_TEXT_PART}


def change(file: Path, **values: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    old = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in (old | values).items() if value is not None}))


def cut(file: Path, num_bytes: int) -> None:
    file.write_bytes(file.read_bytes()[:-num_bytes])


# Published configs, as far as they matter here.
V15 = {"model_type": "llava", "mm_vision_tower": "t", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}


@pytest.mark.parametrize(
    ("config", "language_model", "version"),
    [
        (V15 | {"vocab_size": 32000}, "llama", "v1"),
        (V15 | {"model_type": "llava_llama", "vocab_size": 32000}, "llama", "v1"),
        (V15 | {"vocab_size": 64000}, "llama", "chatml_direct"),  # 1.6-34B
        (V15 | {"model_type": "llava_mistral", "vocab_size": 32000}, "mistral", "mistral_instruct"),
        (V15 | {"vocab_size": 32000, "mm_projector_type": None}, "llama", None),  # the first generation
        (V15 | {"model_type": "llava_qwen", "vocab_size": 151936}, "qwen2", None),
        (V15 | {"model_type": "llava_qwen3", "vocab_size": 151936}, "qwen3", None),
        (V15 | {"vocab_size": 32000, "llava_ray": {"version": "llava_v1"}}, "llama", "llava_v1"),
    ],
)
def test_language_model_and_template_of_an_original(
    config: dict[str, Any], language_model: str, version: str | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    layout = read_layout(tmp_path)
    assert layout.language_config == original_language_config(layout.config)
    assert (layout.kind, layout.language_config["model_type"]) == (LayoutKind.ORIGINAL, language_model)
    assert layout.settings["version"] == version
    if version is None:
        with pytest.raises(ModelError, match=r"does not say which conversation template.* v1 for Vicuna.*vicuna_v1"):
            find_version(layout, None)
    assert find_version(layout, "mpt") == "mpt"


TEXT = {"model_type": "llama", "vocab_size": 32064}


@pytest.mark.parametrize(
    ("config", "version"),
    [
        ({"model_type": "llava", "image_token_index": 32000, "text_config": TEXT}, "v1"),
        ({"model_type": "llava_next", "image_token_index": 32000, "text_config": TEXT}, "v1"),
        ({"model_type": "llava_next", "image_token_index": 64000, "text_config": TEXT}, "chatml_direct"),
        (
            {"model_type": "llava_next", "image_token_index": 32000, "text_config": {"model_type": "mistral"}},
            "mistral_instruct",
        ),
        ({"model_type": "llava", "image_token_index": 32000, "text_config": {"model_type": "mistral"}}, None),
        ({"model_type": "llava_next", "image_token_index": 128256, "text_config": TEXT}, None),
    ],
)
def test_template_of_a_hub_folder(config: dict[str, Any], version: str | None, tmp_path: Path) -> None:
    config |= {"vision_config": {"model_type": "clip_vision_model"}, "image_grid_pinpoints": [[336, 672]]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    layout = read_layout(tmp_path)
    assert (layout.kind, layout.settings["version"]) == (LayoutKind.HUB, version)


def test_settings_of_v16(tmp_path: Path) -> None:
    folder = originals.copy_golden("v16_anyres", tmp_path / "v16")
    layout = read_layout(folder)
    assert layout.missing == ()
    assert layout.settings == {
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168)),
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "model_max_length": 2048,
        "version": "v1",
    }
    assert layout.companions["image_newline"].shape == (32,)
    assert len(layout.part("language_model")) == 30


@pytest.mark.parametrize("rename", [originals.old_hub_name, originals.new_hub_name])
def test_settings_of_llava_next(rename, parts, tmp_path: Path) -> None:
    """Canvases are (height, width) there, and image_newline stands where the version put it."""
    folder = originals.write_hub(tmp_path / "hub", parts, rename=rename)
    file = folder / "model.safetensors"
    prefix = "model." if rename is originals.new_hub_name else ""
    save_file(load_file(file) | {f"{prefix}image_newline": torch.ones(32)}, file)
    change(folder / "config.json", model_type="llava_next", image_grid_pinpoints=[[32, 64], [96, 32]])
    layout = read_layout(folder)
    assert layout.missing == ()
    assert layout.settings["image_grid_pinpoints"] == ((64, 32), (32, 96))
    assert layout.settings["image_aspect_ratio"] == "anyres"
    assert layout.settings["mm_patch_merge_type"] == "spatial_unpad"
    assert layout.companions["image_newline"].numel == 32


@pytest.mark.parametrize(
    ("tower", "strategy", "feature"),
    [
        ("clip_vision_model", "default", "patch"),
        ("clip_vision_model", "full", "cls_patch"),
        ("siglip_vision_model", "full", "patch"),
        ("siglip_vision_model", "default", None),
        ("dinov2_with_registers", "full", "cls_patch"),
        ("dinov2_with_registers", "default", None),
        ("clip_vision_model", "middle", None),
    ],
)
def test_feature_of_a_hub_folder(tower: str, strategy: str, feature: str | None) -> None:
    """ "default" drops one token, whether it is a class token or a patch."""
    config = {
        "model_type": "llava",
        "vision_config": {"model_type": tower},
        "vision_feature_select_strategy": strategy,
    }
    if feature is None:
        with pytest.raises(ModelError, match=f"here: vision_feature_select_strategy '{strategy}'.*'{tower}'"):
            read_hub_settings(config, "here")
    else:
        assert read_hub_settings(config, "here")["mm_vision_select_feature"] == feature


@pytest.mark.parametrize("key", ["projector_hidden_act", "multimodal_projector_bias"])
def test_another_projector_in_a_hub_folder_is_refused(key: str, parts, tmp_path: Path) -> None:
    folder = originals.write_hub(tmp_path / "hub", parts)
    change(folder / "config.json", **{key: "relu" if key.endswith("act") else False})
    with pytest.raises(ModelError, match=rf"config\.json: {key} is"):
        read_layout(folder)


def test_what_an_export_of_ours_noted_counts(parts, tmp_path: Path) -> None:
    folder = originals.write_hub(tmp_path / "hub", parts)
    noted = {"version": "llava_v1", "image_aspect_ratio": "pad", "mm_vision_select_layer": -2, "model_max_length": 77}
    change(folder / "config.json", llava_ray={"manifest": noted})
    assert read_layout(folder).settings == noted


@pytest.mark.parametrize("written", ["[(336, 672), (672, 336)]", [[336, 672], [672, 336]]])
def test_lists_may_be_written_as_text(written: object) -> None:
    config = V15 | {"image_aspect_ratio": "anyres", "image_grid_pinpoints": written, "s2": True}
    settings = read_original_settings(config, "here")
    assert settings["image_grid_pinpoints"] == ((336, 672), (672, 336))
    assert settings["s2_scales"] == (336, 672, 1008)
    with pytest.raises(ModelError, match="here: '336 to 1008' is not a list of numbers"):
        read_original_settings(config | {"s2_scales": "336 to 1008"}, "here")


def test_names_decide_nothing(parts, tmp_path: Path) -> None:
    """The original chose class, template and adapter by what a folder is called."""
    for name in ("vicuna-lora-mpt-mistral", "llava-v1.6-34b", "x"):
        folder = originals.write_original(tmp_path / name, parts)
        assert read_layout(folder).kind is LayoutKind.ORIGINAL


# What is wrong with a folder, and what is said of it.


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(
        ModelError, match=rf"{tmp_path} is not a known kind of model .* neither llava\.json, config\.json nor "
    ):
        load_pretrained_model(tmp_path)


def test_a_vision_tower_is_no_model(folders) -> None:
    with pytest.raises(ModelError, match="is a vision tower, not a language model"):
        load_pretrained_model(folders.tower())


@pytest.mark.parametrize("model_type", ["llava_onevision", "vipllava_of_sorts", "frobnicator", None])
def test_unknown_architecture(model_type: str | None, parts, load, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    parts.llava.language_model.save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    change(folder / "config.json", model_type=model_type)
    with pytest.raises(ModelError, match=rf"config\.json.*{model_type}|{model_type}.*config\.json"):
        load(folder)


def test_unknown_architecture_in_the_original_layout(parts, load, tmp_path: Path) -> None:
    folder = originals.write_original(tmp_path / "model", parts)
    change(folder / "config.json", model_type="llava_frobnicator")
    with pytest.raises(ModelError, match=r"language model in .*model is of an unknown architecture.*'frobnicator'"):
        load(folder)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_missing_shard(ending: str, parts, load, tmp_path: Path) -> None:
    folder = originals.write_original(tmp_path / "model", parts, ending=ending, num_shards=3)
    [lost] = folder.glob(f"*-00002-of-00003.{ending}")
    lost.unlink()
    with pytest.raises(
        ModelError, match=rf"is incomplete: shard {lost.name} is not there, which .*index\.json says hol"
    ):
        load(folder)


def test_shard_that_holds_less_than_its_index_says(parts, load, tmp_path: Path) -> None:
    folder = originals.write_original(tmp_path / "model", parts, num_shards=2)
    file = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(ModelError, match=rf"is incomplete: {name} is not in {file.name}"):
        load(folder)


@pytest.mark.parametrize("index", ["{", '{"weight_map": {}}', "[]"])
def test_damaged_index(index: str, parts, load, tmp_path: Path) -> None:
    folder = originals.write_original(tmp_path / "model", parts, num_shards=2)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(
        ModelError, match=r"model\.safetensors\.index\.json (is not JSON|has no weight_map|holds a list)"
    ):
        load(folder)


@pytest.mark.parametrize("write", [originals.write_original, originals.write_hub])
def test_truncated_safetensors(write, parts, load, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", parts)
    cut(folder / "model.safetensors", 100)
    with pytest.raises(ModelError, match=r"model/model\.safetensors is cut off or damaged: its header describes"):
        load_pretrained_model(folder, version="v1")


def test_empty_file(parts, load, tmp_path: Path) -> None:
    folder = originals.write_original(tmp_path / "model", parts)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"model\.safetensors is not a whole safetensors file: it has 0 bytes"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "non_lora_trainables.bin", "adapter_model.bin", "mm_projector.bin"]
)
def test_truncated_pickle(name: str, parts, load, folders, tmp_path: Path) -> None:
    folder = folder_with(name, parts, tmp_path)
    cut(folder / name, 100)
    with pytest.raises(ModelError, match=rf"model/{name} is cut off, damaged or no PyTorch file"):
        load(folder, folders.language_model())


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "non_lora_trainables.bin", "adapter_model.bin", "mm_projector.bin"]
)
def test_pickle_with_code(name: str, parts, load, folders, tmp_path: Path) -> None:
    folder = folder_with(name, parts, tmp_path)
    exploded = tmp_path / "exploded"

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (shutil.copytree, (str(tmp_path / "model"), str(exploded)))

    torch.save(torch.load(folder / name) | {"model.bomb": Bomb()}, folder / name)
    with pytest.raises(ModelError, match=rf"model/{name} holds more than tensors: it refers to shutil\.copytree"):
        load(folder, folders.language_model())
    assert not exploded.exists()


def folder_with(name: str, parts: LlavaParts, tmp_path: Path) -> Path:
    """Write the kind of folder that has such a file."""
    if name == "pytorch_model.bin":
        return originals.write_original(tmp_path / "model", parts, ending="bin")
    if name == "mm_projector.bin":
        return originals.write_projector_only(tmp_path / "model", parts)
    return originals.write_lora(tmp_path / "model", parts, ending="bin")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("config.json", "config.json is not there"),
        ("non_lora_trainables.bin", "non_lora_trainables.bin, which holds the projector, is not there"),
        ("adapter_model.safetensors", "no adapter: none of adapter_model.safetensors, adapter_model.bin is there"),
    ],
)
def test_half_written_lora(name: str, says: str, parts, load, folders, tmp_path: Path) -> None:
    """As the original's periodic checkpoints are."""
    folder = originals.write_lora(tmp_path / "lora", parts)
    (folder / name).unlink()
    with pytest.raises(ModelError, match=rf"lora \(original LLaVA, LoRA over a base\) is incomplete: {says}"):
        load(folder, folders.language_model())


@pytest.mark.parametrize(
    "name", ["projector.safetensors", "language_model", "vision_tower/model.safetensors", "tokenizer.json"]
)
def test_half_written_bundle(name: str, parts, tmp_path: Path) -> None:
    save_bundle(tmp_path / "bundle", parts)
    lost = tmp_path / "bundle" / name
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    with pytest.raises(ModelError, match=rf"bundle \(llava_ray bundle\) is incomplete: .*{name.partition('/')[0]}"):
        load_pretrained_model(tmp_path / "bundle")


def test_half_written_checkpoint(parts, tmp_path: Path) -> None:
    save_bundle(tmp_path / "model", parts)
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(ModelError, match=r"COMPLETE is not in .*: the checkpoint was never finished"):
        load_pretrained_model(tmp_path)


def test_training_state_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(ModelError, match=r"is a training state without a model; the same .*finetune command"):
        load_pretrained_model(tmp_path)


def test_run_folder_says_where_its_model_is(parts, tmp_path: Path) -> None:
    save_bundle(tmp_path / "model", parts)
    with pytest.raises(ModelError, match=rf"is a run's folder; its model is {tmp_path}/model"):
        load_pretrained_model(tmp_path)


def test_projector_without_its_config(parts, load, tmp_path: Path) -> None:
    folder = originals.write_projector_only(tmp_path / "projector", parts)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"holds mm_projector\.bin but no config\.json.*pretrain_mm_mlp_adapter"):
        load(folder)


@pytest.mark.parametrize("write", [originals.write_lora, originals.write_projector_only])
def test_base_has_to_be_given(write, parts, load, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", parts)
    with pytest.raises(
        ModelError, match="holds no language model and does not name its base; give the one that it was"
    ):
        load(folder)


@pytest.mark.parametrize("write", [originals.write_lora, originals.write_projector_only])
def test_wrong_base(write, parts, load, folders, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", parts)
    with pytest.raises(
        ModelError, match=rf"qwen3 is not the base that {folder} was trained over: model_type is 'qwen3'"
    ):
        load(folder, folders.language_model("qwen3"))
    other = shutil.copytree(folders.language_model(), tmp_path / "other")
    change(other / "config.json", max_position_embeddings=4096)
    with pytest.raises(ModelError, match=r"max_position_embeddings is 4096 in its .* expected 2048"):
        load(folder, other)


def test_wrong_base_of_a_bundle(parts, folders, tmp_path: Path) -> None:
    save_bundle(tmp_path / "bundle", parts, include="projector")
    other = fakes.make_language_model(tmp_path / "other", seed=5)
    with pytest.raises(BundleError, match=r"language model in .*other is not the one that the bundle was made with"):
        load_pretrained_model(tmp_path / "bundle", other)


def test_base_that_is_not_wanted(parts, load, folders, tmp_path: Path) -> None:
    folder = originals.write_original(tmp_path / "model", parts)
    with pytest.raises(ModelError, match=r"includes its own language model .*configured; leave the setting out"):
        load(folder, folders.language_model())


def test_base_that_has_no_language_model(parts, load, tmp_path: Path) -> None:
    folder = originals.write_projector_only(tmp_path / "model", parts)
    base = originals.write_lora(tmp_path / "lora", parts)
    with pytest.raises(ModelError, match=r"lora \(original LLaVA, LoRA over a base\) holds no language model\."):
        load(folder, base)


def test_tower_has_to_be_given(parts, tmp_path: Path) -> None:
    folder = originals.write_original(tmp_path / "model", parts)
    with pytest.raises(ModelError, match="no such vision tower: 'openai/clip-vit-large-patch14-336'"):
        load_pretrained_model(folder, version="v1")
    change(folder / "config.json", mm_vision_tower="")
    with pytest.raises(ModelError, match=r"names no vision tower, and model\.vision_tower is not set"):
        load_pretrained_model(folder, version="v1")


@pytest.mark.parametrize(
    ("write", "file"),
    [
        (originals.write_original, "model.safetensors"),
        (originals.write_projector_only, "mm_projector.bin"),
        (originals.write_lora, "non_lora_trainables.bin"),
    ],
)
def test_projector_of_another_width(write, file: str, parts, load, folders, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", parts)
    base = None if write is originals.write_original else folders.language_model()
    wide = fakes.make_vision_tower(tmp_path / "wide", hidden_size=64)
    says = rf"{file} does not fit: it is mlp2x_gelu from tower width 48 .* expected mlp2x_gelu from tower width 64"
    with pytest.raises(ModelError, match=rf"{says}.*\(0\.weight: found \[32, 48\], expected \[32, 64\]\)"):
        load_pretrained_model(folder, base, vision_tower=wide, version="v1")


def test_projector_of_another_type(parts, load, tmp_path: Path) -> None:
    folder = originals.write_original(tmp_path / "model", parts)
    change(folder / "config.json", mm_projector_type="linear")
    with pytest.raises(ModelError, match=r"does not fit: it is mlp2x_gelu .* expected linear"):
        load(folder)
    change(folder / "config.json", mm_projector_type="resampler9")
    with pytest.raises(ModelError, match=r"config of .*model \(original LLaVA\) is not supported: .*mm_projector_type"):
        load(folder)


def test_resampler_is_refused(parts, load, tmp_path: Path) -> None:
    folder = originals.write_original(tmp_path / "model", parts)
    change(folder / "config.json", mm_resampler_type="perceiver")
    with pytest.raises(ModelError, match=r"config\.json: mm_resampler_type is 'perceiver'"):
        load(folder)


def test_weights_of_another_shape_than_the_config_says(parts, load, tmp_path: Path) -> None:
    folder = originals.write_original(tmp_path / "model", parts)
    change(folder / "config.json", intermediate_size=96)
    says = r"6 tensors have another shape .* first is model\.layers\.0\.mlp\.down_proj\.weight: found \[32, 64\] in mod"
    with pytest.raises(ModelError, match=says):
        load(folder)


def test_weights_that_the_config_does_not_know(parts, load, tmp_path: Path) -> None:
    folder = originals.write_original(tmp_path / "model", parts)
    change(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(
        ModelError, match=r"holds 9 tensors .* 'llama' does not have, the first is model\.layers\.1.* in mod"
    ):
        load(folder)


def test_adapter_of_another_language_model(parts, load, folders, tmp_path: Path) -> None:
    folder = originals.write_lora(tmp_path / "lora", parts)
    file = folder / "adapter_model.safetensors"
    save_file({name: torch.zeros(2 * t.shape[0], t.shape[1]) for name, t in load_file(file).items()}, file)
    with pytest.raises(ModelError, match=rf"tensors in {folder} do not fit the language model"):
        load(folder, folders.language_model())


def test_adapter_that_trained_more_than_matrices(parts, load, folders, tmp_path: Path) -> None:
    folder = originals.write_lora(tmp_path / "lora", parts)
    file = folder / "non_lora_trainables.bin"
    torch.save(torch.load(file) | {"base_model.model.model.norm.weight": torch.ones(32)}, file)
    with pytest.raises(
        ModelError, match=r"non_lora_trainables\.bin holds weights of the language model itself, .*norm"
    ):
        load(folder, folders.language_model())


def test_settings_that_contradict_the_folder(parts, folders, tmp_path: Path) -> None:
    folder = originals.write_original(tmp_path / "model", parts)
    config = folders.config(model_name_or_path=str(folder), mm_vision_select_layer=-1)
    with pytest.raises(
        ModelError, match=rf"mm_vision_select_layer is -1, but the projector in {folder} was trained with"
    ):
        assemble(config, "pad")


def test_layouts_are_read_without_torch(parts, tmp_path: Path) -> None:
    folder = originals.write_original(tmp_path / "model", parts, ending="bin", num_shards=2)
    code = (
        "import sys; from pathlib import Path;"
        "from llava_ray.model.formats.inspection import inspect, render_inspection;"
        f"print(render_inspection(inspect(Path({str(folder)!r}))));"
        "assert not {'torch', 'transformers', 'safetensors'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    assert "original LLaVA" in done.stdout

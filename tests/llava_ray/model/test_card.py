"""Sizes known from configs alone are those of the real classes."""

import dataclasses
import json
from pathlib import Path

import fakes
import pytest
import torch
import transformers
from published import make_original
from samples import small_run

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.lora import LoraConfig
from llava_ray.errors import ModelError
from llava_ray.model.formats.bundle.write import export_bundle
from llava_ray.model.formats.hub.write import export_hub
from llava_ray.model.formats.known_models import KNOWN_CONFIGS
from llava_ray.model.formats.model_opening import open_model
from llava_ray.model.formats.part_configs import build_config
from llava_ray.model.formats.sources import find_part
from llava_ray.model.freezing import freeze
from llava_ray.model.saving import save_bundle
from llava_ray.model.summary import build_language_model, count_adapter, summarize_model


def run_config(folders, language_model="llama", tower="clip", **changes) -> FinetuneConfig:
    settings = folders.config(language_model, tower).model_dump() | changes
    return FinetuneConfig.parsed({"model": settings, "data": {"data_path": "data.json"}})


@pytest.mark.parametrize("kind", fakes.LANGUAGE_MODELS)
@pytest.mark.parametrize("tower", ["clip", "dinov2"])
def test_every_part_is_as_large_as_the_real_one(kind: str, tower: str, folders) -> None:
    card = summarize_model(run_config(folders, kind, tower))
    parts = folders.assemble(kind, tower)
    learning = {part.part: part for part in freeze(parts.llava, parts.tower, parts.config)}
    found = {part.name: (part.num_total, part.num_trainable) for part in card.parts}
    tower_size = sum(tensor.numel() for tensor in parts.tower.full_state_dict().values())
    assert found == {
        "language_model": (learning["language_model"].num_total, learning["language_model"].num_trainable),
        "projector": (learning["projector"].num_total, learning["projector"].num_trainable),
        "vision_tower": (tower_size, 0),
    }
    assert not any(parameter.numel() and not parameter.is_meta for parameter in card.language_model.parameters())


@pytest.mark.parametrize(
    ("changes", "trainable"),
    [
        ({"tune_mm_mlp_adapter": True}, {"language_model": 0, "projector": 2624}),
        ({"freeze_mm_mlp_adapter": True}, {"projector": 0}),
        ({"mm_projector_type": "linear"}, {"projector": 1568}),
        ({"s2": True, "mm_projector_type": "linear"}, {"projector": 3 * 48 * 32 + 32}),
        ({"mm_vision_select_layer": (-2, -1), "mm_projector_type": "linear"}, {"projector": 2 * 48 * 32 + 32}),
    ],
)
def test_what_learns_follows_the_switches(changes, trainable, folders) -> None:
    card = summarize_model(run_config(folders, **changes))
    assert {name: card.part(name).num_trainable for name in trainable} == trainable


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [("lmsys/vicuna-7b-v1.5", 6_738_415_616), ("lmsys/vicuna-13b-v1.5", 13_015_864_320)],
)
def test_the_known_language_models_have_their_published_size(name: str, num_parameters: int) -> None:
    with torch.device("meta"):
        model = build_language_model(build_config(KNOWN_CONFIGS[name], name))
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


def test_the_known_tower_has_its_published_size() -> None:
    with torch.device("meta"):
        tower = transformers.CLIPVisionModel(build_config(KNOWN_CONFIGS["openai/clip-vit-large-patch14-336"], "clip"))
    assert sum(parameter.numel() for parameter in tower.parameters()) == 303_507_456


@pytest.mark.parametrize("kind", ["llama", "phi3", "qwen3"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_is_as_large_as_pefts(kind: str, use_dora: bool, folders) -> None:
    import peft

    card = summarize_model(run_config(folders, kind))
    model = transformers.AutoModelForCausalLM.from_pretrained(folders.language_model(kind))
    targets = sorted({name.rpartition(".")[2] for name in card.linears})
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, use_dora=use_dora))
    expected = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    lora = LoraConfig(lora_enable=True, lora_r=4, use_dora=use_dora)
    assert count_adapter(lora, card.linears) == expected
    some = lora.model_copy(update={"lora_target_modules": (targets[0],)})
    assert 0 < count_adapter(some, card.linears) < expected
    assert count_adapter(lora.model_copy(update={"lora_enable": False}), card.linears) == 0


@pytest.mark.parametrize(
    "changes",
    [{"mm_vision_select_layer": (-3, -2)}, {"s2": True, "s2_scales": (32, 64)}, {"mm_projector_type": "mlp3x_gelu"}],
)
def test_the_projector_is_as_wide_as_the_features(changes, folders) -> None:
    card = summarize_model(run_config(folders, **changes))
    parts = folders.assemble(**changes)
    assert card.part("projector").num_total == sum(p.numel() for p in parts.llava.projector.parameters())


def test_any_layout_is_known(folders, tmp_path: Path) -> None:
    original = make_original(tmp_path / "original", folders.language_model(), folders.tower())
    model = open_model(original, version="v1", vision_tower=str(folders.tower()))
    export_bundle(model, tmp_path / "bundle")
    export_hub(model, tmp_path / "hub", "padded")
    save_bundle(tmp_path / "named", folders.assemble(), include="projector")
    expected = {part.name: part.num_total for part in summarize_model(run_config(folders)).parts}
    for name in ("bundle", "named"):
        card = summarize_model(run_config(folders, model_name_or_path=str(tmp_path / name), vision_tower=None))
        assert {part.name: part.num_total for part in card.parts} == expected
        assert card.image_side == 32
    card = summarize_model(run_config(folders, model_name_or_path=str(original)))
    assert {part.name: part.num_total for part in card.parts} == expected
    card = summarize_model(run_config(folders, model_name_or_path=str(tmp_path / "hub"), vision_tower=None))
    assert card.part("language_model").num_total == expected["language_model"] + 2 * 20 * fakes.WIDTH


def test_a_dinov2_is_measured_at_the_size_of_its_images(folders) -> None:
    assert summarize_model(run_config(folders, tower="dinov2")).image_side == 32  # its position table is for 64


def test_what_would_need_a_download_is_said(folders) -> None:
    message = (
        r"the size of the language model cannot be known: 'nobody/nothing' is no folder here, .*hf download nobody"
    )
    with pytest.raises(ModelError, match=message):
        summarize_model(run_config(folders, model_name_or_path="nobody/nothing"))
    with pytest.raises(ModelError, match="the size of the vision tower cannot be known: 'not a name'"):
        summarize_model(run_config(folders, vision_tower="not a name"))


def test_a_config_in_the_hubs_cache_is_enough(tmp_path: Path, monkeypatch) -> None:
    snapshot = tmp_path / "models--some--model/snapshots/abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--model/refs").mkdir()
    (tmp_path / "models--some--model/refs/main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert find_part("some/model", "language_model", weights=False, offline=True).config["hidden_size"] == 8


def test_the_card_of_a_small_run(tmp_path: Path) -> None:
    card = summarize_model(small_run(tmp_path, num_samples=4))
    assert [part.name for part in card.parts] == ["language_model", "projector", "vision_tower"]
    assert dataclasses.asdict(card.parts[1])["kind"] == "mlp2x_gelu"

"""A tower that learns: inside the model under its own names, touched by every row, kept in the bundle."""

from pathlib import Path

import fakes
import pytest
import torch
from losses import token_losses
from transformers import AutoModel

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.train import TrainConfig
from llava_ray.errors import ConfigError
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.freezing import freeze
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.saving import save_bundle
from llava_ray.train.groups import parameter_groups


def tuned(folders, tower: str = "clip", **settings: object) -> LlavaParts:
    parts = folders.assemble(tower=tower, unfreeze_mm_vision_tower=True, **settings)
    freeze(parts.llava, parts.tower, parts.config)
    return parts


def all_pixels(samples) -> torch.Tensor:
    return torch.cat([sample.pixels for sample in samples if sample.pixels is not None])


@pytest.mark.parametrize("kind", fakes.TOWERS)
def test_tensors_have_the_backbones_own_names(kind: str, folders) -> None:
    parts = tuned(folders, kind)
    whole = AutoModel.from_pretrained(folders.tower(kind)).state_dict()
    names = {
        name.removeprefix("vision_tower.") for name in parts.llava.state_dict() if name.startswith("vision_tower.")
    }
    assert names < whole.keys()
    assert not any("layers.2" in name or "layer.2" in name or "layernorm" in name.split(".")[0] for name in names)


@pytest.mark.parametrize("kind", fakes.TOWERS)
@pytest.mark.parametrize("settings", [{}, {"mm_vision_select_layer": (-2, -1)}, {"s2": True}], ids=["one", "two", "s2"])
def test_every_row_touches_every_parameter_that_learns(kind: str, settings, folders, samples, pack) -> None:
    parts = tuned(folders, kind, **settings)
    scale = 3 if parts.config.s2 else 1
    with_image, without = samples(parts.image_tokens.num_features)[:2]
    row, text = pack(parts, [with_image]) if scale == 1 else None, pack(parts, [without])
    pixels = with_image.pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    ids, positions, labels = with_image.input_ids, with_image.position_ids, with_image.labels
    token_losses(parts.llava, ids, positions, labels, pixels=pixels).sum().backward()
    learning = {name: p for name, p in parts.llava.named_parameters() if p.requires_grad}
    tower_names = [name for name in learning if name.startswith("vision_tower.")]
    assert tower_names
    # A key's bias shifts all scores of a query alike: its gradient is nothing but rounding.
    quiet = [
        name for name in tower_names if not learning[name].grad.any() and not name.endswith(("k_proj.bias", "key.bias"))
    ]
    assert not quiet
    parts.llava.zero_grad()
    token_losses(parts.llava, *text.inputs).sum().backward()
    for name, parameter in learning.items():
        assert parameter.grad is not None, name
        if name in tower_names:
            assert not parameter.grad.any(), name
    if row is not None:
        torch.testing.assert_close(
            token_losses(parts.llava, ids, positions, labels, pixels=pixels),
            token_losses(parts.llava, *row.inputs),
            rtol=0,
            atol=1e-5,
        )


def test_what_learns_is_counted_and_has_its_own_rate(folders) -> None:
    parts = folders.assemble(tower="dinov2", unfreeze_mm_vision_tower=True)
    report = {row.part: row for row in freeze(parts.llava, parts.tower, parts.config)}
    width = fakes.TOWER_WIDTH
    assert report["vision_tower"].num_total - report["vision_tower"].num_trainable == width  # the mask token
    groups = parameter_groups(
        parts.llava, TrainConfig(learning_rate=1e-3, mm_vision_tower_lr=2e-6, mm_projector_lr=1e-4, weight_decay=0.1)
    )
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert rates["vision_tower.decay"] == (2e-6, 0.1)
    assert rates["vision_tower.no_decay"] == (2e-6, 0.0)
    assert rates["language_model.decay"] == (1e-3, 0.1)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in parts.llava.parameters())


def test_tower_and_projector_can_learn_alone(folders) -> None:
    parts = tuned(folders, freeze_backbone=True)
    learning = {name.partition(".")[0] for name, p in parts.llava.named_parameters() if p.requires_grad}
    assert learning == {"projector", "vision_tower"}
    only = tuned(folders, freeze_backbone=True, freeze_mm_mlp_adapter=True)
    assert {name.partition(".")[0] for name, p in only.llava.named_parameters() if p.requires_grad} == {"vision_tower"}


@pytest.mark.parametrize("include", ["all", "projector"])
@pytest.mark.parametrize("kind", fakes.TOWERS)
def test_a_bundle_holds_the_tower_as_it_has_become(kind: str, include, folders, samples, tmp_path: Path) -> None:
    parts = tuned(folders, kind)
    optimizer = torch.optim.SGD([p for p in parts.llava.parameters() if p.requires_grad], lr=0.1)
    sample = samples(parts.image_tokens.num_features)[0]
    token_losses(
        parts.llava, sample.input_ids, sample.position_ids, sample.labels, pixels=sample.pixels
    ).sum().backward()
    optimizer.step()
    # As gathered from an engine: names of Llava, and nothing of the tower's blocks that were set aside.
    save_bundle(tmp_path / "bundle", parts, dict(parts.llava.state_dict()), include=include)
    loaded = load_pretrained_model(tmp_path / "bundle")
    assert loaded.manifest.vision_tower.base == str(tmp_path / "bundle" / "vision_tower")
    assert torch.equal(loaded.tower(sample.pixels), parts.tower(sample.pixels))
    before = folders.assemble(tower=kind).tower(sample.pixels)
    assert not torch.allclose(loaded.tower(sample.pixels), before, atol=1e-3)
    assert (tmp_path / "bundle" / "language_model").is_dir() == (include == "all")


def finetune(model: dict[str, object], **sections: dict[str, object]) -> FinetuneConfig:
    values: dict[str, object] = {"model": {"model_name_or_path": "m", **model}, "data": {"data_path": "d"}}
    return FinetuneConfig.parsed(values | sections)


@pytest.mark.parametrize(
    ("model", "sections", "message"),
    [
        ({"unfreeze_mm_vision_tower": True, "tune_mm_mlp_adapter": True}, {}, "freeze_backbone = true learns tower"),
        (
            {"unfreeze_mm_vision_tower": True},
            {"data": {"data_path": "d", "vision_features": "streamed"}},
            "takes features from a frozen tower.*set 'inline'",
        ),
        ({}, {"train": {"mm_vision_tower_lr": 2e-6}}, "no effect without model.unfreeze_mm_vision_tower"),
        ({"image_grid_pinpoints": [[336, 672]]}, {}, "no effect without data.image_aspect_ratio = 'anyres'"),
        ({"mm_vision_select_layer": []}, {}, "at least one layer"),
    ],
)
def test_settings_that_contradict_each_other(model, sections, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        finetune(model, **sections)

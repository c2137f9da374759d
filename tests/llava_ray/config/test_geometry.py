"""One list of a model's settings: what recipes, bundles and exports say of it."""

import json
from typing import Any

import pytest

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.geometry import (
    FEATURE_KEYS,
    GEOMETRY_NAMES,
    GeometrySettings,
    ModelGeometry,
    is_addable,
    read_addable,
)
from llava_ray.config.model import ModelConfig
from llava_ray.model.formats.manifest import Manifest

RESOLVED: dict[str, Any] = {
    "mm_projector_type": "linear",
    "mm_hidden_size": 48,
    "hidden_size": 32,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "s2_scales": [],
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": [],
    "mm_patch_merge_type": "flat",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
}


def test_llava_json_keeps_its_keys_and_their_order() -> None:
    part = {"inside": True, "base": "x", "fingerprint": "f"}
    values = {"version": "v1", **RESOLVED, "model_max_length": 8, "language_model": part, "vision_tower": part}
    written = json.loads(Manifest.model_validate(values).model_dump_json())
    beside = {"adapter": None, "quantization": None, "libraries": {}, "training": {}}
    assert list(written.items()) == list(({"format_version": 1} | values | beside).items())


def test_what_a_recipe_asks_for_is_resolved_by_name() -> None:
    asked = ModelConfig(model_name_or_path="x", mm_projector_type="linear", mm_use_im_start_end=True, s2=True)
    widths = {"mm_hidden_size": 144, "hidden_size": 32}
    images = {"image_aspect_ratio": "square", "image_grid_pinpoints": ()}
    found = ModelGeometry.resolve(asked, **widths, **images, s2_scales=(32, 64, 96))
    expected = RESOLVED | widths | {"s2_scales": (32, 64, 96), "image_aspect_ratio": "square"}
    assert dict(found) == expected | {"mm_use_im_start_end": True, "image_grid_pinpoints": ()}
    assert found.s2


@pytest.mark.parametrize(
    ("name", "trained", "expected"),
    [
        ("mm_patch_merge_type", "flat", True),
        ("mm_patch_merge_type", "spatial", False),
        ("mm_use_im_start_end", False, True),
        ("mm_use_im_start_end", True, False),
        ("s2_scales", (), True),
        ("s2_scales", None, True),
        ("s2_scales", (32,), False),
        ("image_grid_pinpoints", (), True),
        ("mm_projector_type", None, False),
        ("mm_vision_select_layer", -2, False),
        ("s2", False, False),
        ("tune_mm_mlp_adapter", False, False),
    ],
)
def test_what_has_a_default_may_be_added_to_a_model(name: str, trained: object, expected: bool) -> None:
    assert is_addable(name, trained) == expected


def test_an_original_without_a_setting_has_its_default() -> None:
    expected = {"mm_patch_merge_type": "flat", "mm_use_im_start_end": False, "mm_use_im_patch_token": False}
    assert read_addable({}) == expected
    assert read_addable({name: None for name in expected}) == expected
    assert read_addable({"mm_patch_merge_type": "", "mm_use_im_start_end": 1}) == expected | {
        "mm_use_im_start_end": True
    }


def test_every_setting_can_be_asked_for() -> None:
    config = FinetuneConfig.parsed({"model": {"model_name_or_path": "x"}, "data": {"data_path": "d"}})
    assert all(hasattr(getattr(config, section), name) for section, name in (key.split(".") for key in FEATURE_KEYS))
    assert set(GEOMETRY_NAMES) - {"image_aspect_ratio"} <= GeometrySettings.model_fields.keys()

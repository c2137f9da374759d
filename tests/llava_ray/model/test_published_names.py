import pytest

from llava_ray.model.formats.hub.names import from_hub, to_hub
from llava_ray.model.formats.names import VISION_TOWER_PREFIX, bare_tower_name
from llava_ray.model.formats.original.names import from_original, to_original

# ours, the original's, the hub's as older programs know it, the hub's as transformers has named it since 4.52
NAMES = [
    (
        "language_model.model.embed_tokens.weight",
        "model.embed_tokens.weight",
        "language_model.model.embed_tokens.weight",
        "model.language_model.embed_tokens.weight",
    ),
    (
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "model.language_model.layers.0.self_attn.q_proj.weight",
    ),
    ("language_model.lm_head.weight", "lm_head.weight", "language_model.lm_head.weight", "lm_head.weight"),
    (
        "projector.0.weight",
        "model.mm_projector.0.weight",
        "multi_modal_projector.linear_1.weight",
        "model.multi_modal_projector.linear_1.weight",
    ),
    (
        "projector.2.bias",
        "model.mm_projector.2.bias",
        "multi_modal_projector.linear_2.bias",
        "model.multi_modal_projector.linear_2.bias",
    ),
    ("image_newline", "model.image_newline", "image_newline", "model.image_newline"),
    (
        "vision_tower.encoder.layers.0.mlp.fc1.weight",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
    ),
    (
        "vision_tower.pre_layrnorm.weight",
        "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight",
        "vision_tower.vision_model.pre_layrnorm.weight",
        "model.vision_tower.pre_layrnorm.weight",  # as transformers 5 names it in memory
    ),
]


def ours_of(name: str) -> str:
    """A tower's tensors have one level less than some versions of transformers write."""
    own = name.removeprefix(VISION_TOWER_PREFIX)
    return name if own == name else VISION_TOWER_PREFIX + bare_tower_name(own)


@pytest.mark.parametrize(("ours", "original", "hub", "new_hub"), NAMES)
def test_there_and_back(ours: str, original: str, hub: str, new_hub: str) -> None:
    assert to_original(ours) == original
    assert to_hub(ours, vision_model=True) == hub
    assert ours_of(from_original(original)) == ours_of(from_hub(hub)) == ours_of(from_hub(new_hub)) == ours


def test_a_dinov2_has_no_vision_model_level() -> None:
    name = "vision_tower.encoder.layer.0.norm1.weight"
    assert to_hub(name, vision_model=False) == name
    assert from_hub(name) == name


def test_a_linear_projector() -> None:
    assert to_original("projector.weight") == "model.mm_projector.weight"
    assert from_original("model.mm_projector.weight") == "projector.weight"

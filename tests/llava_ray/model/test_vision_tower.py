from pathlib import Path

import fakes
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from llava_ray.errors import ModelError
from llava_ray.model.formats.tower_loading import load_vision_tower

pytestmark = pytest.mark.slow

PREFIX_TOKENS = {"clip": 1, "siglip": 0, "siglip2": 0, "dinov2": 1, "dinov2_with_registers": 5}
NUM_PATCHES = (fakes.IMAGE_SIZE // fakes.PATCH) ** 2
NUM_BLOCKS = 3


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, fakes.IMAGE_SIZE, fakes.IMAGE_SIZE, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def hidden_states(folder: Path, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What transformers itself says, of the whole tower."""
    model = transformers.AutoModel.from_pretrained(folder)
    inputs = {"pixel_values": pixels}
    if model.config.model_type == "siglip2_vision_model":
        patches = [convert_image_to_patches(image.numpy(), fakes.PATCH) for image in pixels]
        side = fakes.IMAGE_SIZE // fakes.PATCH
        inputs = {
            "pixel_values": torch.tensor(np.stack(patches)),
            "pixel_attention_mask": torch.ones(len(pixels), NUM_PATCHES, dtype=torch.int32),
            "spatial_shapes": torch.tensor([[side, side]] * len(pixels)),
        }
    states: tuple[torch.Tensor, ...] = model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == NUM_BLOCKS + 1
    return states


def assert_same(kind: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    # transformers computes SigLIP 2's attention another way when it gets a mask, even one that hides nothing.
    tolerance = 1e-5 if kind == "siglip2" else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", fakes.TOWERS)
def test_patch_drops_exactly_the_prefix_tokens(kind: str, folders, pixels: torch.Tensor) -> None:
    tower = load_vision_tower(folders.tower(kind), select_layer=-2, select_feature="patch")
    expected = hidden_states(folders.tower(kind), pixels)[-2]
    assert tower.num_prefix_tokens == PREFIX_TOKENS[kind] == expected.shape[1] - NUM_PATCHES
    features = tower(pixels)
    assert features.shape == (2, NUM_PATCHES, fakes.TOWER_WIDTH)
    assert_same(kind, features, expected[:, PREFIX_TOKENS[kind] :])


@pytest.mark.parametrize("kind", fakes.TOWERS)
def test_cls_patch_keeps_them(kind: str, folders, pixels: torch.Tensor) -> None:
    tower = load_vision_tower(folders.tower(kind), select_layer=-2, select_feature="cls_patch")
    features = tower(pixels)
    assert_same(kind, features, hidden_states(folders.tower(kind), pixels)[-2])


@pytest.mark.parametrize("kind", fakes.TOWERS)
@pytest.mark.parametrize("select_layer", range(-NUM_BLOCKS - 1, NUM_BLOCKS + 1))
def test_stopping_early_equals_every_hidden_state(kind: str, select_layer: int, folders, pixels: torch.Tensor) -> None:
    tower = load_vision_tower(folders.tower(kind), select_layer=select_layer, select_feature="cls_patch")
    assert_same(kind, tower(pixels), hidden_states(folders.tower(kind), pixels)[select_layer])


@pytest.mark.parametrize("kind", fakes.TOWERS)
@pytest.mark.parametrize("layers", [(-2, -1), (1, -4, 2), [3, 0]])
def test_several_layers_lie_side_by_side_in_the_order_given(
    kind: str, layers: list[int], folders, pixels: torch.Tensor
) -> None:
    tower = load_vision_tower(folders.tower(kind), select_layer=layers, select_feature="patch")
    states = hidden_states(folders.tower(kind), pixels)
    expected = torch.cat([states[layer] for layer in layers], -1)[:, PREFIX_TOKENS[kind] :]
    features = tower(pixels)
    assert features.shape == (2, NUM_PATCHES, tower.hidden_size) == (2, NUM_PATCHES, len(layers) * fakes.TOWER_WIDTH)
    assert_same(kind, features, expected)


def test_any_of_several_layers_may_be_out_of_range(folders) -> None:
    with pytest.raises(ModelError, match="mm_vision_select_layer is 4"):
        load_vision_tower(folders.tower(), select_layer=(-2, 4), select_feature="patch")


def test_many_views_are_extracted_a_few_at_a_time(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = load_vision_tower(folders.tower(), select_layer=-2, select_feature="patch")
    views = torch.randn(7, 3, fakes.IMAGE_SIZE, fakes.IMAGE_SIZE)
    expected, seen = tower(views / 2), []
    tower.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    monkeypatch.setattr("llava_ray.model.network.tower.IMAGES_PER_FORWARD", 3)
    torch.testing.assert_close(tower.extract(views, lambda some: some / 2), expected)
    assert seen == [3, 3, 1]


def test_blocks_after_the_layer_do_not_run(folders) -> None:
    tower = load_vision_tower(folders.tower("clip"), select_layer=1, select_feature="patch")
    assert len(tower.backbone.encoder.layers) == 1


@pytest.mark.parametrize("kind", fakes.TOWERS)
def test_whole_tower_can_still_be_saved(kind: str, folders) -> None:
    tower = load_vision_tower(folders.tower(kind), select_layer=0, select_feature="patch")
    whole = transformers.AutoModel.from_pretrained(folders.tower(kind)).state_dict()
    kept = tower.full_state_dict()
    assert kept.keys() == whole.keys()
    assert all(torch.equal(kept[name], whole[name]) for name in whole)


@pytest.mark.parametrize("select_layer", [-5, 4, 24])
def test_layer_out_of_range_names_the_range(select_layer: int, folders) -> None:
    with pytest.raises(ModelError, match=rf"mm_vision_select_layer is {select_layer}.*3 blocks.*-4 to 3"):
        load_vision_tower(folders.tower("clip"), select_layer=select_layer, select_feature="patch")


def test_unknown_kind_names_the_known(tmp_path: Path) -> None:
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"type 'vit'; known towers are clip_vision_model, siglip_vision_model, siglip2"
    ):
        load_vision_tower(tmp_path, select_layer=-2, select_feature="patch")


@pytest.mark.parametrize(
    ("config_class", "model_class"), [("CLIPConfig", "CLIPModel"), ("SiglipConfig", "SiglipModel")]
)
def test_whole_image_text_model_gives_its_vision_part(
    config_class: str, model_class: str, tmp_path: Path, pixels: torch.Tensor
) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    vision = {**small, "image_size": fakes.IMAGE_SIZE, "patch_size": fakes.PATCH}
    text = {**small, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    whole = getattr(transformers, model_class)(
        getattr(transformers, config_class)(vision_config=vision, text_config=text)
    ).eval()
    whole.save_pretrained(tmp_path)
    tower = load_vision_tower(tmp_path, select_layer=-2, select_feature="cls_patch")
    with torch.no_grad():
        expected = whole.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(tower(pixels), expected)


def test_tower_is_frozen_and_in_evaluation_mode(folders) -> None:
    tower = load_vision_tower(folders.tower(), select_layer=-2, select_feature="patch")
    assert not any(p.requires_grad for p in tower.parameters())
    assert not tower.training


def test_bfloat16(folders, pixels: torch.Tensor) -> None:
    tower = load_vision_tower(folders.tower(), select_layer=-2, select_feature="patch", dtype=torch.bfloat16)
    assert tower(pixels).dtype == torch.bfloat16


def test_missing_tensors_are_not_made_up(tmp_path: Path) -> None:
    fakes.make_vision_tower(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if "layers.1" in name)
    del weights[lost]
    transformers.AutoModel.from_pretrained(tmp_path).save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ModelError, match=r"lacks 1 tensors, the first is .*layers\.1"):
        load_vision_tower(tmp_path, select_layer=-2, select_feature="patch")

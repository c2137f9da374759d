"""A DINOv2 as a SigLIP: the same but for the class token, and honest about it."""

from dataclasses import replace
from pathlib import Path

import fakes
import pytest
import torch
from PIL import Image
from published import read
from transformers import Dinov2Config, Dinov2Model, LlavaForConditionalGeneration, SiglipVisionModel

from llava_ray.errors import ModelError
from llava_ray.model.formats.hub.siglip_form import (
    approximate,
    draw_images,
    load_backbone,
    measure_feature_difference,
    open_images,
    siglip_config,
    siglip_tensors,
)
from llava_ray.model.formats.hub.write import export_hub
from llava_ray.model.formats.model_opening import open_model
from llava_ray.model.formats.names import VISION_TOWER_PREFIX
from llava_ray.model.saving import save_bundle


@pytest.fixture(scope="module")
def model(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip") / "bundle"
    save_bundle(folder, folders.assemble(tower="dinov2"))
    return open_model(folder)


def state_of(model) -> dict[str, torch.Tensor]:
    """The tower's tensors, with scales that do not leave everything as it is."""
    torch.manual_seed(3)
    state = {name: tensor.load() for name, tensor in model.part(VISION_TOWER_PREFIX).items()}
    return {n: t + 0.5 * torch.randn_like(t) if "layer_scale" in n or "bias" in n else t for n, t in state.items()}


def test_it_is_the_dinov2_without_its_class_token(model) -> None:
    """LayerScale folded in and positions interpolated lose nothing: compared with the blocks run on patches alone."""
    state = state_of(model)
    original = load_backbone(Dinov2Model, Dinov2Config(**model.tower_config), state)
    tensors = siglip_tensors(original, state, fakes.IMAGE_SIZE)
    form = load_backbone(SiglipVisionModel, siglip_config(original.config, fakes.IMAGE_SIZE), tensors)
    pixels = torch.randn(2, 3, fakes.IMAGE_SIZE, fakes.IMAGE_SIZE)
    with torch.no_grad():
        hidden = original.embeddings(pixels)[:, 1:]
        for block in original.encoder.layer:
            hidden = block(hidden)
        found = form(pixels, output_hidden_states=True)
        assert torch.allclose(found.hidden_states[-1], hidden, atol=1e-4)
        assert torch.allclose(found.last_hidden_state, original.layernorm(hidden), atol=1e-4)
        assert not torch.allclose(
            hidden, original(pixels, output_hidden_states=True).hidden_states[-1][:, 1:], atol=1e-2
        )


def test_the_export_measures_the_difference_and_transformers_loads_it(model, tmp_path: Path) -> None:
    approximated, difference = approximate(model, draw_images())
    assert difference.num_images == 8
    assert difference.relative_distance > 0
    assert difference.lowest_cosine < difference.mean_cosine < 1
    assert str(difference).startswith("patch features on 8 images: cosine to DINOv2's 0.")
    export_hub(approximated, tmp_path / "hub")
    vision = read(tmp_path / "hub/config.json")["vision_config"]
    assert (vision["model_type"], vision["image_size"], vision["hidden_act"]) == ("siglip_vision_model", 32, "gelu")
    assert (vision["layer_norm_eps"], vision["vision_use_head"]) == (1e-6, False)
    hub, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert hub.config.vision_feature_select_strategy == "full"


def test_pictures_can_be_given(model, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "red.png")
    _, one = approximate(model, open_images([tmp_path / "red.png"]))
    assert one.num_images == 1
    assert len(open_images([])) == 8


def test_the_difference_is_what_it_says() -> None:
    before = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    after = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]])
    difference = measure_feature_difference(before, after)
    assert (difference.mean_cosine, difference.lowest_cosine) == (0.5, 0.0)
    assert difference.relative_distance == pytest.approx((8 / 5) ** 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tower_config": {"model_type": "clip_vision_model"}}, "it is 'clip_vision_model'; only DINOv2"),
        ({"tower_config": {"model_type": "dinov2", "use_swiglu_ffn": True}}, "gated MLP"),
        ({"preprocessor": {"size": {"height": 28, "width": 42}}}, "images are 42 x 28 pixels"),
    ],
)
def test_towers_without_such_a_form_are_refused(change, message, model) -> None:
    with pytest.raises(ModelError, match=f"vision tower: --approximate cannot be used: .*{message}"):
        approximate(replace(model, **change), draw_images())


def test_a_kept_class_token_is_refused(model) -> None:
    manifest = model.manifest.model_copy(update={"mm_vision_select_feature": "cls_patch"})
    with pytest.raises(ModelError, match="'cls_patch', and a SigLIP has no class token"):
        approximate(replace(model, manifest=manifest), draw_images())

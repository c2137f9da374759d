"""Approximation of a DINOv2 tower by a SigLIP one, which vLLM supports, with a measured error.

A SigLIP has no LayerScale (folded into the matrices before it), positions for one grid only, and no class token. Only
the last changes the result: patches can no longer attend to that token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import Dinov2Model, PreTrainedConfig, PreTrainedModel, SiglipVisionConfig, SiglipVisionModel

from llava_ray.errors import ModelError
from llava_ray.images.geometry import ImageSpec, crop_pixels
from llava_ray.images.processing import normalize_pixels
from llava_ray.images.reading import open_image
from llava_ray.model.formats.hub.processor import pixels_of
from llava_ray.model.formats.model_files import ModelFiles
from llava_ray.model.formats.names import VISION_TOWER_PREFIX
from llava_ray.model.formats.part_configs import build_config, values_of
from llava_ray.model.network.tower import VisionTower
from llava_ray.model.tensors.weight_files import wrap_tensor

_NUM_DRAWN = 8
_MAX_PIXELS = 178_956_970  # Pillow's own bomb limit

_OUTER_NAMES = {
    "embeddings.patch_embeddings.projection.weight": "embeddings.patch_embedding.weight",
    "embeddings.patch_embeddings.projection.bias": "embeddings.patch_embedding.bias",
    "layernorm.weight": "post_layernorm.weight",
    "layernorm.bias": "post_layernorm.bias",
}
_BLOCK_NAMES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attention.attention.query": "self_attn.q_proj",
    "attention.attention.key": "self_attn.k_proj",
    "attention.attention.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_SCALES = {"attention.output.dense": "layer_scale1.lambda1", "mlp.fc2": "layer_scale2.lambda1"}


@dataclass(frozen=True)
class FeatureDifference:
    """The change of the selected layer's patch features, over all patches of ``num_images`` images."""

    num_images: int
    mean_cosine: float
    lowest_cosine: float
    relative_distance: float
    """Norm of the difference divided by the norm of the features."""

    def __str__(self) -> str:
        """Format the numbers as a sentence."""
        return (
            f"patch features on {self.num_images} images: cosine to DINOv2's {self.mean_cosine:.3f} on average and "
            f"{self.lowest_cosine:.3f} at worst, relative distance {self.relative_distance:.3f}"
        )


def approximate(model: ModelFiles, images: Sequence[Image.Image]) -> tuple[ModelFiles, FeatureDifference]:
    """Return the model with its DINOv2 tower as a SigLIP, and the change of features on these images.

    Raises ModelError, naming the part, for a tower that cannot be converted.
    """
    _check_dinov2(model)
    side = pixels_of(model.preprocessor)[0]
    stored = model.part(VISION_TOWER_PREFIX)
    dtype = next(iter(stored.values())).dtype
    state = {name: tensor.load().float() for name, tensor in stored.items()}
    original = load_backbone(Dinov2Model, build_config(model.tower_config, "the vision tower"), state)
    config = siglip_config(original.config, side)
    tensors = {name: tensor.to(dtype) for name, tensor in siglip_tensors(original, state, side).items()}
    form = load_backbone(SiglipVisionModel, config, {name: tensor.float() for name, tensor in tensors.items()})
    layer = model.manifest.mm_vision_select_layer
    # The same input for both; the preprocessing does not matter here.
    spec = ImageSpec.from_processor(_ProcessorSettings(model.preprocessor), "square")
    pixels = normalize_pixels(np.stack([crop_pixels(image, spec) for image in images]), spec)
    difference = measure_feature_difference(_features(original, layer, pixels), _features(form, layer, pixels))
    others = {name: tensor for name, tensor in model.tensors.items() if not name.startswith(VISION_TOWER_PREFIX)}
    tower = {f"{VISION_TOWER_PREFIX}{name}": wrap_tensor(tensor) for name, tensor in tensors.items()}
    return replace(model, tower_config=values_of(config), tensors={**others, **tower}), difference


@dataclass(frozen=True)
class _ProcessorSettings:
    """A stand-in for an image processor, with its settings only."""

    values: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings."""
        return {"resample": 3, "rescale_factor": 1 / 255, **self.values}


def _check_dinov2(model: ModelFiles) -> None:
    """Raise ModelError, naming the part, unless the model's tower can be converted to a SigLIP."""
    config, found = model.tower_config, model.tower_config["model_type"]
    height, width = pixels_of(model.preprocessor)
    reasons = {
        f"it is {found!r}; only DINOv2 without registers has a SigLIP form": found != "dinov2",
        "its blocks have a gated MLP (use_swiglu_ffn), SigLIP's have not": bool(config.get("use_swiglu_ffn")),
        "mm_vision_select_feature is 'cls_patch', and a SigLIP has no class token": (
            model.manifest.mm_vision_select_feature == "cls_patch"
        ),
        f"images are {width} x {height} pixels, and a SigLIP takes squares": height != width,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ModelError(f"vision tower: --approximate cannot be used: {reason}.")


def siglip_config(config: PreTrainedConfig, side: int) -> SiglipVisionConfig:
    """Return the config of a SigLIP for ``siglip_tensors``, for images of ``side`` x ``side`` pixels."""
    form = SiglipVisionConfig(
        hidden_size=config.hidden_size,
        intermediate_size=int(config.hidden_size * config.mlp_ratio),
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_channels=config.num_channels,
        image_size=side,
        patch_size=config.patch_size,
        hidden_act=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
    )
    form.vision_use_head = False
    form.architectures = ["SiglipVisionModel"]
    return form


@torch.no_grad()
def siglip_tensors(backbone: PreTrainedModel, state: Mapping[str, Tensor], side: int) -> dict[str, Tensor]:
    """Convert a DINOv2's ``state`` to SigLIP's names, LayerScale folded in, positions for ``side`` x ``side`` pixels.

    ``backbone`` is the same DINOv2, whose own method interpolates the positions.
    """
    width = backbone.config.hidden_size
    grid = torch.zeros(1, 1 + (side // backbone.config.patch_size) ** 2, width)
    interpolate: Any = backbone.get_submodule("embeddings").interpolate_pos_encoding
    tensors = {new: state[old] for old, new in _OUTER_NAMES.items()}
    tensors["embeddings.position_embedding.weight"] = interpolate(grid, side, side)[0, 1:]
    for index in range(backbone.config.num_hidden_layers):
        block, form = f"encoder.layer.{index}", f"encoder.layers.{index}"
        for old, new in _BLOCK_NAMES.items():
            weight = state[f"{block}.{old}.weight"]
            bias = state.get(f"{block}.{old}.bias", torch.zeros(weight.shape[0]))  # attention may have none
            scale = state[f"{block}.{_SCALES[old]}"] if old in _SCALES else torch.ones(weight.shape[0])
            tensors[f"{form}.{new}.weight"] = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
            tensors[f"{form}.{new}.bias"] = bias * scale
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def load_backbone(kind: Any, config: PreTrainedConfig, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """Build a backbone with these tensors, under the names in files. Raises ModelError if they do not fit."""
    loaded, info = kind.from_pretrained(None, config=config, state_dict=dict(state), output_loading_info=True)
    if lacking := sorted({*info["missing_keys"], *info["unexpected_keys"]}):
        raise ModelError(f"vision tower: its tensors are not those of its config; the first is {lacking[0]}.")
    backbone: PreTrainedModel = loaded
    return backbone.eval()


@torch.no_grad()
def _features(backbone: PreTrainedModel, layer: Any, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n p v"]:
    """Return the patch features of the selected layer."""
    result: Tensor = VisionTower(backbone, layer, "patch")(pixels)
    return result


def measure_feature_difference(before: Float[Tensor, "n p v"], after: Float[Tensor, "n p v"]) -> FeatureDifference:
    """Compute the difference between two sets of features."""
    cosine = cosine_similarity(before, after, dim=-1)
    distance = float((after - before).norm() / before.norm())
    return FeatureDifference(before.shape[0], float(cosine.mean()), float(cosine.min()), distance)


def open_images(paths: Sequence[Path]) -> list[Image.Image]:
    """Open the test images; without any, draw some. Raises ImageError."""
    if not paths:
        return draw_images()
    return [open_image(path.read_bytes(), str(path), max_pixels=_MAX_PIXELS) for path in paths]


def draw_images(seed: int = 0) -> list[Image.Image]:
    """Draw deterministic test images: soft colours with a few shapes."""
    draw = np.random.default_rng(seed)
    pictures = []
    for _ in range(_NUM_DRAWN):
        coarse = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        picture = coarse.resize((224, 224), Image.Resampling.BICUBIC)
        pen = ImageDraw.Draw(picture)
        for _ in range(4):
            left, top, width, height = (int(value) for value in draw.integers(10, 120, 4))
            shape = pen.ellipse if draw.random() < 0.5 else pen.rectangle
            shape((left, top, left + width, top + height), fill=tuple(int(c) for c in draw.integers(0, 256, 3)))
        pictures.append(picture)
    return pictures

"""A vision tower and its projector as the file ``mmproj`` of llama.cpp."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_ray.config.geometry import find_unknown_elsewhere
from llava_ray.errors import ModelError
from llava_ray.model.formats.gguf.files import TensorType, write_gguf
from llava_ray.model.formats.hub.processor import pixels_of
from llava_ray.model.formats.manifest import Manifest
from llava_ray.model.formats.model_files import ModelFiles
from llava_ray.model.formats.names import PROJECTOR_PREFIX, VISION_TOWER_PREFIX, bare_tower_name
from llava_ray.model.tensors.weight_files import Stored

_TOWERS = ("clip_vision_model", "siglip_vision_model")
_ACTIVATIONS = ("quick_gelu", "gelu_pytorch_tanh")
_OUTSIDE = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}
_INSIDE = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def write_vision(model: ModelFiles, file: Path, wanted: TensorType) -> None:
    """Write the tower, up to the layer whose features are selected, and the projector.

    Convolutions cannot be in bf16 or q8_0, so the file is in f16 unless f32 is wanted. Raises ModelError.
    """
    check_vision_for_gguf(model)
    num_blocks = count_blocks(model)
    tensors = _name_tensors(model, num_blocks)
    config, processor = model.tower_config, model.preprocessor

    def describe(writer: Any) -> None:
        writer.add_clip_has_vision_encoder(True)
        writer.add_clip_projector_type("mlp")
        writer.add_bool("clip.has_text_encoder", False)
        writer.add_bool("clip.has_llava_projector", True)
        writer.add_vision_image_size(config["image_size"])
        writer.add_vision_patch_size(config["patch_size"])
        writer.add_vision_embedding_length(config["hidden_size"])
        writer.add_vision_feed_forward_length(config["intermediate_size"])
        writer.add_vision_head_count(config["num_attention_heads"])
        writer.add_vision_attention_layernorm_eps(config["layer_norm_eps"])
        writer.add_vision_block_count(num_blocks)
        writer.add_vision_projection_dim(model.manifest.hidden_size)
        writer.add_vision_image_mean([float(value) for value in processor["image_mean"]])
        writer.add_vision_image_std([float(value) for value in processor["image_std"]])
        writer.add_vision_use_gelu(config["hidden_act"] != "quick_gelu")

    write_gguf(file, "clip", tensors, "f32" if wanted == "f32" else "f16", describe)


def check_vision_for_gguf(model: ModelFiles) -> None:
    """Check that llama.cpp computes the features of a model's images. Raises ModelError that names what it does not."""
    for part, why in (*_find_tower_faults(model.manifest, model.tower_config), *_find_image_faults(model)):
        raise _unread(part, why)


def _find_tower_faults(manifest: Manifest, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the part and the reason of each property of tower and projector that llama.cpp does not compute."""
    kind, activation, layer = config["model_type"], config.get("hidden_act"), manifest.mm_vision_select_layer
    if kind not in _TOWERS:
        yield "vision tower", f"it is {kind!r}, and llama.cpp's LLaVA takes CLIP and SigLIP"
    if activation not in _ACTIVATIONS:
        yield "vision tower", f"its hidden_act is {activation!r}, and llama.cpp has {' and '.join(_ACTIVATIONS)}"
    if not isinstance(layer, int):
        yield "vision tower", f"features of several layers {layer} are selected"
    if manifest.mm_vision_select_feature != "patch":
        yield "vision tower", f"mm_vision_select_feature is {manifest.mm_vision_select_feature!r}, not 'patch'"
    if manifest.s2:
        yield "vision tower", f"s2 uses several scales {manifest.s2_scales}"
    if manifest.mm_projector_type != "mlp2x_gelu":
        yield "projector", f"it is {manifest.mm_projector_type!r}, and llama.cpp's is mlp2x_gelu"


def _find_image_faults(model: ModelFiles) -> Iterator[tuple[str, str]]:
    """Yield the part and the reason of each way of showing images that llama.cpp has not."""
    manifest, size = model.manifest, model.tower_config["image_size"]
    if manifest.image_aspect_ratio == "anyres":
        yield "images", "image_aspect_ratio is 'anyres', whose cropped views llama.cpp joins in another way"
    if manifest.mm_use_im_start_end or manifest.mm_use_im_patch_token:
        yield "images", "tokens of their own stand around or for them, which llama.cpp does not write"
    if unknown := find_unknown_elsewhere(manifest):
        yield "settings", f"{unknown} is {getattr(manifest, unknown)!r}"
    if tuple(pixels_of(model.preprocessor)) != (size, size):
        yield "images", f"they are {pixels_of(model.preprocessor)} pixels, and the tower takes {size}"


def count_blocks(model: ModelFiles) -> int:
    """Return how many of the tower's blocks the selected features need. Raises ModelError if there are none."""
    layer, total = model.manifest.mm_vision_select_layer, model.tower_config["num_hidden_layers"]
    assert isinstance(layer, int)
    found: int = layer if layer >= 0 else total + 1 + layer
    if not 1 <= found <= total:
        raise _unread("vision tower", f"mm_vision_select_layer {layer} of {total} layers needs no block of it")
    return found


def _name_tensors(model: ModelFiles, num_blocks: int) -> dict[str, Stored]:
    """Return the tensors by llama.cpp's names, without those behind the selected layer."""
    named: dict[str, Stored] = {}
    for name, tensor in model.part(VISION_TOWER_PREFIX).items():
        bare = bare_tower_name(name)
        inside = _LAYER.fullmatch(bare)
        if inside is not None and inside[2] in _INSIDE:
            if int(inside[1]) < num_blocks:
                named[f"v.blk.{inside[1]}.{_INSIDE[inside[2]]}.{inside[3]}"] = tensor
        elif bare in _OUTSIDE:
            named[_OUTSIDE[bare]] = tensor
        elif not bare.startswith(("post_layernorm.", "head.")):  # they come behind every layer
            raise _unread("vision tower", f"llama.cpp has no tensor for {name}")
    for name, tensor in model.part(PROJECTOR_PREFIX).items():
        named[f"mm.{name}"] = tensor
    return named


def _unread(part: str, why: str) -> ModelError:
    return ModelError(
        f"{part}: llama.cpp cannot read this one: {why}. --language_model_only exports the language model alone."
    )

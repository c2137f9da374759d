"""config.json of the hub layout, from ours (see ``published_settings`` for the way back).

The layout has a config for each part and few settings of its own. All that it has no key for stands under one key of
ours, so that a model we exported comes back as it was; other programs pass over it.
"""

from collections.abc import Mapping
from typing import Any

from llava_ray.errors import ModelError
from llava_ray.model.manifest import Manifest
from llava_ray.model.part_configs import num_prefix_tokens, older

CLASSES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}


def write_settings(
    manifest: Manifest,
    language: Mapping[str, Any],
    tower: Mapping[str, Any],
    *,
    image_token: int,
    num_image_tokens: int,
) -> dict[str, Any]:
    """Return the config, but for our own key; ``language`` has the vocabulary size of the exported table."""
    kind = "llava_next" if manifest.image_aspect_ratio == "anyres" else "llava"
    layer = manifest.mm_vision_select_layer
    values: dict[str, Any] = {
        "architectures": [CLASSES[kind]],
        "ignore_index": -100,
        "image_seq_length": num_image_tokens,
        "image_token_index": image_token,
        "model_type": kind,
        "multimodal_projector_bias": True,
        "pad_token_id": language.get("pad_token_id"),
        "projector_hidden_act": "gelu",
        "text_config": older(language, keep_new=True),
        # Not every version looks for it in text_config.
        "tie_word_embeddings": bool(language.get("tie_word_embeddings", False)),
        "torch_dtype": language.get("dtype", language.get("torch_dtype")),
        "vision_config": older(tower, keep_new=True),
        "vision_feature_layer": layer if isinstance(layer, int) else list(layer),
        "vision_feature_select_strategy": select_strategy(manifest, tower),
    }
    if manifest.image_grid_pinpoints:
        # (height, width) there, (width, height) in LLaVA
        values["image_grid_pinpoints"] = [[height, width] for width, height in manifest.image_grid_pinpoints]
        values["use_image_newline_parameter"] = True
    return values


def select_strategy(manifest: Manifest, tower: Mapping[str, Any]) -> str:
    """Return the layout's word for mm_vision_select_feature: "default" drops one token before the patches.

    Raises ModelError where it would have to drop another number.
    """
    prefix = num_prefix_tokens(tower)
    if manifest.mm_vision_select_feature == "cls_patch" or prefix == 0:
        return "full"
    if prefix > 1:
        raise ModelError(
            f"vision tower: {tower['model_type']!r} puts {prefix} tokens before its patches, and the hub layout can "
            "drop one. It cannot be exported so; export.py bundle and original keep it."
        )
    return "default"

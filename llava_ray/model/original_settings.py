"""config.json of the original layout, from ours (see ``published_settings`` for the way back).

LLaVA's settings (``mm_projector_type``, …) stand there between the language model's. What it has no key for, the
conversation template above all, goes under one key of ours, which the original passes over.
"""

import re
from collections.abc import Mapping
from typing import Any

from llava_ray.model.hub_manifest import OUR_KEY
from llava_ray.model.manifest import Manifest
from llava_ray.model.part_configs import older

# Which of the keys are LLaVA's; the rest are the language model's.
LLAVAS = re.compile(r"(mm_|use_mm_|tune_mm_|freeze_mm_|unfreeze_mm_|image_|tokenizer_|s2$|s2_|llava_ray$)")
# What a manifest says in other words.
DESCRIBED = {
    OUR_KEY,
    "image_aspect_ratio",
    "image_grid_pinpoints",
    "mm_hidden_size",
    "mm_patch_merge_type",
    "mm_projector_type",
    "mm_use_im_patch_token",
    "mm_use_im_start_end",
    "mm_vision_select_feature",
    "mm_vision_select_layer",
    "mm_vision_tower",
    "s2",
    "s2_scales",
    "tokenizer_model_max_length",
}
TYPES = {"llama": "llava_llama", "mistral": "llava_mistral"}
CLASSES = {"llama": "LlavaLlamaForCausalLM", "mistral": "LlavaMistralForCausalLM"}


def read_kept(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of LLaVA's settings that mean nothing to us: a model that is exported again gets them back."""
    return {key: value for key, value in config.items() if LLAVAS.match(key) and key not in DESCRIBED}


def write_settings(manifest: Manifest, language: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a model whose language model is one of TYPES."""
    kind = language["model_type"]
    classes = {"architectures": [CLASSES[kind]], "model_type": TYPES[kind]}
    return dict(sorted({**older(language, keep_new=False), **write_llavas(manifest, kept), **classes}.items()))


def write_llavas(manifest: Manifest, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Return LLaVA's part of the config; ``kept`` are settings of an original that mean nothing to us."""
    values: dict[str, Any] = {
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
        **kept,
        "image_aspect_ratio": manifest.image_aspect_ratio,
        "mm_hidden_size": manifest.mm_hidden_size,
        "mm_patch_merge_type": manifest.mm_patch_merge_type,
        "mm_projector_type": manifest.mm_projector_type,
        "mm_use_im_patch_token": manifest.mm_use_im_patch_token,
        "mm_use_im_start_end": manifest.mm_use_im_start_end,
        "mm_vision_select_feature": manifest.mm_vision_select_feature,
        "mm_vision_select_layer": manifest.mm_vision_select_layer,
        "mm_vision_tower": manifest.vision_tower.base,
        "tokenizer_model_max_length": manifest.model_max_length,
        OUR_KEY: {"version": manifest.version, "training": manifest.training},
    }
    if manifest.image_grid_pinpoints:
        values["image_grid_pinpoints"] = [list(canvas) for canvas in manifest.image_grid_pinpoints]
    if manifest.s2:
        values |= {"s2": True, "s2_scales": ",".join(map(str, manifest.s2_scales))}
    return values

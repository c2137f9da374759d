"""Conversion between our settings and the original layout's config.json.

LLaVA's settings (``mm_projector_type``, …) are mixed with the language model's there. Settings without a key, such as
the conversation template, are stored under one key of ours, which the original ignores.
"""

import re
from collections.abc import Mapping
from typing import Any

from llava_ray.config.geometry import GEOMETRY_NAMES, ModelGeometry, read_addable
from llava_ray.errors import ModelError
from llava_ray.model.formats.config_values import to_tuples
from llava_ray.model.formats.manifest import Manifest
from llava_ray.model.formats.noted_settings import OUR_KEY
from llava_ray.model.formats.part_configs import to_older_config
from llava_ray.reading import short_repr

# LLaVA's keys; the rest are the language model's.
_LLAVAS = re.compile(r"(mm_|use_mm_|tune_mm_|freeze_mm_|unfreeze_mm_|image_|tokenizer_|s2$|s2_|llava_ray$)")
# What a manifest says in other words.
_DESCRIBED = {OUR_KEY, *ModelGeometry.model_fields, "s2", "mm_vision_tower", "tokenizer_model_max_length"}
TYPES = {"llama": "llava_llama", "mistral": "llava_mistral"}
_CLASSES = {"llama": "LlavaLlamaForCausalLM", "mistral": "LlavaMistralForCausalLM"}


def read_kept(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return LLaVA's settings that we do not use; they are written back on export."""
    return {key: value for key, value in config.items() if _LLAVAS.match(key) and key not in _DESCRIBED}


def write_original_settings(manifest: Manifest, language: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of a model whose language model is one of TYPES."""
    kind = language["model_type"]
    classes = {"architectures": [_CLASSES[kind]], "model_type": TYPES[kind]}
    return dict(
        sorted({**to_older_config(language, keep_new=False), **write_llava_settings(manifest, kept), **classes}.items())
    )


def write_llava_settings(manifest: Manifest, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Return LLaVA's part of the config.json; ``kept`` are settings of an original that we do not use."""
    values: dict[str, Any] = {
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
        **kept,
        **{name: value for name, value in dict(manifest).items() if name in GEOMETRY_NAMES},
        "mm_hidden_size": manifest.mm_hidden_size,
        "mm_vision_tower": manifest.vision_tower.base,
        "tokenizer_model_max_length": manifest.model_max_length,
        OUR_KEY: {"version": manifest.version, "training": manifest.training},
    }
    # The original takes what is there as asked for, and reads scales from a text.
    pinpoints, scales = values.pop("image_grid_pinpoints"), values.pop("s2_scales")
    if pinpoints:
        values["image_grid_pinpoints"] = [list(canvas) for canvas in pinpoints]
    if scales:
        values |= {"s2": True, "s2_scales": ",".join(map(str, scales))}
    return values


# The original's model types whose language model is not the rest of the name (``llava_mistral`` is Mistral's).
_ORIGINAL_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_qwen": "qwen2"}


# Keys of the original's config.json that are LLaVA's, not the language model's.
_LLAVA_KEYS = frozenset(
    {
        *GEOMETRY_NAMES,
        "freeze_mm_mlp_adapter",
        "freeze_mm_vision_resampler",
        "image_crop_resolution",
        "image_split_resolution",
        "llava_ray",
        "s2",
        "tokenizer_model_max_length",
        "tokenizer_padding_side",
        "tune_mm_mlp_adapter",
        "tune_mm_vision_resampler",
        "unfreeze_mm_vision_tower",
        "use_mm_proj",
    }
)


def is_original(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is the original's: a language model's with LLaVA's keys mixed in."""
    return "mm_vision_tower" in config or "mm_hidden_size" in config


def original_language_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the language model's config out of the original's, which mixes it with LLaVA's keys."""
    model_type = str(config.get("model_type"))
    own = {key: value for key, value in config.items() if not key.startswith("mm_") and key not in _LLAVA_KEYS}
    own.pop("architectures", None)
    return own | {"model_type": _ORIGINAL_TYPES.get(model_type, model_type.removeprefix("llava_"))}


def read_original_settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read our settings from the original's config.json, with the defaults of its code. Raises ModelError."""
    if "mm_vision_select_layer" not in config:
        raise ModelError(f"{where} has no mm_vision_select_layer; add the layer that the projector was trained on.")
    if config.get("mm_resampler_type") is not None:
        raise ModelError(
            f"{where}: mm_resampler_type is {config['mm_resampler_type']!r}; resamplers are not supported."
        )
    settings = {
        "mm_projector_type": config.get("mm_projector_type", "linear"),
        "mm_vision_select_layer": config["mm_vision_select_layer"],
        "mm_vision_select_feature": config.get("mm_vision_select_feature") or "patch",
        **read_addable(config),
        "image_aspect_ratio": config.get("image_aspect_ratio") or "square",
    }
    if settings["image_aspect_ratio"] == "anyres":
        settings["image_grid_pinpoints"] = to_tuples(config.get("image_grid_pinpoints"), where)
    if config.get("s2"):
        settings |= {"s2": True, "s2_scales": to_tuples(config.get("s2_scales", "336,672,1008"), where)}
    if length := config.get("tokenizer_model_max_length"):
        if type(length) is not int or not 0 < length <= 2**24:
            raise ModelError(
                f"{where}: tokenizer_model_max_length is {short_repr(length)}, expected a number of tokens."
            )
        settings["model_max_length"] = length
    return settings

"""Conversion between our settings and the hub layout's config.json.

The layout has a config for each part and few settings of its own. Settings without a key there are stored under one
key of ours, so that an exported model can be imported unchanged; other programs ignore it.
"""

from collections.abc import Mapping
from typing import Any

from llava_ray.errors import ModelError
from llava_ray.invocation import command
from llava_ray.model.formats.config_values import to_tuples
from llava_ray.model.formats.manifest import Manifest
from llava_ray.model.formats.noted_settings import find_noted, reconcile_settings
from llava_ray.model.formats.part_configs import num_prefix_tokens, to_older_config
from llava_ray.reading import short_repr

_CLASSES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}


def write_hub_settings(
    manifest: Manifest,
    language: Mapping[str, Any],
    tower: Mapping[str, Any],
    *,
    image_token: int,
    num_image_tokens: int,
) -> dict[str, Any]:
    """Return the config without our own key; ``language`` has the vocabulary size of the exported table."""
    kind = "llava_next" if manifest.image_aspect_ratio == "anyres" else "llava"
    layer = manifest.mm_vision_select_layer
    values: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "ignore_index": -100,
        "image_seq_length": num_image_tokens,
        "image_token_index": image_token,
        "model_type": kind,
        "multimodal_projector_bias": True,
        "pad_token_id": language.get("pad_token_id"),
        "projector_hidden_act": "gelu",
        "text_config": to_older_config(language, keep_new=True),
        # Not every version reads it from text_config.
        "tie_word_embeddings": bool(language.get("tie_word_embeddings", False)),
        "torch_dtype": language.get("dtype", language.get("torch_dtype")),
        "vision_config": to_older_config(tower, keep_new=True),
        "vision_feature_layer": layer if isinstance(layer, int) else list(layer),
        "vision_feature_select_strategy": select_strategy(manifest, tower),
    }
    if manifest.image_grid_pinpoints:
        # (height, width) there, (width, height) in LLaVA
        values["image_grid_pinpoints"] = [[height, width] for width, height in manifest.image_grid_pinpoints]
        values["use_image_newline_parameter"] = True
    return values


def select_strategy(manifest: Manifest, tower: Mapping[str, Any]) -> str:
    """Return the layout's value for mm_vision_select_feature: "default" drops one token before the patches.

    Raises ModelError where another number would have to be dropped.
    """
    prefix = num_prefix_tokens(tower)
    if manifest.mm_vision_select_feature == "cls_patch" or prefix == 0:
        return "full"
    if prefix > 1:
        raise ModelError(
            f"vision tower: {tower['model_type']!r} puts {prefix} tokens before its patches, and the hub layout can "
            f"drop one. It cannot be exported so; {command('export', 'bundle')} and {command('export', 'original')} "
            "keep it."
        )
    return "default"


_HUB_TYPES = ("llava", "llava_next")


# Values of vision_feature_select_strategy → ours; "default" drops one token, whatever it is.
_FEATURES = {"default": "patch", "full": "cls_patch"}


_FEATURES_WITHOUT_CLASS_TOKEN = {"full": "patch"}


_WITHOUT_CLASS_TOKEN = ("siglip_vision_model", "siglip2_vision_model")


_WITH_REGISTERS = ("dinov2_with_registers",)


def is_hub(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is that of transformers' own LLaVA classes."""
    return config.get("model_type") in _HUB_TYPES and "text_config" in config and "vision_config" in config


def hub_language_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the language model's config out of that of transformers' LLaVA classes."""
    return {"model_type": "llama", **config["text_config"]}


def hub_tower_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the vision tower's config out of that of transformers' LLaVA classes."""
    return {"model_type": "clip_vision_model", **config["vision_config"]}


def read_hub_settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read our settings from the config.json of transformers' LLaVA classes. Raises ModelError."""
    return noted_hub_settings(config, where)[0]


def noted_hub_settings(config: Mapping[str, Any], where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read the same settings, with notes for the user.

    Values stored by our export are used unless the file itself has been changed. Raises ModelError.
    """
    own = _own_hub_settings(config, where)
    if not (noted := find_noted(config, where).get("manifest")):
        return own, ()
    noted = {key: to_tuples(value, where) if isinstance(value, list) else value for key, value in noted.items()}
    tower = config["vision_config"].get("model_type", "clip_vision_model")
    return reconcile_settings(noted, own, config, same_features=tower in _WITHOUT_CLASS_TOKEN)


def _own_hub_settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read the settings of the file's own keys. Raises ModelError."""
    for key, only in (("projector_hidden_act", "gelu"), ("multimodal_projector_bias", True)):
        if config.get(key, only) != only:
            raise ModelError(f"{where}: {key} is {config[key]!r}; only {only!r} is supported, LLaVA's own projector.")
    settings = {
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": to_tuples(config.get("vision_feature_layer", -2), where),
        "mm_vision_select_feature": _hub_feature(config, where),
        "image_aspect_ratio": "square",
    }
    if config["model_type"] == "llava_next":
        # transformers writes (height, width) where the original writes (width, height).
        grid = to_tuples(config.get("image_grid_pinpoints") or [], where)
        settings |= {
            "image_aspect_ratio": "anyres",
            "mm_patch_merge_type": "spatial_unpad",
            "image_grid_pinpoints": _flipped(grid, where),
        }
    return settings


def _flipped(grid: Any, where: str) -> tuple[tuple[Any, Any], ...]:
    """Swap each (height, width) to (width, height). Raises ModelError for anything but pairs."""
    if not isinstance(grid, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in grid):
        raise ModelError(f"{where}: image_grid_pinpoints is {short_repr(grid)}, expected pairs of numbers; fix it.")
    return tuple((width, height) for height, width in grid)


def _hub_feature(config: Mapping[str, Any], where: str) -> str:
    tower = config["vision_config"].get("model_type", "clip_vision_model")
    strategy = config.get("vision_feature_select_strategy", "default")
    table = _FEATURES_WITHOUT_CLASS_TOKEN if tower in _WITHOUT_CLASS_TOKEN else _FEATURES
    if not isinstance(strategy, str) or strategy not in table or (tower in _WITH_REGISTERS and strategy == "default"):
        raise ModelError(
            f"{where}: vision_feature_select_strategy {short_repr(strategy)} with a tower of type {tower!r} "
            "drops a patch "
            "or keeps a register, which no setting of LLaVA's does; expected 'full'."
        )
    return table[strategy]

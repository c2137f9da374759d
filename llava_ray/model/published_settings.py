"""What the published layouts' config.json says, under our own names. No torch.

``ORIGINAL_TYPES`` and ``TEMPLATES`` are tables of what published checkpoints are and do not say themselves.
"""

from collections.abc import Mapping
from typing import Any

from llava_ray.config.literals import read_literal
from llava_ray.errors import ModelError
from llava_ray.model.hub_manifest import find_noted, reconciled
from llava_ray.reading import in_words, shown

# The original's model types whose language model is not the rest of the name (``llava_mistral`` is Mistral's).
ORIGINAL_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_qwen": "qwen2"}
HUB_TYPES = ("llava", "llava_next")

# Keys of the original's config.json that are LLaVA's, not the language model's.
LLAVA_KEYS = frozenset(
    {
        "freeze_mm_mlp_adapter",
        "freeze_mm_vision_resampler",
        "image_aspect_ratio",
        "image_crop_resolution",
        "image_grid_pinpoints",
        "image_split_resolution",
        "llava_ray",
        "s2",
        "s2_scales",
        "tokenizer_model_max_length",
        "tokenizer_padding_side",
        "tune_mm_mlp_adapter",
        "tune_mm_vision_resampler",
        "unfreeze_mm_vision_tower",
        "use_mm_proj",
    }
)

# (layout's model type, language model's type, size of its own vocabulary) -> template it was trained with.
# The original's first generation (no mm_projector_type in its config) came with too many templates to be listed.
TEMPLATES = {
    ("original", "llama", 32000): "v1",  # LLaVA-1.5, 1.6-Vicuna
    ("original", "llama", 64000): "chatml_direct",  # 1.6-34B, on Hermes-Yi
    ("original", "mistral", 32000): "mistral_instruct",  # 1.6-Mistral
    ("llava", "llama", 32000): "v1",
    ("llava_next", "llama", 32000): "v1",
    ("llava_next", "llama", 64000): "chatml_direct",
    ("llava_next", "mistral", 32000): "mistral_instruct",
}

# vision_feature_select_strategy in our words; "default" drops one token, whatever it is.
FEATURES = {"default": "patch", "full": "cls_patch"}
FEATURES_WITHOUT_CLASS_TOKEN = {"full": "patch"}
WITHOUT_CLASS_TOKEN = ("siglip_vision_model", "siglip2_vision_model")
WITH_REGISTERS = ("dinov2_with_registers",)


def is_original(config: Mapping[str, Any]) -> bool:
    """Tell whether a config.json is the original's: a language model's with LLaVA's keys among its own."""
    return "mm_vision_tower" in config or "mm_hidden_size" in config


def is_hub(config: Mapping[str, Any]) -> bool:
    """Tell whether a config.json is that of transformers' own LLaVA classes."""
    return config.get("model_type") in HUB_TYPES and "text_config" in config and "vision_config" in config


def original_language_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the language model's config out of the original's, which mixes it with LLaVA's keys."""
    model_type = str(config.get("model_type"))
    own = {key: value for key, value in config.items() if not key.startswith("mm_") and key not in LLAVA_KEYS}
    own.pop("architectures", None)
    return own | {"model_type": ORIGINAL_TYPES.get(model_type, model_type.removeprefix("llava_"))}


def hub_language_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the language model's config out of that of transformers' LLaVA classes."""
    return {"model_type": "llama", **config["text_config"]}


def hub_tower_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the vision tower's config out of that of transformers' LLaVA classes."""
    return {"model_type": "clip_vision_model", **config["vision_config"]}


def original_settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the settings in the original's config.json, with the defaults of its code. Raises ModelError."""
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
        "mm_patch_merge_type": config.get("mm_patch_merge_type") or "flat",
        "mm_use_im_start_end": bool(config.get("mm_use_im_start_end")),
        "mm_use_im_patch_token": bool(config.get("mm_use_im_patch_token")),
        "image_aspect_ratio": config.get("image_aspect_ratio") or "square",
    }
    if settings["image_aspect_ratio"] == "anyres":
        settings["image_grid_pinpoints"] = listed(config.get("image_grid_pinpoints"), where)
    if config.get("s2"):
        settings |= {"s2": True, "s2_scales": listed(config.get("s2_scales", "336,672,1008"), where)}
    if length := config.get("tokenizer_model_max_length"):
        if type(length) is not int or not 0 < length <= 2**24:
            raise ModelError(f"{where}: tokenizer_model_max_length is {shown(length)}, expected a number of tokens.")
        settings["model_max_length"] = length
    return settings


def hub_settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the settings in the config.json of transformers' LLaVA classes. Raises ModelError."""
    return noted_hub_settings(config, where)[0]


def noted_hub_settings(config: Mapping[str, Any], where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the same settings, and what has to be said of them.

    What an export of ours noted counts where the file itself says nothing else. Raises ModelError.
    """
    own = own_hub_settings(config, where)
    if not (noted := find_noted(config, where).get("manifest")):
        return own, ()
    noted = {key: listed(value, where) if isinstance(value, list) else value for key, value in noted.items()}
    tower = config["vision_config"].get("model_type", "clip_vision_model")
    return reconciled(noted, own, config, same_features=tower in WITHOUT_CLASS_TOKEN)


def own_hub_settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the settings that the file has by itself. Raises ModelError."""
    for key, only in (("projector_hidden_act", "gelu"), ("multimodal_projector_bias", True)):
        if config.get(key, only) != only:
            raise ModelError(f"{where}: {key} is {config[key]!r}; only {only!r} is supported, LLaVA's own projector.")
    settings = {
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": listed(config.get("vision_feature_layer", -2), where),
        "mm_vision_select_feature": _hub_feature(config, where),
        "image_aspect_ratio": "square",
    }
    if config["model_type"] == "llava_next":
        # transformers writes (height, width) where the original writes (width, height).
        grid = listed(config.get("image_grid_pinpoints") or [], where)
        settings |= {
            "image_aspect_ratio": "anyres",
            "mm_patch_merge_type": "spatial_unpad",
            "image_grid_pinpoints": _flipped(grid, where),
        }
    return settings


def find_version(config: Mapping[str, Any], language_config: Mapping[str, Any]) -> str | None:
    """Return the template that a published checkpoint says or is known to be trained with; None if neither."""
    noted = find_noted(config, "config.json")
    if version := noted.get("version") or noted.get("manifest", {}).get("version"):
        return str(version)
    hub = is_hub(config)
    if not hub and "mm_projector_type" not in config:
        return None
    # The converter to the hub's layout put <image> right behind the language model's own tokens.
    vocabulary = config.get("image_token_index") if hub else language_config.get("vocab_size")
    family = config["model_type"] if hub else "original"
    return TEMPLATES.get((family, str(language_config.get("model_type")), vocabulary or 0))


def listed(value: Any, where: str) -> Any:
    """Return lists as tuples, also those that a config holds as text ("[(336, 672)]", "336,672"). Raises ModelError."""
    if isinstance(value, str):
        with in_words(f"{where}: {shown(value)}", "Mend it.", says="is no list of numbers"):
            value = read_literal(value)
    return tuple(listed(item, where) for item in value) if isinstance(value, list | tuple) else value


def _flipped(grid: Any, where: str) -> tuple[tuple[Any, Any], ...]:
    """Return (width, height) of each (height, width). Raises ModelError for what are no pairs."""
    if not isinstance(grid, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in grid):
        raise ModelError(f"{where}: image_grid_pinpoints is {shown(grid)}, expected pairs of numbers; mend it.")
    return tuple((width, height) for height, width in grid)


def _hub_feature(config: Mapping[str, Any], where: str) -> str:
    tower = config["vision_config"].get("model_type", "clip_vision_model")
    strategy = config.get("vision_feature_select_strategy", "default")
    table = FEATURES_WITHOUT_CLASS_TOKEN if tower in WITHOUT_CLASS_TOKEN else FEATURES
    if not isinstance(strategy, str) or strategy not in table or (tower in WITH_REGISTERS and strategy == "default"):
        raise ModelError(
            f"{where}: vision_feature_select_strategy {shown(strategy)} with a tower of type {tower!r} drops a patch "
            "or keeps a register, which no setting of LLaVA's does; expected 'full'."
        )
    return table[strategy]

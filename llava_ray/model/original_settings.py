"""config.json of the original layout, from and to ours.

LLaVA's settings (``mm_projector_type``, …) stand there between the language model's. What it has no key for, the
conversation template above all, goes under one key of ours, which the original passes over.
"""

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_ray.errors import ModelError
from llava_ray.model.manifest import Manifest, Part
from llava_ray.model.part_configs import complete, older

OUR_KEY = "llava_ray"
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
DEFAULT_SCALES = "336,672,1008"
LANGUAGE_CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}


def is_original(config: Mapping[str, Any]) -> bool:
    """Tell whether a config.json is that of a model in the original layout."""
    return "text_config" not in config and not config.keys().isdisjoint({"mm_projector_type", "mm_vision_tower"})


def read_language_config(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the language model's part of the config. Raises ModelError for an unknown model_type."""
    file = folder / "config.json"
    kind = _language_type(file, config)
    language = {key: value for key, value in config.items() if not LLAVAS.match(key) and key != "transformers_version"}
    return complete({**language, "model_type": kind, "architectures": [LANGUAGE_CLASSES[kind]]}, str(file))


def read_kept(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of LLaVA's settings that mean nothing to us: a model that is exported again gets them back."""
    return {key: value for key, value in config.items() if LLAVAS.match(key) and key not in DESCRIBED}


def read_manifest(folder: Path, config: Mapping[str, Any], version: str | None) -> Manifest:
    """Describe a model from its config. Raises ModelError for a key that is missing or has an unknown value."""
    file = folder / "config.json"
    own: Mapping[str, Any] = config.get(OUR_KEY, {})
    version = version or own.get("version")
    if version is None:
        raise ModelError(
            f"{folder} is in the original layout, which does not record its conversation template; name it with "
            "--version (v1 for LLaVA-1.5 and 1.6-Vicuna, mistral_instruct for 1.6-Mistral, chatml_direct for 1.6-34B)."
        )
    try:
        return Manifest(
            version=version,
            mm_projector_type=config.get("mm_projector_type", "linear"),
            mm_hidden_size=config["mm_hidden_size"],
            hidden_size=config["hidden_size"],
            mm_vision_select_layer=config["mm_vision_select_layer"],
            mm_vision_select_feature=config.get("mm_vision_select_feature", "patch"),
            mm_patch_merge_type=config.get("mm_patch_merge_type", "flat"),
            image_aspect_ratio=config.get("image_aspect_ratio") or "square",
            image_grid_pinpoints=_listed(config.get("image_grid_pinpoints")) or (),
            s2_scales=_listed(config.get("s2_scales", DEFAULT_SCALES)) if config.get("s2") else (),
            mm_use_im_start_end=config.get("mm_use_im_start_end", False),
            mm_use_im_patch_token=config.get("mm_use_im_patch_token", False),
            model_max_length=config.get("tokenizer_model_max_length", 2048),
            language_model=Part(inside=True, base=config.get("_name_or_path") or str(folder.resolve()), fingerprint=""),
            vision_tower=Part(inside=True, base=config.get("mm_vision_tower") or "", fingerprint=""),
            training=own.get("training", {}),
        )
    except KeyError as error:
        raise ModelError(f"{file} lacks {error.args[0]}, which LLaVA's training writes; copy it again.") from error
    except ValueError as error:
        raise ModelError(f"{file} cannot be read as LLaVA's: {error}") from error


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


def _language_type(file: Path, config: Mapping[str, Any]) -> str:
    by_type = {ours: kind for kind, ours in TYPES.items()}
    by_class = {ours: kind for kind, ours in CLASSES.items()}  # the published configs call themselves "llava"
    kind = by_type.get(config.get("model_type", "")) or by_class.get((config.get("architectures") or [""])[0])
    if kind is None:
        raise ModelError(
            f"{file}: model_type is {config.get('model_type')!r} and architectures {config.get('architectures')}; "
            f"expected one of {', '.join(by_type)}, as LLaVA writes."
        )
    return kind


def _listed(value: Any) -> Any:
    # Written down as text in some configs: "[(336, 672), ...]", "336,672,1008".
    return ast.literal_eval(value) if isinstance(value, str) else value

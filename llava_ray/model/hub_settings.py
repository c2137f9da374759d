"""config.json of the hub layout, from and to ours.

The layout has a config for each part and few settings of its own. All that it has no key for stands under one key of
ours, so that a model we exported comes back as it was; other programs pass over it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llava_ray.errors import ModelError
from llava_ray.model.hub_processor import read_preprocessor
from llava_ray.model.manifest import Manifest, Part
from llava_ray.model.part_configs import build, num_prefix_tokens, older, overlaid, values_of

OUR_KEY = "llava_ray"
CLASSES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}


@dataclass(frozen=True)
class HubSettings:
    """What a config says. ``num_rows`` is the vocabulary without rows that the layout adds.

    ``preprocessor`` is the tower's own image processor. ``kept`` and ``noted_template`` are what we noted of a model
    that we exported ourselves (see ``ModelFiles``).
    """

    manifest: Manifest
    language_config: dict[str, Any]
    tower_config: dict[str, Any]
    num_rows: int
    preprocessor: dict[str, Any]
    kept: dict[str, Any]
    noted_template: tuple[str | None, ...]


def is_hub(config: Mapping[str, Any]) -> bool:
    """Tell whether a config.json is that of a model in the hub layout."""
    return config.get("model_type") in CLASSES and {"text_config", "vision_config"} <= config.keys()


def read_settings(
    folder: Path, config: Mapping[str, Any], preprocessor: Mapping[str, Any], version: str | None
) -> HubSettings:
    """Describe a model from its files. Raises ModelError for what is missing or cannot be a LLaVA."""
    file = folder / "config.json"
    whole: Any = build({key: value for key, value in config.items() if key != OUR_KEY}, str(file))
    language = overlaid(values_of(whole.text_config), config["text_config"])
    tower = overlaid(values_of(whole.vision_config), config["vision_config"])
    activation, has_bias = config.get("projector_hidden_act", "gelu"), config.get("multimodal_projector_bias", True)
    if activation != "gelu" or not has_bias:
        raise ModelError(
            f"{file}: the projector has projector_hidden_act {activation!r} and multimodal_projector_bias {has_bias}; "
            "expected 'gelu' and true, as LLaVA's."
        )
    template: tuple[str | None, ...] = ()
    if own := config.get(OUR_KEY):
        try:
            manifest = Manifest.model_validate(own["manifest"])
            num_rows, preprocessor, kept = int(own["num_rows"]), own["preprocessor"], own["kept"]
            template = (own["chat_template"],)
        except (KeyError, TypeError, ValidationError) as error:
            raise ModelError(f"{file}: what stands under {OUR_KEY!r} was edited ({error}); export again.") from error
        manifest = manifest if version is None else manifest.model_copy(update={"version": version})
    else:
        aspect_ratio = "pad" if preprocessor.get("do_pad") else "square"
        manifest = _describe(file, config, (language, tower), version, aspect_ratio)
        # The converter adds <image> and what follows it after the language model's own rows.
        num_rows = min(language["vocab_size"], config.get("image_token_index", 32000))
        preprocessor, kept = read_preprocessor(preprocessor), {}
    language["vocab_size"] = num_rows
    return HubSettings(manifest, language, tower, num_rows, dict(preprocessor), kept, template)


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


def _describe(
    file: Path,
    config: Mapping[str, Any],
    parts: tuple[Mapping[str, Any], Mapping[str, Any]],
    version: str | None,
    aspect_ratio: str,
) -> Manifest:
    """Describe a model that we did not export; ``parts`` are the configs of language model and tower."""
    language, tower = parts
    if version is None:
        raise ModelError(
            f"{file.parent} is in the hub layout, which does not record LLaVA's conversation template; name it with "
            "--version (v1 for LLaVA-1.5, chat_template for the tokenizer's own)."
        )
    layer = config.get("vision_feature_layer", -2)
    canvases = config.get("image_grid_pinpoints") if config["model_type"] == "llava_next" else None
    strategy, prefix = config.get("vision_feature_select_strategy", "default"), num_prefix_tokens(tower)
    if strategy not in ("default", "full") or (strategy == "default" and prefix != 1):
        raise ModelError(
            f"{file}: vision_feature_select_strategy is {strategy!r} with a tower that has {prefix} tokens before its "
            "patches; expected 'full', or 'default' (which drops one token) where there is one."
        )
    return Manifest(
        version=version,
        mm_projector_type="mlp2x_gelu",
        mm_hidden_size=tower["hidden_size"] * (1 if isinstance(layer, int) else len(layer)),
        hidden_size=language["hidden_size"],
        mm_vision_select_layer=layer if isinstance(layer, int) else tuple(layer),
        mm_vision_select_feature="cls_patch" if strategy == "full" and prefix else "patch",
        mm_patch_merge_type="spatial_unpad" if canvases else "flat",
        image_aspect_ratio="anyres" if canvases else aspect_ratio,
        image_grid_pinpoints=tuple((width, height) for height, width in canvases or ()),
        model_max_length=min(language.get("max_position_embeddings", 2048), 4096),
        language_model=Part(inside=True, base=language.get("_name_or_path") or str(file.parent), fingerprint=""),
        vision_tower=Part(inside=True, base=tower.get("_name_or_path") or str(file.parent), fingerprint=""),
    )

"""Configs of a model's parts as plain values: complete, and readable by older programs.

transformers is imported where it is used: layouts are read without it.
"""

import json
from collections.abc import Mapping
from typing import Any

from llava_ray.model.formats.declared_sizes import check_declared
from llava_ray.model.network.tower_families import WITH_TEXT_PART, find_family
from llava_ray.reading import short_repr, wrap_errors


def fill_defaults(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a part's config with transformers' defaults filled in. Raises ModelError that names ``where``."""
    return _merge_defaults(values_of(build_config(config, where)), config)


def vision_part(tower: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tower's config; of a whole image-and-text model, that of its vision part."""
    kind = tower.get("model_type")
    if kind not in WITH_TEXT_PART:
        return dict(tower)
    return {"model_type": f"{kind}_vision_model", **tower.get("vision_config", {})}


def _merge_defaults(defaults: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Merge ``defaults`` into ``config``, under the keys of transformers 5."""
    values = {**defaults, **config}
    values.pop("transformers_version", None)
    if (dtype := values.pop("torch_dtype", None)) is not None:
        values["dtype"] = dtype
    if "rope_parameters" in defaults:  # replaces the older keys
        values["rope_parameters"] = defaults["rope_parameters"]
        for key in ("rope_theta", "rope_scaling"):
            values.pop(key, None)
    return values


def build_config(config: Mapping[str, Any], where: str) -> Any:
    """Make transformers' object of a config. Raises ModelError that names ``where`` for an unknown type."""
    from transformers import AutoConfig

    check_declared(config, where)
    auto: Any = AutoConfig  # untyped in transformers
    kind = short_repr(config.get("model_type"))
    remedy = f"Expected a config (this one is of type {kind}) that the installed transformers knows; copy it again."
    with wrap_errors(where, remedy):
        return auto.for_model(**config)


def values_of(config: Any) -> dict[str, Any]:
    """Return a config as its config.json would hold it."""
    values: dict[str, Any] = json.loads(config.to_json_string())
    values.pop("transformers_version", None)
    return values


def num_prefix_tokens(tower: Mapping[str, Any]) -> int:
    """Count the tokens that a tower puts before its patches. Raises ModelError for an unknown kind."""
    config = build_config(tower, "the vision tower")
    return find_family(config).num_prefix_tokens(config)


def to_older_config(config: Mapping[str, Any], *, keep_new: bool) -> dict[str, Any]:
    """Convert a part's config for older programs: transformers 4.3x, or with ``keep_new`` 4.4x and vLLM.

    Without ``rope_theta`` they would use 10,000 in silence. ``keep_new`` keeps ``rope_parameters`` as well.
    """
    values = dict(config)
    if "dtype" in values:
        values["torch_dtype"] = values.pop("dtype")
    rope = values.get("rope_parameters") or {}
    if "rope_type" not in rope:  # none, or one per type of layer, which older programs do not support
        return values
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type", "type")}
    values["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in scaling:
        values["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
    is_scaled = rope["rope_type"] != "default"
    if keep_new:
        return values | ({"rope_scaling": {"rope_type": rope["rope_type"], **scaling}} if is_scaled else {})
    del values["rope_parameters"]
    return values | {"rope_scaling": {"type": rope["rope_type"], **scaling} if is_scaled else None}

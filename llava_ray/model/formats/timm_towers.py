"""Folders of timm's towers, as ``timm.models.save_for_hf`` writes them: config.json and model.safetensors."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Resampling
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil

from llava_ray.errors import BundleError, ModelError
from llava_ray.model.formats.declared_sizes import check_declared
from llava_ray.model.formats.layout import CONFIG
from llava_ray.model.formats.preprocessor import check_preprocessor
from llava_ray.model.formats.sources import Source
from llava_ray.model.network.timm_tower import TimmConfig, build_timm, make_timm_config
from llava_ray.model.tensors.tensor_reading import read_tensors
from llava_ray.reading import short_repr

_WEIGHTS = "model.safetensors"
_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


def read_timm_config(values: Mapping[str, Any], folder: Path) -> TimmConfig:
    """Read a timm tower's config.json. Raises ModelError."""
    where = f"{folder / CONFIG}"
    check_declared(values, where)
    return make_timm_config(values, where)


def load_timm(config: TimmConfig, source: Source, dtype: torch.dtype) -> nn.Module:
    """Load a timm tower of exactly the source's tensors. Raises ModelError that names the first odd one."""
    values, where = config.timm or {}, f"the vision tower in {source.folder}"
    with torch.device("meta"):
        skeleton: nn.Module = build_timm(values, where)
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in source.tensors.items()}
    if expected != found:
        name = min(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ModelError(
            f"{where}: {name} is {found.get(name, 'not there')}, expected {expected.get(name, 'no such tensor')} of "
            "its config.json. These are not one model's files."
        )
    model: nn.Module = build_timm(values, where).to(dtype)
    model.load_state_dict(read_tensors(source.tensors))
    model.config = config  # type: ignore[assignment]
    return model


def save_timm(folder: Path, config: TimmConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a timm tower as timm itself does. Raises BundleError for tensors that are not the whole tower."""
    with torch.device("meta"):
        skeleton: nn.Module = build_timm(config.timm or {}, str(folder))
    expected = skeleton.state_dict().keys()
    if odd := sorted(expected ^ tensors.keys()):
        raise BundleError(f"{len(odd)} tensors are not those of the tower, the first is {odd[0]}.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config.timm, indent=2) + "\n")
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, folder / _WEIGHTS, {"format": "pt"})


def make_timm_processor(values: Mapping[str, Any], where: str) -> CLIPImageProcessorPil:
    """Make the image processor that timm's own evaluation transform is: resize, then a centre crop.

    Raises ModelError for settings that it cannot express.
    """
    given = values["pretrained_cfg"]
    size, crop, mode = given.get("input_size"), given.get("crop_pct", 0.875), given.get("crop_mode", "center")
    resample = given.get("interpolation", "bicubic")
    if not isinstance(size, list | tuple) or len(size) != 3 or size[0] != 3 or size[1] != size[2]:
        raise _unfit(where, "input_size", size, "3 channels and a square, such as [3, 224, 224]")
    if type(crop) not in (int, float) or not 0.01 <= crop <= 1:
        raise _unfit(where, "crop_pct", crop, "a share from 0.01 to 1")
    if mode not in ("center", "squash"):
        raise _unfit(where, "crop_mode", mode, "'center' or 'squash'")
    if resample not in _FILTERS:
        raise _unfit(where, "interpolation", resample, f"one of {', '.join(_FILTERS)}")
    crop_size = {"height": size[1], "width": size[2]}
    check_preprocessor({"crop_size": crop_size}, where)
    scaled = math.floor(size[1] / crop)
    settings = {
        "size": {"shortest_edge": scaled} if mode == "center" else {"height": scaled, "width": scaled},
        "crop_size": crop_size,
        "resample": Resampling[resample.upper()],
        "image_mean": given.get("mean"),
        "image_std": given.get("std"),
    }
    for key in ("image_mean", "image_std"):
        if settings[key] is None:
            raise _unfit(where, key.removeprefix("image_"), None, "three numbers")
    check_preprocessor(settings, where)
    return CLIPImageProcessorPil(**settings)


def _unfit(where: str, key: str, value: object, expected: str) -> ModelError:
    return ModelError(f"{where}: pretrained_cfg.{key} is {short_repr(value)}, expected {expected}; fix it.")

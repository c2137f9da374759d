"""Conversion of a LLaVA for vLLM: the hub layout, and adapters with its names, exported once to a cache folder."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llava_ray.errors import ModelError
from llava_ray.generate.decoding import Stops, find_stops
from llava_ray.generate.served_adapters import find_adapter, read_beside
from llava_ray.invocation import command
from llava_ray.model.blueprint import Blueprint, read_blueprint
from llava_ray.model.formats.hub.write import export_hub
from llava_ray.model.formats.layout import ADAPTER_CONFIG, ADAPTER_FILE, CONFIG, Layout, LayoutKind
from llava_ray.model.formats.made_once import make_once
from llava_ray.model.formats.manifest import fingerprint_weights
from llava_ray.model.formats.model_opening import open_model
from llava_ray.model.formats.names import IMAGE_NEWLINE
from llava_ray.model.formats.original.names import PEFT_PREFIX
from llava_ray.model.formats.part_sources import find_layout
from llava_ray.model.loading import aspect_ratio, pretrained_config
from llava_ray.model.lora.adapter_files import AdapterFiles, read_adapter
from llava_ray.model.lora.adapters import check_base
from llava_ray.model.tensors.tensor_files import read_json_object
from llava_ray.model.tensors.tensor_reading import read_tensors

_EXPORT = 1  # increase it when exports change: older folders are then written again
_INNER, _HUB_INNER = "model.", "model.language_model."  # a language model's own tensors, and those inside a LLaVA


@dataclass(frozen=True)
class VllmAdapter:
    """An adapter in peft's files with vLLM's names."""

    name: str
    folder: Path
    rank: int
    blueprint: Blueprint
    """The base's, with the adapter's own template."""


@dataclass(frozen=True)
class VllmModel:
    """A folder in the hub layout, with the model's properties that vLLM does not read."""

    folder: Path
    blueprint: Blueprint
    stops: Stops
    image_token: int
    adapters: tuple[VllmAdapter, ...] = ()


def prepare_model(path: str | Path, cache_dir: str | Path, adapters: Mapping[str, str | Path]) -> VllmModel:
    """Return a model and its adapters for vLLM; export those in other layouts to ``cache_dir`` once.

    Raises ModelError, naming the part, for a model that vLLM cannot serve.
    """
    cache = Path(cache_dir).expanduser()
    _, layout = find_layout(str(path), weights=True)
    blueprint = read_blueprint(pretrained_config(layout, layout.folder), aspect_ratio(layout), weights=True)
    folder = layout.folder if layout.kind is LayoutKind.HUB else _exported(layout, cache)
    generation = (
        read_json_object(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    )
    config = read_json_object(folder / CONFIG)
    return VllmModel(
        folder,
        blueprint,
        find_stops(blueprint, generation.get("eos_token_id")),
        int(config["image_token_index"] if "image_token_index" in config else config["image_token_id"]),
        tuple(prepare_adapter(blueprint, name, place, cache) for name, place in adapters.items()),
    )


def _exported(layout: Layout, cache_dir: Path) -> Path:
    """Return a model's export to the hub layout, written now or earlier. Raises ModelError."""
    sources = {"folder": str(layout.folder), "files": _file_list(layout.folder), "export": _EXPORT}

    def write(new: Path) -> None:
        export_hub(open_model(layout.folder), new)

    place = cache_dir / f"{layout.folder.name}-{_digest(sources)}"
    return make_once(place, sources, write).path


def prepare_adapter(base: Blueprint, name: str, place: str | Path, cache_dir: str | Path) -> VllmAdapter:
    """Return an adapter for ``base``, its tensors renamed as those inside a LLaVA. Raises ModelError."""
    layout, is_pefts = find_adapter(name, place)
    own = base if is_pefts else read_beside(base, name, layout)
    if not is_pefts:
        _check_projector(base, layout, name)
    assert layout.adapter is not None
    files = read_adapter(layout.adapter)
    check_base(files, base.manifest.language_model.fingerprint if base.manifest else None)
    _check_plain(files, name)
    _check_shapes(base.layout, files, name)
    sources = {"adapter": fingerprint_weights(files.folder), "export": _EXPORT}
    plain = re.sub(r"[^\w-]", "-", name)  # a name may be a path for others, here it is part of one
    folder = Path(cache_dir).expanduser() / f"{plain}-{_digest(sources)}"
    folder = make_once(folder, sources, lambda new: _write_adapter(files, new)).path
    return VllmAdapter(name, folder, int(files.config.r), own)


def _check_projector(base: Blueprint, layout: Layout, name: str) -> None:
    """Check that an adapter has the base's projector. Raises ModelError."""
    for part in ("projector", IMAGE_NEWLINE):
        mine, shared = (
            read_tensors({key: tensor for key, tensor in of.tensors.items() if key.partition(".")[0] == part})
            for of in (layout, base.layout)
        )
        if mine.keys() != shared.keys() or not all(torch.equal(mine[key].float(), shared[key].float()) for key in mine):
            raise ModelError(
                f"adapter {name!r} ({layout.folder}) has its own {part}, and vLLM supports one for all. Serve it "
                f"with engine=builtin, or merge it ({command('export', 'merge')}) and put it into model=."
            )


def _check_plain(files: AdapterFiles, name: str) -> None:
    """Check that an adapter has no settings that vLLM does not support. Raises ModelError."""
    for setting, plain in {"use_dora": False, "bias": "none", "lora_bias": False, "rank_pattern": {}}.items():
        found = getattr(files.config, setting)
        if found != plain:
            raise ModelError(
                f"adapter {name!r} ({files.folder}) has {setting} = {found!r}; vLLM expects {plain!r}. Serve it with "
                f"engine=builtin, or merge it ({command('export', 'merge')}) and put it into model=."
            )


def _check_shapes(base: Layout, files: AdapterFiles, name: str) -> None:
    """Check that an adapter's matrices fit the base's, where it holds them. Raises ModelError.

    vLLM would find out in the middle of a step, and end with all its requests.
    """
    weights = base.part("language_model")
    for key, tensor in files.tensors.items():
        layer, _, kind = key.removesuffix(".weight").rpartition(".")
        weight = weights.get(f"{layer}.weight")
        if not weights or kind not in ("lora_A", "lora_B"):
            continue
        expected = None if weight is None else weight.shape[1] if kind == "lora_A" else weight.shape[0]
        found = tensor.shape[1] if kind == "lora_A" else tensor.shape[0]
        if found != expected:
            raise ModelError(
                f"adapter {name!r} ({files.folder}) does not fit the language model: {key} is {found} wide, expected "
                f"{expected or 'no such layer'}. It was trained over {files.base or 'another model'}."
            )


def _write_adapter(files: AdapterFiles, new: Path) -> None:
    """Write an adapter's files with the names of a language model inside a LLaVA."""
    hub_names = {n: _HUB_INNER + n.removeprefix(_INNER) if n.startswith(_INNER) else n for n in files.tensors}
    named = {f"{PEFT_PREFIX}{hub_names[name]}": tensor.contiguous() for name, tensor in files.tensors.items()}
    save_file(named, new / ADAPTER_FILE, metadata={"format": "pt"})
    (new / ADAPTER_CONFIG).write_text((files.folder / ADAPTER_CONFIG).read_text())


def _file_list(folder: Path) -> list[list[Any]]:
    """Return name, size and modification time of all files below a folder, on which an export depends."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [[str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _digest(sources: Mapping[str, Any]) -> str:
    """Return a short hash of the sources of an export."""
    return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:12]

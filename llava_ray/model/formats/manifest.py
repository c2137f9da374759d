"""The manifest of a bundle, llava.json; nothing is ever inferred from a folder's name."""

import functools
import hashlib
import os
import platform
from collections.abc import Callable
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llava_ray.config.geometry import ModelGeometry, PositiveCount
from llava_ray.config.lora import Quantization
from llava_ray.errors import BundleError
from llava_ray.reading import MAX_SHOWN, is_file, is_folder, read_bounded

MANIFEST_FILE = "llava.json"
_BUNDLE_VERSION: Literal[1] = 1
_EDGE_BYTES = 2**20
_MAX_FAULTS = 10
_MAX_BYTES = 16 * 2**20
# Not our own: sent to a cluster as a working directory it has no installed version; format_version says enough.
_LIBRARIES = ("torch", "transformers", "safetensors")


class ManifestPart(BaseModel):
    """A model that the bundle holds (``inside``) or was trained from and needs."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    inside: bool
    """Whether the weights are in the bundle."""
    base: str
    """Hub id or folder: where the weights are, or what they were tuned from if they are inside. Absolute in memory; in
    the file the way from the bundle's own folder, so that a project that is copied or moved finds its own."""
    fingerprint: str
    """Fingerprint of the weight files, inside or in ``base``."""


class _FileVersion(BaseModel):
    """What stands first in llava.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    format_version: Literal[1] = _BUNDLE_VERSION
    """Version of this file's format."""
    version: str
    """Conversation template that the model was last trained with."""


class Manifest(ModelGeometry, _FileVersion):
    """The contents of llava.json."""

    model_max_length: PositiveCount
    """Longest sample in training, in tokens."""
    language_model: ManifestPart
    """Where the language model is."""
    vision_tower: ManifestPart
    """Where the vision tower is."""
    adapter: str | None = None
    """Fingerprint of the LoRA adapter in adapter/; None without one."""
    quantization: Quantization | None = None
    """Quantisation of the language model during training; None for none."""
    libraries: dict[str, str] = Field(default_factory=dict)
    """Versions that wrote the bundle."""
    training: dict[str, Any] = {}
    """Origin of the weights: run name, step, data hash."""


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that write a bundle."""
    return {"python": platform.python_version()} | {name: _find_version(name) for name in _LIBRARIES}


_find_version = functools.cache(installed_version)  # it parses a package's whole metadata each time


def is_bundle(folder: Path) -> bool:
    """Return whether a folder is a llava_ray bundle."""
    return is_file(folder / MANIFEST_FILE)


def read_manifest(folder: Path) -> Manifest:
    """Read and check a bundle's llava.json. Raises BundleError that names the file and what is wrong in it."""
    file = folder / MANIFEST_FILE
    try:
        manifest = Manifest.model_validate_json(read_bounded(file, _MAX_BYTES, BundleError))
        return with_bases(manifest, lambda base: absolute_base(base, folder))
    except OSError as error:
        raise BundleError(f"{folder} is no llava_ray bundle: {file} cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        raise BundleError(
            f"{file} is not a manifest of format {_BUNDLE_VERSION}: {faults_of(error)}. It was edited, or written by "
            "another version of llava_ray: save the bundle again with that version, or fix the file."
        ) from error


def write_manifest(new: Path, manifest: Manifest, place: str | Path) -> None:
    """Write llava.json into the folder ``new``, which will be moved to ``place``: no path in it is absolute.

    Only from a ``place`` that is a URL there is no way to a local folder, which is then named as it is.
    """
    written = with_bases(manifest, lambda base: relative_base(base, place))
    (new / MANIFEST_FILE).write_text(written.model_dump_json(indent=2) + "\n")


def with_bases(manifest: Manifest, change: Callable[[str], str]) -> Manifest:
    """Return a manifest with the base of each part changed."""
    parts = {"language_model": manifest.language_model, "vision_tower": manifest.vision_tower}
    changed = {key: part.model_copy(update={"base": change(part.base)}) for key, part in parts.items()}
    return manifest.model_copy(update=changed)


def relative_base(base: str, place: str | Path) -> str:
    """Return an absolute folder as a path relative to ``place``, beginning with a dot; hub ids unchanged."""
    if not Path(base).is_absolute() or "://" in str(place):
        return base
    way = os.path.relpath(base, Path(place).resolve())
    return way if way.startswith("..") else f"./{way}"


def absolute_base(base: str, place: Path) -> str:
    """Resolve a base relative to ``place``; hub ids and absolute folders are returned unchanged.

    Where nothing is there, as when a bundle was copied alone, the end of the way is looked for above ``place``. That it
    is the right one is seen by its fingerprint.
    """
    if not base.startswith(("./", "../")):
        return base
    place = place.resolve()
    written = os.path.normpath(place / base)
    end = "/".join(part for part in base.split("/") if part not in ("", ".", ".."))
    found = (str(above / end) for above in place.parents if end and is_folder(above / end))
    return written if is_folder(Path(written)) else next(found, written)


def faults_of(error: ValidationError) -> str:
    """Format the faults of a manifest, key by key; the first few of many."""
    faults = [f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}" for fault in error.errors()[:_MAX_FAULTS]]
    more = f"; and {error.error_count() - _MAX_FAULTS} more" if error.error_count() > _MAX_FAULTS else ""
    return "; ".join(fault if len(fault) <= MAX_SHOWN else f"{fault[:MAX_SHOWN]}…" for fault in faults) + more


def fingerprint_weights(folder: Path) -> str:
    """Return the sha256 over name, size and the first and last MiB of each weight file in ``folder``.

    Cheap for any size, and different whenever training has changed the weights. Raises BundleError if there are none.
    """
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise BundleError(
            f"{folder} holds no weights; expected *.safetensors or pytorch_model*.bin. Point at the folder that does."
        )
    digest = hashlib.sha256()
    for file in files:
        if not is_file(file):  # a link to a device would be read for ever
            raise BundleError(f"{file} is not an ordinary file; expected weights. Copy the folder anew.")
        digest.update(f"{file.name} {file.stat().st_size} {edges_of(file)}\n".encode())
    return digest.hexdigest()


def edges_of(file: Path) -> str:
    """Return the sha256 of a file's first and last MiB."""
    with file.open("rb") as stream:
        edges = hashlib.sha256(stream.read(_EDGE_BYTES))
        stream.seek(max(0, file.stat().st_size - _EDGE_BYTES))
        edges.update(stream.read(_EDGE_BYTES))
    return edges.hexdigest()


def check_fingerprint(folder: Path, expected: str, part: str) -> None:
    """Raise BundleError if the weights in ``folder`` are not those that the bundle was made with."""
    found = fingerprint_weights(folder)
    if found != expected:
        raise BundleError(
            f"the {part} in {folder} is not the one that the bundle was made with (fingerprint {found[:12]}, expected "
            f"{expected[:12]}); its projector would answer nonsense. Point at the right base."
        )

"""The metadata of a delta (delta.json), checked against the tensors of the delta and its base."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from llava_ray.errors import ModelError
from llava_ray.model.formats.manifest import faults_of
from llava_ray.model.tensors.tensor_files import read_json_object
from llava_ray.model.tensors.tensor_reading import BITS
from llava_ray.model.tensors.weight_files import DTYPE_NAMES, INDEX_FILE, SINGLE_FILE, Stored, read_folder
from llava_ray.reading import short_repr

DELTA_FILE = "delta.json"
DELTA_VERSION = 1
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPE_NAMES}
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", INDEX_FILE, "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Base:
    """The base of a delta: a language model."""

    folder: Path
    tensors: Mapping[str, Stored]
    fingerprint: str


class Place(BaseModel):
    """The entry of a folder with weights: which tensors are differences, and the hash of each restored tensor."""

    model_config = ConfigDict(strict=True)

    tensors: dict[str, str]
    dtypes: dict[str, str]
    sha256: dict[str, str]


class DeltaNote(BaseModel):
    """The contents of delta.json."""

    model_config = ConfigDict(strict=True)

    base: str
    base_fingerprint: str
    places: dict[str, Place]


def read_note(file: Path) -> DeltaNote:
    """Read delta.json. Raises ModelError that names the key."""
    values = read_json_object(file)
    if values.get("format_version") != DELTA_VERSION:
        raise ModelError(f"{file} is of format {short_repr(values.get('format_version'))}, expected {DELTA_VERSION}.")
    try:
        return DeltaNote.model_validate(values)
    except ValidationError as error:
        raise ModelError(f"{file} is not a delta's metadata: {faults_of(error)}. Copy it again.") from error


def check_note(noted: DeltaNote, source: Path, base: Base) -> None:
    """Raise ModelError if delta.json names other tensors than the delta and the base hold. No tensor is read."""
    places = set(weight_places(source))
    for place, note in noted.places.items():
        if place not in places:
            raise ModelError(
                f"{source / DELTA_FILE}: places has {short_repr(place)}, no folder with weights in {source}."
            )
        stored = read_folder(source / place)
        for name in sorted(stored.keys() - note.sha256.keys()):
            raise ModelError(f"{source / DELTA_FILE}: places.{place}.sha256 lacks {short_repr(name)}; copy it again.")
        for name, own in note.tensors.items():
            tensor, old, dtype = stored.get(name), base.tensors.get(own), DTYPES.get(note.dtypes.get(name, ""))
            if tensor is None or old is None or dtype is None or tensor.dtype != BITS[dtype.itemsize]:
                raise ModelError(
                    f"{source / DELTA_FILE}: places.{place} says that {short_repr(name)} is "
                    f"{short_repr(own)} of {base.folder} "
                    "and a difference; one of them is not there, or of another dtype. Copy the delta again."
                )
            if not old.shape or old.shape[1:] != tensor.shape[1:] or old.shape[0] > tensor.shape[0]:
                raise ModelError(
                    f"{tensor.file}: {name} is {tensor.shape}, which cannot be a difference to {old.shape}."
                )


def weight_places(folder: Path) -> list[str]:
    """Return the folders below ``folder`` that hold weight files, as relative paths. Raises ModelError for none."""
    places = [
        path.relative_to(folder).as_posix()
        for path in [folder, *sorted(path for path in folder.glob("*") if path.is_dir())]
        if any(next(path.glob(pattern), None) for pattern in WEIGHTS)
    ]
    if not places:
        raise ModelError(f"{folder} holds no weights ({SINGLE_FILE} or shards); point at the folder of a model.")
    return places

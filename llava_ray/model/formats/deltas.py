"""Conversion of a model to a delta, its difference to the base language model, and back, bit for bit.

LLaVA's first weights were published as floating-point differences, which restore a rounded result. Ours are integer
differences of the numbers' bits: base plus delta is exactly the model, which is checked tensor by tensor. A delta is
the model's folder with ``delta.json``, in which the tensors that the base has too are replaced by differences.
"""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llava_ray.errors import ModelError
from llava_ray.model.formats.delta_notes import (
    DELTA_FILE,
    DELTA_VERSION,
    DTYPES,
    WEIGHTS,
    Base,
    check_note,
    read_note,
    weight_places,
)
from llava_ray.model.formats.export_folder import Exported, new_folder, write_json_file
from llava_ray.model.formats.hub.names import from_hub
from llava_ray.model.formats.manifest import fingerprint_weights, is_bundle
from llava_ray.model.formats.model_opening import open_model
from llava_ray.model.formats.names import COMPUTED, LANGUAGE_MODEL_PREFIX
from llava_ray.model.tensors.tensor_reading import BITS, check_finite
from llava_ray.model.tensors.weight_files import Stored, read_folder, write_folder
from llava_ray.reading import short_repr, wrap_errors


def make_delta(base: str | Path, target: str | Path, output: str | Path) -> Exported:
    """Write ``target``, a model folder in any layout, as a delta to the language model ``base``.

    Raises ModelError if the two have no tensor in common, or a folder is damaged.
    """
    known, source = _read_base(base), Path(target)
    places = weight_places(source)
    common = {place: _find_common(read_folder(source / place), known) for place in places}
    if not any(common.values()):
        raise ModelError(
            f"{target} has no tensor of the same name and width as {base}; they are not a tuned model and its "
            "base. Give the language model that it was tuned from first, then the model."
        )
    with new_folder(output) as new:
        _copy_others(source, new)
        noted = {}
        for place in places:
            stored = read_folder(source / place)
            digests: dict[str, str] = {}
            deltas = {
                name: _noting(tensor, name, digests)
                if name not in common[place]
                else _difference(tensor, known.tensors[common[place][name]], name, digests)
                for name, tensor in stored.items()
            }
            (new / place).mkdir(exist_ok=True)
            write_folder(new / place, deltas)
            dtypes = {name: str(stored[name].dtype).removeprefix("torch.") for name in common[place]}
            noted[place] = {"tensors": common[place], "dtypes": dtypes, "sha256": digests}
        write_json_file(
            new / DELTA_FILE,
            {
                "format_version": DELTA_VERSION,
                "base": str(base),
                "base_fingerprint": known.fingerprint,
                "places": noted,
            },
        )
    count = sum(len(names) for names in common.values())
    return Exported(
        Path(output), (f"{count} tensors are differences to {base} (fingerprint {known.fingerprint[:12]})",)
    )


def apply_delta(base: str | Path, delta: str | Path, output: str | Path) -> Exported:
    """Restore the model from ``base`` and ``delta``, and check every tensor.

    A delta without ``delta.json`` is one of the original LLaVA's, which is added in floating point. Raises ModelError
    for another base than the delta's own, and for a tensor that is not restored exactly.
    """
    source = Path(delta)
    if not (source / DELTA_FILE).is_file():
        return _apply_original(_read_base(base), source, output)
    noted = read_note(source / DELTA_FILE)
    known = _read_base(base)
    if known.fingerprint != noted.base_fingerprint:
        raise ModelError(
            f"{base} is not the base of {delta}: its fingerprint is {known.fingerprint[:12]}, expected "
            f"{noted.base_fingerprint[:12]}, that of {short_repr(noted.base)[1:-1]}. Give that model."
        )
    check_note(noted, source, known)
    with new_folder(output) as new:
        _copy_others(source, new)
        for place, note in noted.places.items():
            stored = read_folder(source / place)
            whole = {}
            for name, tensor in stored.items():
                if name in note.tensors:
                    dtype = DTYPES[note.dtypes[name]]
                    tensor = _sum(tensor, known.tensors[note.tensors[name]], dtype, name)
                whole[name] = _checked(tensor, name, note.sha256[name])
            (new / place).mkdir(exist_ok=True)
            write_folder(new / place, whole)
    return Exported(Path(output), ("every tensor is bit for bit that of the model from which the delta was made",))


def _read_base(base: str | Path) -> Base:
    """Find a language model's tensors, in a folder of its own or inside a model. Raises ModelError."""
    folder = Path(base)
    if is_bundle(folder):
        return Base(
            folder, open_model(folder).part(LANGUAGE_MODEL_PREFIX), fingerprint_weights(folder / "language_model")
        )
    stored = {name: tensor for name, tensor in read_folder(folder).items() if not COMPUTED.search(name)}
    return Base(folder, stored, fingerprint_weights(folder))


def _copy_others(source: Path, new: Path) -> None:
    """Copy all files except the weights of parts."""
    ignored = shutil.ignore_patterns(*WEIGHTS, DELTA_FILE)

    def ignore(folder: str, names: list[str]) -> set[str]:
        for path in (Path(folder, name) for name in names):
            if path.is_symlink() and path.is_dir():  # it may point anywhere, also back to this folder
                raise ModelError(f"{path} is a link to another folder; replace it by the model's own files.")
        return ignored(folder, names)

    with wrap_errors(f"{source}", "Copy the folder again.", says="cannot be copied"):
        shutil.copytree(source, new, dirs_exist_ok=True, ignore=ignore)


def _find_common(stored: Mapping[str, Stored], base: Base) -> dict[str, str]:
    """Map the target's tensors to those of the base, by any layout's names; the target's may have more rows."""
    pairs = {}
    for name, tensor in stored.items():
        own = from_hub(name).removeprefix(LANGUAGE_MODEL_PREFIX) if name not in base.tensors else name
        if own in base.tensors:
            old = base.tensors[own].shape
            if old[1:] == tensor.shape[1:] and len(old) and old[0] <= tensor.shape[0]:
                pairs[name] = own
    return pairs


def _difference(target: Stored, base: Stored, name: str, digests: dict[str, str]) -> Stored:
    def subtract(tensor: Tensor) -> Tensor:
        digests[name] = _digest(tensor)
        bits = _as_bits(tensor).clone()
        bits[: base.shape[0]] -= _as_bits(base.load().to(tensor.dtype))
        return bits

    return Stored(target.shape, BITS[target.dtype.itemsize], lambda: subtract(target.load()), target.file)


def _sum(delta: Stored, base: Stored, dtype: torch.dtype, name: str) -> Stored:
    def add(bits: Tensor) -> Tensor:
        bits = bits.clone()
        bits[: base.shape[0]] += _as_bits(base.load().to(dtype))
        return check_finite(bits.view(dtype), name, delta.file)

    return Stored(delta.shape, dtype, lambda: add(delta.load()), delta.file)


def _noting(tensor: Stored, name: str, digests: dict[str, str]) -> Stored:
    def note(loaded: Tensor) -> Tensor:
        digests[name] = _digest(loaded)
        return loaded

    return tensor.mapped(note)


def _checked(tensor: Stored, name: str, expected: str) -> Stored:
    def check(loaded: Tensor) -> Tensor:
        if _digest(loaded) != expected:
            raise ModelError(f"{tensor.file}: {name} is not restored exactly; the delta is damaged. Copy it again.")
        return loaded

    return tensor.mapped(check)


def _as_bits(tensor: Tensor) -> Tensor:
    """View a tensor's numbers as integers of the same bits."""
    return tensor.contiguous().view(BITS[tensor.dtype.itemsize])


def _digest(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's bytes."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(flat.data).hexdigest()


def _apply_original(base: Base, source: Path, output: str | Path) -> Exported:
    """Apply a delta of the original LLaVA's: floating-point differences; new rows and tensors unchanged."""
    stored = read_folder(source)
    pairs = _find_common(stored, base)
    absent = sorted(base.tensors.keys() - set(pairs.values()))
    if absent:
        raise ModelError(
            f"{base.folder} is not the base of {source}, or {source} is not a delta: {absent[0]} has no counterpart of "
            f"its shape there ({len(absent)} such tensors). Give the language model that the delta was published for."
        )

    def added(name: str, tensor: Stored, old: Stored) -> Stored:
        def add(delta: Tensor) -> Tensor:
            whole = delta.clone()
            whole[: old.shape[0]] += old.load().to(delta.dtype)
            return check_finite(whole, name, tensor.file)

        return tensor.mapped(add)

    with new_folder(output) as new:
        _copy_others(source, new)
        write_folder(new, {n: added(n, t, base.tensors[pairs[n]]) if n in pairs else t for n, t in stored.items()})
    return Exported(
        Path(output), (f"{source} does not say which base it was made from: that it is {base.folder} was not checked",)
    )

"""A folder of weights that is written once, atomically, and reused."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llava_ray.errors import ModelError


@dataclass(frozen=True)
class MadeWeights:
    """A model folder at ``path``; ``reused`` if it existed already."""

    path: Path
    reused: bool


def make_once(path: Path, made_from: Mapping[str, Any], write: Callable[[Path], None]) -> MadeWeights:
    """Return the folder at ``path``, calling ``write`` on an empty one only if it is missing or incomplete.

    A folder is complete if its receipt, written last, has the same ``made_from`` and the sizes of its files.
    Raises ModelError where it cannot be written.
    """
    made_from = {**made_from, "conversion": _CONVERSION}
    if _is_whole(path, made_from):
        return MadeWeights(path, reused=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the final rename stays on one filesystem and is atomic.
        with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as temporary:
            new = Path(temporary) / path.name
            new.mkdir()
            write(new)
            (new / RECEIPT).write_text(json.dumps(_receipt(new, made_from), indent=2))
            if _is_whole(path, made_from):  # another process was faster, and may be in use
                return MadeWeights(path, reused=True)
            if path.exists():
                path.rename(Path(temporary) / "old")
            new.rename(path)
    except OSError as error:
        raise ModelError(
            f"the weights cannot be written to {path}: {error}. Expected a folder that may be written, with 500 MB "
            "free; choose another or make room."
        ) from error
    return MadeWeights(path, reused=False)


def _receipt(folder: Path, made_from: Mapping[str, Any]) -> dict[str, Any]:
    files = [file for file in sorted(folder.glob("[!.]*")) if file.name != RECEIPT]
    return {"made_from": made_from, "files": {file.name: file.stat().st_size for file in files}}


def _is_whole(path: Path, made_from: Mapping[str, Any]) -> bool:
    try:
        receipt = json.loads((path / RECEIPT).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    return bool(receipt == _receipt(path, made_from))


RECEIPT = "made_from.json"


_CONVERSION = 2  # increment when the output of ``write`` functions changes: older folders are then replaced

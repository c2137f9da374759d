"""Files that anybody may have written: read within bounds, and failures of other people's code put into words."""

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_ray.errors import CheckpointError, ConfigError, LlavaRayError, ModelError

_MAX_DEPTH = 64  # of lists and tables in each other
INT_BITS = 63
LARGE_INT_BITS = 100  # tokenizers that were trained for no length say 10 ** 30
MAX_SHOWN = 200  # characters of a value or reason in a message


class _Shortened(reprlib.Repr):
    """Writes values of any size in a few characters; reprlib's own fails at numbers of thousands of digits."""

    def repr_int(self, x: int, level: int) -> str:
        """Write a number, or how long it is."""
        return repr(x) if x.bit_length() <= 4 * INT_BITS else f"a number of {x.bit_length():,} bits"


_shortened = _Shortened()
_shortened.maxstring = _shortened.maxother = MAX_SHOWN
_shortened.maxlist = _shortened.maxtuple = _shortened.maxdict = _shortened.maxset = 20


def shown(value: object) -> str:
    """Return a value as a message can show it: whatever its size, in a few characters."""
    return _shortened.repr(value)


def reason(error: BaseException) -> str:
    """Return the first line that an error says, with its type, in characters that every terminal takes."""
    try:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    except Exception:  # noqa: BLE001 - its text may be made of what it could not read
        lines = []
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


@contextmanager
def in_words(
    what: str,
    remedy: str,
    kind: type[ModelError | ConfigError | CheckpointError] = ModelError,
    says: str = "cannot be read",
) -> Iterator[None]:
    """Turn whatever fails inside into ``kind``, saying what was read, why that failed, and the ``remedy``.

    Libraries raise anything at all on files that were damaged or made to harm; tokenizers even what is no Exception.
    """
    try:
        yield
    except (LlavaRayError, KeyboardInterrupt, SystemExit, GeneratorExit, BrokenPipeError):
        raise
    except BaseException as error:
        raise kind(f"{f'{what} {says}'.strip()} ({reason(error)}). {remedy}") from error


def is_file(path: Path) -> bool:
    """Tell whether there is an ordinary file, also for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Tell whether there is a folder, also for names that no folder can have."""
    try:
        return path.is_dir()
    except (OSError, ValueError, RuntimeError):  # of a user who is not there: ~nobody
        return False


def read_bounded(path: Path, limit: int, kind: type[ModelError | ConfigError] = ModelError) -> bytes:
    """Return a file's bytes. Raises ``kind`` for one with more than ``limit``, OSError where it cannot be read."""
    with path.open("rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise kind(f"{path} has more than {limit:,} bytes, far more than such a file has; it is not read.")
    return content


def check_plain(
    value: Any, where: str, kind: type[ModelError | ConfigError] = ModelError, bits: int = INT_BITS
) -> None:
    """Raise ``kind``, naming the key, for values in too many of each other and for numbers of more than ``bits``."""
    stack: list[tuple[Any, str, int]] = [(value, "", 0)]
    while stack:
        value, key, depth = stack.pop()
        if isinstance(value, dict | list):
            if depth == _MAX_DEPTH:
                raise kind(f"{where}: {shown(key)} has more than {_MAX_DEPTH} lists or tables in each other; mend it.")
            inside = value.items() if isinstance(value, dict) else enumerate(value)
            stack += [(item, f"{key}.{name}" if key else str(name), depth + 1) for name, item in inside if item]
        elif isinstance(value, int) and value.bit_length() > bits:
            raise kind(f"{where}: {key[:MAX_SHOWN]} is {shown(value)}, beyond {bits + 1} bits; mend it.")

"""Untrusted files read within bounds, and failures of third-party code turned into clear messages."""

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_ray.errors import CheckpointError, ConfigError, LlavaRayError, ModelError

_MAX_DEPTH = 64  # of nested lists and tables
INT_BITS = 63
LARGE_INT_BITS = 100  # tokenizers without a length limit store 10 ** 30
MAX_SHOWN = 200  # characters of a value or reason in a message


class _Shortened(reprlib.Repr):
    """A short ``repr`` of values of any size; reprlib's own fails on numbers of thousands of digits."""

    def repr_int(self, x: int, level: int) -> str:
        """Return a number, or its size in bits where it is very long."""
        return repr(x) if x.bit_length() <= 4 * INT_BITS else f"a number of {x.bit_length():,} bits"


_shortened = _Shortened()
_shortened.maxstring = _shortened.maxother = MAX_SHOWN
_shortened.maxlist = _shortened.maxtuple = _shortened.maxdict = _shortened.maxset = 20


def short_repr(value: object) -> str:
    """Return a short text of a value for messages, whatever its size."""
    return _shortened.repr(value)


def describe_error(error: BaseException) -> str:
    """Return an error's type and first line, in characters that every terminal accepts."""
    try:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    except Exception:  # noqa: BLE001 - building its text may itself fail on the unreadable data
        lines = []
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


@contextmanager
def wrap_errors(
    what: str,
    remedy: str,
    kind: type[ModelError | ConfigError | CheckpointError] = ModelError,
    says: str = "cannot be read",
) -> Iterator[None]:
    """Turn any exception raised inside into ``kind``, with what was read, why that failed, and the ``remedy``.

    Libraries raise arbitrary exceptions on damaged or malicious files; the tokenizers library even a BaseException.
    """
    try:
        yield
    except (LlavaRayError, KeyboardInterrupt, SystemExit, GeneratorExit, BrokenPipeError):
        raise
    except BaseException as error:
        raise kind(f"{f'{what} {says}'.strip()} ({describe_error(error)}). {remedy}") from error


def is_file(path: Path) -> bool:
    """Return whether an ordinary file exists; False also for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Return whether a folder exists; False also for names that no folder can have."""
    try:
        return path.is_dir()
    except (OSError, ValueError, RuntimeError):  # the home of an unknown user: ~nobody
        return False


def read_bounded(path: Path, limit: int, kind: type[ModelError | ConfigError] = ModelError) -> bytes:
    """Return a file's bytes. Raises ``kind`` for one with more than ``limit``, OSError where it cannot be read."""
    with path.open("rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise kind(f"{path} has more than {limit:,} bytes, far more than such a file needs; it is not read.")
    return content


def check_plain(
    value: Any, where: str, kind: type[ModelError | ConfigError] = ModelError, bits: int = INT_BITS
) -> None:
    """Raise ``kind``, naming the key, for values nested too deeply and for numbers of more than ``bits``."""
    stack: list[tuple[Any, str, int]] = [(value, "", 0)]
    while stack:
        value, key, depth = stack.pop()
        if isinstance(value, dict | list):
            if depth == _MAX_DEPTH:
                raise kind(f"{where}: {short_repr(key)} has more than {_MAX_DEPTH} nested lists or tables; fix it.")
            inside = value.items() if isinstance(value, dict) else enumerate(value)
            stack += [(item, f"{key}.{name}" if key else str(name), depth + 1) for name, item in inside if item]
        elif isinstance(value, int) and value.bit_length() > bits:
            raise kind(f"{where}: {key[:MAX_SHOWN]} is {short_repr(value)}, beyond {bits + 1} bits; fix it.")

"""Bounded reading of TOML files, with errors that name the file."""

import re
import tomllib
from pathlib import Path
from typing import Any

from llava_ray.errors import ConfigError
from llava_ray.reading import check_plain, describe_error, read_bounded, wrap_errors

_MAX_BYTES = 2**20
_MAX_KEY_PARTS = 32
# The time of Python's parser grows with the square of the number of parts of a key.
_PART = r"""(?>[A-Za-z0-9_-]++|"(?>[^"\\\n]|\\.)*+"|'[^'\n]*+')[ \t]*+"""
_LONG_KEY = re.compile(rf"(?<![A-Za-z0-9_.-])(?>{_PART}\.[ \t]*+){{{_MAX_KEY_PARTS}}}")


def read_toml_file(path: Path, what: str) -> dict[str, Any]:
    """Read a TOML file's tables; ``what`` names its purpose in messages.

    Raises ConfigError that names the file where it cannot be read, is not TOML, or holds values that no setting has.
    """
    try:
        content = read_bounded(path, _MAX_BYTES, ConfigError)
        if content.startswith(b"\xef\xbb\xbf"):
            raise ConfigError(f"{what} {str(path)!r} begins with a byte order mark: save it as plain UTF-8.")
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {what} {str(path)!r}: {error}") from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"cannot read {what} {str(path)!r}: {error}") from error
    if found := _LONG_KEY.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise ConfigError(f"{what} {str(path)!r}: line {line} has a key of more than {_MAX_KEY_PARTS} parts; fix it.")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{what} {str(path)!r} is not valid TOML: {error}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, hundreds of brackets
        raise ConfigError(f"{what} {str(path)!r} cannot be read ({describe_error(error)}); fix it.") from error
    with wrap_errors(f"{what} {str(path)!r}", "Fix it.", ConfigError):
        check_plain(values, f"{what} {str(path)!r}", ConfigError)
    return values

"""Places of adapters: folders and addresses, each checked against those that the service allows."""

import os
import stat
import urllib.parse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_ray.deployments.refusal import RefusalError, refuse

PARAM = "lora_path"
_MAX_FILES = 1000  # of an adapter's folder
_MAX_PLACE_CHARS = 4096
_SHOWN_CHARS = 200


@dataclass(frozen=True)
class AdapterRef:
    """An adapter that was loaded while the service runs."""

    name: str
    """The name that requests use as their model."""
    place: str
    """A folder, or the address of one."""
    base: str
    """Name of the model that it is served over."""
    revision: str
    """Unique: another adapter of the same name and place has another one."""


def is_url(place: str) -> bool:
    """Return whether a place is an address and not a folder."""
    return "://" in place


def is_plain_url(place: str) -> bool:
    """Return whether an http(s) address means one place only: without user, query, fragment or dots as parts."""
    try:
        url = urllib.parse.urlsplit(place)
        host, _ = url.hostname, url.port
    except ValueError:
        return False
    plain = place.isascii() and place.isprintable() and not set(place) & set(' "<>\\^`{|}?#@')
    parts = urllib.parse.unquote(url.path).split("/")
    doubly = urllib.parse.unquote(urllib.parse.unquote(url.path))
    is_simple = doubly == urllib.parse.unquote(url.path) and url.path.count("/") == len(parts) - 1
    return url.scheme in ("http", "https") and bool(host) and plain and is_simple and not {".", ".."} & set(parts)


def is_allowed_url(place: str, allowed: Iterable[str]) -> bool:
    """Return whether an address lies under one of the allowed ones: same scheme, host and port, and its path below."""
    if not is_plain_url(place):
        return False
    origin, parts = _split_url(place)
    return any(
        origin == allowed_origin and parts[: len(allowed_parts)] == allowed_parts
        for allowed_origin, allowed_parts in map(_split_url, allowed)
    )


def _split_url(place: str) -> tuple[tuple[str, str | None, int | None], list[str]]:
    """Return an address's origin and the parts of its path."""
    url = urllib.parse.urlsplit(place)
    port = url.port or {"http": 80, "https": 443}.get(url.scheme)
    return (url.scheme, url.hostname, port), [part for part in urllib.parse.unquote(url.path).split("/") if part]


def check_place(place: str) -> None:
    """Check the form of a place. Raises RefusalError (400)."""
    if len(place) > _MAX_PLACE_CHARS or not place.isprintable():
        raise refuse(400, f"lora_path: expected at most {_MAX_PLACE_CHARS:,} printable characters", "bad_path", PARAM)
    if is_url(place):
        return
    if not Path(place).is_absolute():
        raise refuse(
            400,
            f"lora_path: {place[:_SHOWN_CHARS]!r} is no absolute path; expected a folder such as /adapters/one, or an "
            "http(s) address. Ids of a hub are not read here: download the adapter into an allowed folder.",
            "bad_path",
            PARAM,
        )


def check_url(place: str, allowed: Sequence[str]) -> None:
    """Check that an address is allowed. Raises RefusalError (403)."""
    if not is_allowed_url(place, allowed):
        raise refuse(
            403,
            f"lora_path: {place[:_SHOWN_CHARS]!r} is not under an allowed address (allowed_adapter_urls)",
            "adapter_place",
            PARAM,
        )


def find_folder(place: str, allowed: Sequence[str], max_bytes: int) -> Path:
    """Return the real folder of a local adapter, which lies, with all its files, under an allowed folder.

    Raises RefusalError: 403 for any other place, whether it exists or not, 404 for a missing one, 400 for too much.
    """
    outside = refuse(
        403,
        f"lora_path: {place[:_SHOWN_CHARS]!r} is not under an allowed folder (allowed_adapter_paths); links are "
        "followed before this is checked",
        "adapter_place",
        PARAM,
    )
    roots = [Path(root).expanduser().resolve() for root in allowed]
    try:
        folder = Path(place).resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a null byte
        raise outside from None
    if not any(folder.is_relative_to(root) for root in roots):
        raise outside
    if not folder.is_dir():
        raise refuse(404, f"lora_path: there is no folder {place[:_SHOWN_CHARS]!r}", "adapter_not_found", PARAM)
    _check_files(folder, roots, max_bytes, outside)
    return folder


def _check_files(folder: Path, roots: Sequence[Path], max_bytes: int, outside: RefusalError) -> None:
    """Check an adapter's files: regular ones under the allowed folders, not too many and not too large."""
    num_files = num_bytes = 0
    try:
        for parent, folders, files in os.walk(folder):
            for name in (*folders, *files):
                path = (Path(parent) / name).resolve(strict=True)
                if not any(path.is_relative_to(root) for root in roots):
                    raise outside
                found = path.stat()
                if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
                    raise refuse(400, f"lora_path: {name[:_SHOWN_CHARS]!r} is no regular file", "bad_adapter", PARAM)
                num_files += 1
                num_bytes += found.st_size if stat.S_ISREG(found.st_mode) else 0
                if num_files > _MAX_FILES:
                    raise refuse(
                        400, f"lora_path: more than {_MAX_FILES:,} files; is it an adapter?", "bad_adapter", PARAM
                    )
    except (OSError, RuntimeError) as error:
        raise refuse(
            400, f"lora_path: its files cannot be read ({type(error).__name__})", "bad_adapter", PARAM
        ) from None
    if num_bytes > max_bytes:
        raise adapter_too_large(num_bytes, max_bytes)


def adapter_too_large(found: int, max_bytes: int) -> RefusalError:
    """Return the refusal of an adapter whose files are too large."""
    return refuse(
        400,
        f"lora_path: files of {found:,} bytes or more; at most {max_bytes:,} (max_adapter_bytes)",
        "adapter_too_large",
        PARAM,
    )

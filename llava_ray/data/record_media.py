"""Detection of media under unsupported keys: a record with media other than its images is rejected, not trained on."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from llava_ray.data.record_words import ABOUT, words_of
from llava_ray.images.containers import identify_format

_IMAGE_WORDS = {
    "image", "img", "picture", "photo", "pixel", "jpg", "jpeg", "png", "webp", "gif", "bmp", "tiff",
    "thumbnail", "screenshot",
}  # fmt: skip
# File extensions of media, for values of keys whose name reveals nothing.
_MEDIA_ENDINGS = (
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".mp4", ".mkv", ".webm", ".avi",
    ".mov", ".wav", ".mp3", ".flac", ".ogg",
)  # fmt: skip
_MEDIA_URIS = ("data:image/", "data:video/", "data:audio/")
_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")  # of PNG, JPEG, GIF and RIFF
_BASE64_HEAD = re.compile(r"[A-Za-z0-9+/_\s-]{60}")
_MAX_NAME_CHARS = 8000
_DIGEST_BYTES = 64  # the longest hash digest; longer bytes may be a medium
_MAX_ENTRIES, _MAX_DEPTH = 1000, 4  # of lists that are searched
# Keys of an object that hold a medium, in one form or several (Hugging Face's have bytes and path), and other media.
_FORMS = ("bytes", "path", "url", "uri", "base64", "data")
_MEDIA = ("image", "images", "image_url", "video", "audio")

# Keys of a sample's origin, whatever their value looks like.
ORIGINS = {"source", "dataset", "data_source", "origin", "license", "metadata", "meta"}
# Beside a record's images: words for the same image in another form or place, for a thumbnail of it, and for others.
_SAME = {"path", "url", "uri", "link", "href", "file", "filename", "byte", "data", "original", "orig", "key"}
_BASE64 = re.compile("b(ase)?_?64")
_SMALLER = {"thumbnail", "thumb", "preview", "icon"}
_OTHER = {
    "second", "third", "fourth", "other", "another", "extra", "additional", "left", "right", "reference", "ref",
    "target", "edited", "before", "after", "depth", "next",
}  # fmt: skip


def is_image_key(name: str) -> bool:
    """Return whether an unsupported key seems to hold an image."""
    words = set(words_of(name))
    return bool(words & _IMAGE_WORDS) and not words & ABOUT


def names_medium(value: Any) -> bool:
    """Return whether a value is or refers to a medium, in lists and objects as well."""
    return next(_media_in(value), None) is not None


def find_lost_medium(name: str, value: Any, named: Sequence[Any], num_images: int) -> str | None:
    """Return why a key is rejected whose value is a medium that would be dropped; None where it is not.

    ``named`` are the record's references to its images, ``num_images`` their number.
    """
    if name in ORIGINS:
        return None
    if not num_images:
        if not is_image_key(name) and not names_medium(value):
            return None
        return "it seems to hold a medium, and the record names no image: write it into `image` or `images`"
    words = words_of(name)
    is_image = is_image_key(name)
    only_image = all(word in _IMAGE_WORDS | _OTHER or word.isdigit() for word in words)
    found = _texts_in(value) if only_image and is_image else _media_in(value)
    media = [one for one in islice(found, _MAX_ENTRIES) if _is_medium_beside(one, is_image)]
    if _SMALLER & set(words) or _are_among(media, named):
        return None
    meant = set(words[1:] if len(words) > 1 and words[0] == "source" else words)
    is_same = meant & (ABOUT | _SAME) or _BASE64.search(name.lower())
    if is_same and not meant & _OTHER and not _is_numbered(name) and len(media) <= num_images:
        return None  # the origin of one of the record's images
    return "it holds another medium than the record's images: list all of them in `images`, each with its marker"


def _media_in(value: Any) -> Iterator[str | bytes]:
    """Yield media and references to media."""
    return _texts_in(value, _is_medium)


def _texts_in(
    value: Any, is_meant: Callable[[str | bytes], bool] = bool, num_forms: int = 1, depth: int = _MAX_DEPTH
) -> Iterator[str | bytes]:
    """Yield texts and bytes; of the alternative forms in each object the first ``num_forms``."""
    if isinstance(value, str | bytes):
        if is_meant(value):
            yield value
    elif isinstance(value, list | tuple) and depth:
        for entry in islice(value, _MAX_ENTRIES):
            yield from _texts_in(entry, is_meant, num_forms, depth - 1)
    elif isinstance(value, Mapping) and depth:
        forms = (one for name in _FORMS for one in _texts_in(value.get(name), is_meant, num_forms, depth - 1))
        yield from islice(forms, num_forms)
        for name in _MEDIA:
            yield from _texts_in(value.get(name), is_meant, num_forms, depth - 1)


def _is_medium(one: str | bytes) -> bool:
    return len(one) > _DIGEST_BYTES if isinstance(one, bytes) else _leads_to_medium(one)


def _leads_to_medium(text: str) -> bool:
    place = text[:_MAX_NAME_CHARS].partition("?")[0].strip().lower()
    if place.startswith(_MEDIA_URIS) or (len(text) < _MAX_NAME_CHARS and place.endswith(_MEDIA_ENDINGS)):
        return True
    return text.startswith(_BASE64_STARTS) and _BASE64_HEAD.match(text) is not None


def _is_medium_beside(one: str | bytes, is_image: bool) -> bool:
    """Return whether bytes begin like a media file; other columns may hold anything."""
    return (
        isinstance(one, str) or is_image or bool(identify_format(one)) or one[4:8] == b"ftyp" or one.startswith(b"RIFF")
    )


def _are_among(media: Sequence[str | bytes], named: Sequence[Any]) -> bool:
    """Return whether all of these media are the record's own images, wherever they are stored."""
    if not media:
        return True
    known = set(map(_last_name, _texts_in(list(named), num_forms=len(_FORMS))))
    return all(_last_name(one) in known for one in media)


def _last_name(one: str | bytes) -> str | bytes:
    return one.partition("?")[0].rpartition("/")[2] if isinstance(one, str) and len(one) < _MAX_NAME_CHARS else one


def _is_numbered(name: str) -> bool:
    """Return whether a key is numbered as a second or later image: ``image2_path``, ``path_3``."""
    split = re.findall(r"[a-z]+|[0-9]+", name.lower())
    return any(
        one.isdigit() and len(one) < 3 and int(one) > 1 and split[i - 1 : i] not in (["base"], ["b"], ["mp"], ["md"])
        for i, one in enumerate(split)
    )

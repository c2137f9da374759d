"""Which keys of records, turns and parts are obeyed, which refused by name, which read past: a closed table.

What would change the meaning of a sample (another medium, tools, thoughts, weights, preferences) is never left out in
silence: a record that has it is rejected. Any other key is read past, and counted by its name.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from llava_ray.errors import RecordError
from llava_ray.reading import shown

CONVERSATION_KEYS = ("conversations", "messages")
IMAGE_KEYS = ("images", "image")
SYSTEM_KEYS = ("system", "system_prompt")
OBEYED = {"id", *CONVERSATION_KEYS, *IMAGE_KEYS, *SYSTEM_KEYS}
WEIGHT_KEYS = ("weight", "loss", "train")
OBEYED_OF_TURNS = {"from", "value", "role", "content", *WEIGHT_KEYS}

# Words of a key that tell what it holds, with what to do about it. Plurals and numbers behind them count as well.
IMAGE_WORDS = {
    "image", "img", "picture", "photo", "pixel", "jpg", "jpeg", "png", "webp", "gif", "bmp", "tiff", "thumbnail",
    "screenshot",
}  # fmt: skip
REFUSED_WORDS: dict[str, set[str]] = {
    "video cannot be learnt from: take frames as `images`": {"video", "vid", "movie", "mp4", "frame"},
    "audio cannot be learnt from": {"audio", "sound", "speech", "voice", "wav", "mp3", "waveform"},
    "documents cannot be learnt from: show their pages as `images`": {"document", "pdf", "attachment", "file"},
    "tools cannot be learnt from yet": {"tool", "function", "plugin", "observation"},
    "thoughts apart from the answer cannot be learnt from: write them into it": {
        "reasoning", "thinking", "thought", "think", "cot", "refusal", "scratchpad",
    },
    "preferences cannot be learnt from yet": {"chosen", "rejected", "preferred", "dispreferred", "preference"},
    "the turns belong into `conversations` or `messages`": {
        "prompt", "completion", "instruction", "history", "response", "query",
    },
    "weights are obeyed at a turn, as 0 or 1 in `weight`": {"weight", "loss", "mask", "masking", "label_mask"},
    "places in images cannot be learnt from: write them into the turns": {
        "bbox", "bboxe", "box", "boxe", "object", "segmentation", "polygon", "keypoint", "region",
    },
    "the system's text belongs into `system`": {"system", "developer"},
    "the template is the model's (model.version)": {"template"},
}  # fmt: skip
REFUSED_NAMES = {
    "prefix": "an answer is learnt whole",
    "suffix": "an answer is learnt whole",
    "train": "weights are obeyed at a turn, as 0 or 1 in `weight`",
    "kto_tag": "preferences cannot be learnt from yet",
    "train_on_input": "questions are never learnt",
    "trainable": "weights are obeyed at a turn, as 0 or 1 in `weight`",
}
REFUSED_OF_TURNS = {
    "text": "the text belongs into `value` or `content`",
    "input": "the text belongs into `value` or `content`",
    "output": "the text belongs into `value` or `content`",
}

# A key with one of these words says something about a thing: it is not the thing.
ABOUT = {
    "id", "idx", "index", "num", "number", "n", "count", "has", "is", "length", "len", "duration", "source", "license",
    "score", "hash", "md5", "sha", "phash", "width", "height", "size", "resolution", "fps", "type", "format",
    "name", "category", "caption", "quality", "embedding", "similarity", "date", "time", "copyright", "author", "tag",
    "shape", "stat", "version",
}  # fmt: skip
# Media by the end of a name, for values of keys that say nothing themselves.
MEDIA_ENDINGS = (
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".mp4", ".mkv", ".webm", ".avi",
    ".mov", ".wav", ".mp3", ".flac", ".ogg",
)  # fmt: skip
MEDIA_URIS = ("data:image/", "data:video/", "data:audio/")
MAX_NAME_CHARS = 8000
DIGEST_BYTES = 64  # the longest that are a hash, and no medium
# Keys that say where a sample comes from, whatever their value looks like.
ORIGINS = {"source", "dataset", "data_source", "origin", "license", "metadata", "meta"}

MAX_NAMED = 20  # keys in reports
MAX_NAME = 60  # characters of a key in reports
MAX_EMPTY = 100  # entries that are looked at
EMPTY_TEXTS = {"", "[]", "{}", "null", "none"}


def is_absent(value: Any) -> bool:
    """Tell whether a key says nothing: tables fill those that a record does not have."""
    if value is None or value is False:
        return True
    if isinstance(value, str):
        return len(value) < 8 and value.strip().lower() in EMPTY_TEXTS
    if isinstance(value, Mapping):
        return len(value) <= MAX_EMPTY and all(inner is None for inner in value.values())
    if isinstance(value, list | tuple):
        return len(value) <= MAX_EMPTY and all(inner is None or inner in ("", [], {}) for inner in value)
    return isinstance(value, bytes) and not value


def printable(name: object) -> str:
    """Return a key as reports write it: short, of characters that can be written anywhere."""
    text = name if isinstance(name, str) else shown(name)
    text = text if len(text) <= MAX_NAME else text[:MAX_NAME] + "…"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def why_refused(name: str, obeyed: Iterable[str] = (), more: Mapping[str, str] | None = None) -> str | None:
    """Return why a key with a value is refused, None for one that is obeyed or says nothing of the turns' meaning."""
    if name in obeyed:
        return None
    plain = "_".join(_words(name))
    named = {**REFUSED_NAMES, **(more or {})}.get(plain)
    words = set(_words(name))
    if named or words & ABOUT:
        return named
    return next((why for why, meant in REFUSED_WORDS.items() if words & meant), None)


def is_image_key(name: str) -> bool:
    """Tell whether a key that is not obeyed seems to hold an image."""
    words = set(_words(name))
    return name not in OBEYED and bool(words & IMAGE_WORDS) and not words & ABOUT


def is_read(name: str) -> bool:
    """Tell whether a table's column has to be read: what is obeyed, and what might have to be refused."""
    return name in OBEYED or is_image_key(name) or name == "label" or why_refused(name, OBEYED) is not None


def check_keys(values: Mapping[str, Any], *, has_images: bool) -> list[str]:
    """Return the keys of a record that are read past. Raises RecordError ("unsupported") for one that changes it."""
    ignored = []
    for name, value in values.items():
        if name in OBEYED or is_absent(value):
            continue
        why = None if name in WEIGHT_KEYS and value == 1 else why_refused(name, OBEYED)
        refuse_key(f"`{printable(name)}`", why or _why_of_value(name, value, has_images))
        ignored.append(printable(name))
    return ignored


def check_turn_keys(turn: Mapping[str, Any], where: str) -> list[str]:
    """Return the keys of a turn that are read past. Raises RecordError ("unsupported")."""
    ignored = []
    for name, value in turn.items():
        if name in OBEYED_OF_TURNS or is_absent(value):
            continue
        why = why_refused(name, OBEYED_OF_TURNS, REFUSED_OF_TURNS)
        if why is None and (is_image_key(name) or name in IMAGE_KEYS):
            why = "images are listed in the record's `images`, or are parts of its content"
        refuse_key(f"{where}: `{printable(name)}`", why)
        ignored.append(f"turns.{printable(name)}")
    return ignored


def refuse_key(what: str, why: str | None) -> None:
    """Raise RecordError ("unsupported") if there is a reason to."""
    if why is not None:
        raise RecordError(
            f"{what} is not obeyed, and would be lost: {why}. Mend or remove the record", reason="unsupported"
        )


def _why_of_value(name: str, value: Any, has_images: bool) -> str | None:
    if name == "label" and isinstance(value, bool):
        return "preferences cannot be learnt from yet"
    if has_images or not (is_image_key(name) or (name not in ORIGINS and _names_medium(value))):
        return None
    return "it seems to hold a medium, and the record names no image: write it into `image` or `images`"


def _names_medium(value: Any) -> bool:
    if isinstance(value, bytes):
        return len(value) > DIGEST_BYTES
    if isinstance(value, Mapping):  # how Hugging Face's media lie in Parquet
        return any(_names_medium(value.get(name)) for name in ("bytes", "path", "url"))
    if not isinstance(value, str):
        return False
    place = value[:MAX_NAME_CHARS].partition("?")[0].lower()
    return place.startswith(MEDIA_URIS) or (len(value) < MAX_NAME_CHARS and place.endswith(MEDIA_ENDINGS))


def describe_ignored(counts: Mapping[str, int]) -> str:
    """Return one line on the keys that were read past, the most frequent ones by name."""
    named = sorted(counts.items(), key=lambda item: -item[1])
    shown_keys = ", ".join(f"{name} ({count:,})" for name, count in named[:MAX_NAMED])
    more = f", and {len(named) - MAX_NAMED:,} others" if len(named) > MAX_NAMED else ""
    return f"Keys that nothing is learnt from, with the number of samples: {shown_keys}{more}"


def _words(name: str) -> list[str]:
    """Return a key's words in lower case, without numbers behind them and without the plural's s."""
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name[:200])
    words = [word.rstrip("0123456789") or word for word in re.split(r"[^a-z0-9]+", split.lower()) if word]
    return [word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in words]

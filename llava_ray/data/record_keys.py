"""A closed table of the keys of records, turns and parts: those supported, those rejected, those ignored.

A key that would change the meaning of a sample (another medium, tools, reasoning, weights, preferences) is never
dropped in silence: the record is rejected. Any other key is ignored, and counted by its name.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llava_ray.data.record_flags import PREFERENCES_FAULT, WEIGHTS_FAULT, find_flag_fault, is_flag
from llava_ray.data.record_media import ORIGINS, find_lost_medium, is_image_key, names_medium
from llava_ray.data.record_words import ABOUT, words_of
from llava_ray.errors import RecordError
from llava_ray.reading import short_repr

CONVERSATION_KEYS = ("conversations", "messages")
IMAGE_KEYS = ("images", "image")
# The two answers of a preference: TRL's and RLAIF-V's, LLaVA-RLHF's.
SIDES, OUTPUTS = ("chosen", "rejected"), ("output_1", "output_2")
# Columns by which a table of preferences is known; RLHF-V's has both answers as JSON in its text.
PREFERENCE_COLUMNS = (SIDES, OUTPUTS, ("text", "image"))
SYSTEM_KEYS = ("system", "system_prompt")
TOOLS_KEY = "tools"
_OBEYED = {"id", *CONVERSATION_KEYS, *IMAGE_KEYS, *SYSTEM_KEYS, TOOLS_KEY}
WEIGHT_KEYS = ("weight", "loss", "train")
# Keys of an image part that hold its image in other formats.
_SOURCES_OF_PARTS = {"source", "src", "data", "base64", "b64", "b64_json", "bytes", "blob", "uri", "href", "file_id"}
_OBEYED_OF_TURNS = {"from", "value", "role", "content", *WEIGHT_KEYS}
_OF_ANSWERS = {"tool_calls"}
_OF_RESULTS = {"tool_call_id", "name"}

# Words of a key that reveal its content, with the remedy. Plurals and numbered keys count as well.
_REFUSED_WORDS: dict[str, set[str]] = {
    "video is not supported: use frames as `images`": {"video", "vid", "movie", "mp4", "frame"},
    "audio is not supported": {"audio", "sound", "speech", "voice", "wav", "mp3", "waveform"},
    "documents are not supported: use their pages as `images`": {"document", "pdf", "attachment", "file"},
    "tools belong into `tools`, their calls into `tool_calls` of an answer": {
        "tool", "function", "plugin", "observation",
    },
    "reasoning outside the answer is not supported: write it into the answer": {
        "reasoning", "thinking", "thought", "think", "cot", "refusal", "scratchpad",
    },
    PREFERENCES_FAULT: {"chosen", "rejected", "preferred", "dispreferred", "preference"},
    "the turns belong into `conversations` or `messages`": {
        "prompt", "completion", "instruction", "history", "response", "query",
    },
    WEIGHTS_FAULT: {"weight", "loss", "mask", "masking", "label_mask"},
    "regions of images are not supported: write them into the turns": {
        "bbox", "bboxe", "box", "boxe", "object", "segmentation", "polygon", "keypoint", "region",
    },
    "the system prompt belongs into `system`": {"system", "developer"},
    "the template is the model's (model.version)": {"template"},
}  # fmt: skip
_REFUSED_NAMES = {
    "prefix": "an answer is supervised as a whole",
    "suffix": "an answer is supervised as a whole",
    "train": WEIGHTS_FAULT,
    "kto_tag": PREFERENCES_FAULT,
    "train_on_input": "questions are never supervised",
    "trainable": WEIGHTS_FAULT,
}
_REFUSED_OF_TURNS = {
    "text": "the text belongs into `value` or `content`",
    "input": "the text belongs into `value` or `content`",
    "output": "the text belongs into `value` or `content`",
}

_MAX_NAMED = 20  # keys in reports
_MAX_NAME = 60  # characters of a key in reports
_MAX_EMPTY = 100  # entries that are checked
_EMPTY_TEXTS = {"", "[]", "{}", "null", "none"}


def is_absent(value: Any) -> bool:
    """Return whether a value means that the key is absent: tables fill keys that a record does not have."""
    if value is None or value is False:
        return True
    if isinstance(value, str):
        return len(value) < 8 and value.strip().lower() in _EMPTY_TEXTS
    if isinstance(value, Mapping):
        return len(value) <= _MAX_EMPTY and all(inner is None for inner in value.values())
    if isinstance(value, list | tuple):
        return len(value) <= _MAX_EMPTY and all(inner is None or inner in ("", [], {}) for inner in value)
    return isinstance(value, bytes) and not value


def printable(name: object) -> str:
    """Return a key for reports: short, and printable anywhere."""
    text = name if isinstance(name, str) else short_repr(name)
    text = text if len(text) <= _MAX_NAME else text[:_MAX_NAME] + "…"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _why_refused(name: str, obeyed: Iterable[str] = (), more: Mapping[str, str] | None = None) -> str | None:
    """Return why a key with a value is rejected; None for one that is supported or does not change the meaning."""
    if name in obeyed:
        return None
    plain = "_".join(words_of(name))
    named = {**_REFUSED_NAMES, **(more or {})}.get(plain)
    words = set(words_of(name))
    if named or words & ABOUT:
        return named
    return next((why for why, meant in _REFUSED_WORDS.items() if words & meant), None)


def is_read(name: str) -> bool:
    """Return whether a table's column must be read: its key is supported, or might have to be rejected."""
    return name in _OBEYED or is_image_key(name) or is_flag(name) or _why_refused(name, _OBEYED) is not None


def check_keys(values: Mapping[str, Any], named: Sequence[Any], num_images: int) -> list[str]:
    """Return the ignored keys of a record. Raises RecordError ("unsupported") for one that changes its meaning.

    ``named`` are the image references of its content parts, ``num_images`` their number.
    """
    images = [*named, *(values.get(name) for name in IMAGE_KEYS)]
    ignored = []
    for name, value in values.items():
        if name in _OBEYED or _says_nothing(name, value):
            continue
        why = None if name in WEIGHT_KEYS and value == 1 else _why_refused(name, _OBEYED)
        reject_key(
            f"`{printable(name)}`",
            why or find_flag_fault(name, value) or find_lost_medium(name, value, images, num_images),
        )
        ignored.append(printable(name))
    return ignored


def check_turn_keys(turn: Mapping[str, Any], where: str, role: str | None) -> list[str]:
    """Return the ignored keys of a turn of this role. Raises RecordError ("unsupported")."""
    ignored = []
    obeyed = _OBEYED_OF_TURNS | (_OF_ANSWERS if role == "gpt" else _OF_RESULTS if role == "tool" else set())
    for name, value in turn.items():
        if name in obeyed or _says_nothing(name, value):
            continue
        why = _why_refused(name, _OBEYED_OF_TURNS, _REFUSED_OF_TURNS) or find_flag_fault(name, value)
        if why is None and (is_image_key(name) or name in IMAGE_KEYS or _is_medium(name, value)):
            why = "images are listed in the record's `images`, or are parts of its content"
        reject_key(f"{where}: `{printable(name)}`", why)
        ignored.append(f"turns.{printable(name)}")
    return ignored


def check_part_keys(part: Mapping[str, Any], obeyed: set[str], where: str, *, is_image: bool) -> list[str]:
    """Return the ignored keys of a part of a turn's content. Raises RecordError ("unsupported")."""
    ignored = []
    for name, value in part.items():
        if name in obeyed or _says_nothing(name, value):
            continue
        why = _why_refused(name, obeyed) or find_flag_fault(name, value)
        is_number = isinstance(value, bool | int | float)
        is_source = is_image and not is_number and (name.lower() in _SOURCES_OF_PARTS or is_image_key(name))
        if why is None and (is_source or _is_medium(name, value)):
            why = "the image of a part is taken from `image`, `image_url`, `path` or `url`"
        reject_key(f"{where}: `{printable(name)}`", why)
        ignored.append(f"parts.{printable(name)}")
    return ignored


def _says_nothing(name: str, value: Any) -> bool:
    return is_absent(value) and not (value is False and find_flag_fault(name, value))


def _is_medium(name: str, value: Any) -> bool:
    """Return whether a key of a turn or part holds a medium, rather than metadata about one."""
    return not set(words_of(name)) & ABOUT and name not in ORIGINS and names_medium(value)


def reject_key(what: str, why: str | None) -> None:
    """Raise RecordError ("unsupported") if there is a reason."""
    if why is not None:
        raise RecordError(
            f"{what} is not supported, and would be lost: {why}. Fix or remove the record", reason="unsupported"
        )


def describe_ignored(counts: Mapping[str, int]) -> str:
    """Return one line on the ignored keys, the most frequent by name."""
    named = sorted(counts.items(), key=lambda item: -item[1])
    shown_keys = ", ".join(f"{name} ({count:,})" for name, count in named[:_MAX_NAMED])
    more = f", and {len(named) - _MAX_NAMED:,} others" if len(named) > _MAX_NAMED else ""
    return f"Ignored keys, with the number of samples: {shown_keys}{more}"

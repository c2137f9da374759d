"""Parsing of a record's turns: all usual role names, content parts joined to text with image markers, weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llava_ray.chat.conversation import (
    IMAGE_TOKEN,
    Turn,
    find_role,
    join_parts,
    read_turns,
    split_system,
)
from llava_ray.data.json_text import parse_json
from llava_ray.data.record_keys import (
    CONVERSATION_KEYS,
    SYSTEM_KEYS,
    TOOLS_KEY,
    WEIGHT_KEYS,
    check_part_keys,
    check_turn_keys,
    is_absent,
    printable,
    reject_key,
)
from llava_ray.data.record_tools import attach_tools
from llava_ray.errors import RecordError
from llava_ray.reading import short_repr

_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url", "input_image")
_IMAGE_NAMES = ("image", "image_url", "path", "url")
_OBEYED_OF_PARTS = {"text": {"type", "text"}, "image": {"type", "index", "detail", *_IMAGE_NAMES}}


@dataclass
class ReadTurns:
    """The turns of a record, the images that its content parts name, and the ignored keys of turns and parts."""

    turns: tuple[Turn, ...] = ()
    images: list[Any] = field(default_factory=list)
    """One reference for each image part, None for one that names no image."""
    ignored: list[str] = field(default_factory=list)


def read_record_turns(values: Mapping[str, Any]) -> ReadTurns:
    """Parse a record's turns, with the system prompt from any of its places. Raises RecordError."""
    found = [(name, values[name]) for name in CONVERSATION_KEYS if values.get(name) is not None]
    full = [pair for pair in found if not is_absent(pair[1])]
    if len(full) > 1 and full[0][1] != full[1][1]:
        raise RecordError(
            "`conversations` and `messages` hold different turns; expected one of them", reason="malformed"
        )
    name, listed = next(iter(full or found), ("conversations", None))
    if isinstance(listed, str):  # Parquet tables often store them as JSON text
        listed = _parse_turns(listed)
    if not isinstance(listed, list):
        raise RecordError(
            f"no list of turns: `{name}` is {type(listed).__name__}, keys are "
            f"{', '.join(map(printable, list(values)[:20]))}; "
            f'expected "conversations": [{{"from": "human", "value": ...}}, {{"from": "gpt", "value": ...}}]'
            f"{_hint(values)}",
            reason="no_turns" if listed is None else "malformed",
        )
    read = ReadTurns()
    entries = [_read_entry(turn, number, read) for number, turn in enumerate(listed, start=1)]
    read.turns = _with_system(attach_tools(read_turns(entries), values.get(TOOLS_KEY)), values)
    return read


def _hint(values: Mapping[str, Any]) -> str:
    """Return a hint at what the record seems to be, or at the key that seems to hold the records, if any."""
    if "chosen" in values and "rejected" in values:
        return '. It is a preference: set data.kind = "preferences" (train.objective = "dpo" does so)'
    for name, value in list(values.items())[:20]:
        inner = value[0] if isinstance(value, list) and value else value
        if isinstance(inner, Mapping) and any(key in inner for key in CONVERSATION_KEYS):
            return f". Records seem to be under {printable(name)!r}: save them as one list"
    return ""


def _parse_turns(text: str) -> Any:
    try:
        return parse_json(text)
    except RecordError as error:
        raise RecordError(
            f"`conversations` is text that is not JSON ({error}); expected a list of turns", reason=error.reason
        ) from error


def _with_system(turns: tuple[Turn, ...], values: Mapping[str, Any]) -> tuple[Turn, ...]:
    """Prepend the text of a record's ``system`` key, if it is not empty."""
    system, spoken = split_system(turns)
    for name in SYSTEM_KEYS:
        text = values.get(name)
        if text is None or text == "":
            continue
        if not isinstance(text, str):
            raise RecordError(f"`{name}` is {type(text).__name__}; expected a text", reason="malformed")
        if system not in (None, text):
            raise RecordError(
                f"two system prompts: {short_repr(system)} and, in `{name}`, {short_repr(text)}; expected one",
                reason="malformed",
            )
        system = text
    return (Turn("system", system), *spoken) if system else tuple(spoken)


def _read_entry(turn: Any, number: int, read: ReadTurns) -> Any:
    """Return a turn in the form of `read_turns`: keys checked, parts joined."""
    if not isinstance(turn, Mapping):
        return turn  # `read_turns` rejects it
    where = f"turn {number}"
    read.ignored += check_turn_keys(turn, where, find_role(turn.get("role") or turn.get("from")))
    entry: dict[str, Any] = {"learnt": _is_supervised(turn, where)}
    for one, other in (("role", "from"), ("content", "value")):
        present = [name for name in (one, other) if turn.get(name) is not None]
        if len(present) == 2 and turn[one] != turn[other]:
            raise RecordError(f"{where} has both `{one}` and `{other}`; expected one of them", reason="malformed")
        entry |= {name: turn[name] for name in present}
    entry |= {name: turn[name] for name in ("tool_calls", "tool_call_id", "name") if not is_absent(turn.get(name))}
    for name in ("content", "value"):
        if isinstance(entry.get(name), list):
            entry[name] = _join_parts(entry[name], where, read, str(entry.get("role", entry.get("from"))))
    return entry


def _is_supervised(turn: Mapping[str, Any], where: str) -> bool:
    """Return whether the weight of a turn (0 or 1, False or True) supervises it. Raises RecordError for any other."""
    supervised = True
    for name in WEIGHT_KEYS:
        value = turn.get(name)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RecordError(
                f"{where}: `{name}` is {short_repr(value)}; expected 0 or 1 (false or true): an answer is supervised "
                "or not. Round it, or remove the turn",
                reason="unsupported",
            )
        role = str(turn.get("role", turn.get("from"))).strip().lower()
        if value and role in ("human", "user", "system", "developer"):
            reject_key(f"{where}: `{name}` = {short_repr(value)} of {role!r}", "only answers are supervised")
        supervised = supervised and bool(value)
    return supervised


def _join_parts(parts: list[Any], where: str, read: ReadTurns, role: str) -> str:
    texts: list[str | None] = []
    for number, part in enumerate(parts, start=1):
        place = f"{where}, part {number}"
        if not isinstance(part, Mapping):
            raise RecordError(
                f'{place} is {type(part).__name__}; expected an object such as {{"type": "text", "text": ...}}',
                reason="malformed",
            )
        kind = _kind_of(part, place)
        _check_part_keys(part, kind, place, read)
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise RecordError(
                    f"{place}: `text` is {type(part.get('text')).__name__}; expected a string", reason="malformed"
                )
            texts.append(part["text"])
            continue
        if role.strip().lower() in ("system", "developer"):
            raise RecordError(f"{place} is an image in the system prompt; expected a text", reason="unsupported")
        texts.append(None)
        read.images.append(_image_of(part))
        index = part.get("index")
        if index is not None and index != len(read.images) - 1:
            reject_key(f"{place}: `index` = {short_repr(index)}", "images are used in their order")
    return join_parts(texts)


def _kind_of(part: Mapping[str, Any], place: str) -> str:
    """Return "text" or "image". Raises RecordError that names any other type."""
    kind = part.get("type")
    if kind is None:  # some formats have {"image": ...} and {"text": ...} alone
        present = [name for name in ("text", "image", "image_url") if part.get(name) is not None]
        kind = present[0] if len(present) == 1 else None
    if isinstance(kind, str) and kind in _TEXT_PARTS:
        return "text"
    if isinstance(kind, str) and kind in _IMAGE_PARTS:
        return "image"
    raise RecordError(
        f"{place}: `type` is {short_repr(kind)}, which is not supported; expected "
        f"{', '.join(map(repr, (*_TEXT_PARTS, *_IMAGE_PARTS)))}. Fix or remove the record",
        reason="malformed" if kind is None else "unsupported",
    )


def _check_part_keys(part: Mapping[str, Any], kind: str, place: str, read: ReadTurns) -> None:
    """Raise RecordError for keys of another kind of part, and for keys that would be lost."""
    others = ("image", "image_url") if kind == "text" else ("text",)
    for name in others:
        if not is_absent(part.get(name)):
            reject_key(
                f"{place}: `{name}` of a part of type {short_repr(part.get('type'))}", "a part is a text or an image"
            )
    read.ignored += check_part_keys(part, _OBEYED_OF_PARTS[kind], place, is_image=kind == "image")


def _image_of(part: Mapping[str, Any]) -> Any:
    """Return a part's reference to its image, None without one."""
    present = [name for name in _IMAGE_NAMES if not is_absent(part.get(name))]
    images = [_image_at(part[name]) for name in present]
    if any(other != images[0] for other in images[1:]):
        names = " and ".join(f"`{name}`" for name in present)
        raise RecordError(f"{names} of a part hold different images; expected one of them", reason="malformed")
    return images[0] if images else None


def _image_at(value: Any) -> Any:
    """Return the value of OpenAI's ``{"url": …}``, anything else unchanged."""
    is_wrapped = isinstance(value, Mapping) and not is_absent(value.get("url"))
    return value["url"] if is_wrapped else value


def count_markers(turns: tuple[Turn, ...]) -> int:
    """Count the image markers of questions and answers; a system prompt cannot hold images."""
    return sum(turn.value.count(IMAGE_TOKEN) for turn in turns if turn.role != "system")

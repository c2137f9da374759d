"""The turns of a record: roles in any words, content parts made text with image markers, weights obeyed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llava_ray.chat.conversation import IMAGE_TOKEN, Turn, join_parts, read_turns, split_system
from llava_ray.data.json_text import parse_json
from llava_ray.data.record_keys import (
    CONVERSATION_KEYS,
    SYSTEM_KEYS,
    WEIGHT_KEYS,
    check_part_keys,
    check_turn_keys,
    is_absent,
    printable,
    reject_key,
)
from llava_ray.errors import RecordError
from llava_ray.reading import shown

_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url", "input_image")
_IMAGE_NAMES = ("image", "image_url", "path", "url")
_OBEYED_OF_PARTS = {"text": {"type", "text"}, "image": {"type", "index", "detail", *_IMAGE_NAMES}}


@dataclass
class ReadTurns:
    """What a record says, which images its content parts name, and which keys of turns and parts were read past."""

    turns: tuple[Turn, ...] = ()
    images: list[Any] = field(default_factory=list)
    """One for each image part, None for one that names no image."""
    ignored: list[str] = field(default_factory=list)


def read_record_turns(values: Mapping[str, Any]) -> ReadTurns:
    """Read a record's turns, with the system's text from wherever it stands. Raises RecordError."""
    found = [(name, values[name]) for name in CONVERSATION_KEYS if values.get(name) is not None]
    full = [pair for pair in found if not is_absent(pair[1])]
    if len(full) > 1 and full[0][1] != full[1][1]:
        raise RecordError(
            "both `conversations` and `messages` hold turns, and other ones; expected one of them", reason="malformed"
        )
    name, listed = next(iter(full or found), ("conversations", None))
    if isinstance(listed, str):  # Parquet tables often hold them as JSON text
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
    read.turns = _with_system(read_turns(entries), values)
    return read


def _hint(values: Mapping[str, Any]) -> str:
    """Say where the records seem to lie, if not here."""
    for name, value in list(values.items())[:20]:
        inner = value[0] if isinstance(value, list) and value else value
        if isinstance(inner, Mapping) and any(key in inner for key in CONVERSATION_KEYS):
            return f". Records seem to lie under {printable(name)!r}: save them as one list"
    return ""


def _parse_turns(text: str) -> Any:
    try:
        return parse_json(text)
    except RecordError as error:
        raise RecordError(
            f"`conversations` is text that is not JSON ({error}); expected a list of turns", reason=error.reason
        ) from error


def _with_system(turns: tuple[Turn, ...], values: Mapping[str, Any]) -> tuple[Turn, ...]:
    """Put the text of a record's ``system`` key in front, if it says anything."""
    told, spoken = split_system(turns)
    for name in SYSTEM_KEYS:
        text = values.get(name)
        if text is None or text == "":
            continue
        if not isinstance(text, str):
            raise RecordError(f"`{name}` is {type(text).__name__}; expected a text", reason="malformed")
        if told not in (None, text):
            raise RecordError(
                f"two texts of the system: {shown(told)} and, in `{name}`, {shown(text)}; expected one",
                reason="malformed",
            )
        told = text
    return (Turn("system", told), *spoken) if told else tuple(spoken)


def _read_entry(turn: Any, number: int, read: ReadTurns) -> Any:
    """Return a turn as `read_turns` takes it: its own keys checked, its parts joined."""
    if not isinstance(turn, Mapping):
        return turn  # refused there
    where = f"turn {number}"
    read.ignored += check_turn_keys(turn, where)
    entry: dict[str, Any] = {"learnt": _is_learnt(turn, where)}
    for one, other in (("role", "from"), ("content", "value")):
        given = [name for name in (one, other) if turn.get(name) is not None]
        if len(given) == 2 and turn[one] != turn[other]:
            raise RecordError(f"{where} has both `{one}` and `{other}`; expected one of them", reason="malformed")
        entry |= {name: turn[name] for name in given}
    for name in ("content", "value"):
        if isinstance(entry.get(name), list):
            entry[name] = _join_parts(entry[name], where, read, str(entry.get("role", entry.get("from"))))
    return entry


def _is_learnt(turn: Mapping[str, Any], where: str) -> bool:
    """Obey the weight of a turn: 0 or 1, False or True. Raises RecordError for any other."""
    learnt = True
    for name in WEIGHT_KEYS:
        value = turn.get(name)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RecordError(
                f"{where}: `{name}` is {shown(value)}; expected 0 or 1 (false or true): an answer is learnt or it is "
                "not. Round it, or remove the turn",
                reason="unsupported",
            )
        role = str(turn.get("role", turn.get("from"))).strip().lower()
        if value and role in ("human", "user", "system", "developer"):
            reject_key(f"{where}: `{name}` = {shown(value)} of {role!r}", "only answers are learnt")
        learnt = learnt and bool(value)
    return learnt


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
            raise RecordError(f"{place} is an image of the system; expected a text", reason="unsupported")
        texts.append(None)
        read.images.append(_image_of(part))
        index = part.get("index")
        if index is not None and index != len(read.images) - 1:
            reject_key(f"{place}: `index` = {shown(index)}", "images are taken in their order")
    return join_parts(texts)


def _kind_of(part: Mapping[str, Any], place: str) -> str:
    """Return "text" or "image". Raises RecordError that names any other type."""
    kind = part.get("type")
    if kind is None:  # some write {"image": ...} and {"text": ...} alone
        given = [name for name in ("text", "image", "image_url") if part.get(name) is not None]
        kind = given[0] if len(given) == 1 else None
    if isinstance(kind, str) and kind in _TEXT_PARTS:
        return "text"
    if isinstance(kind, str) and kind in _IMAGE_PARTS:
        return "image"
    raise RecordError(
        f"{place}: `type` is {shown(kind)}, which cannot be learnt from; expected "
        f"{', '.join(map(repr, (*_TEXT_PARTS, *_IMAGE_PARTS)))}. Fix or remove the record",
        reason="malformed" if kind is None else "unsupported",
    )


def _check_part_keys(part: Mapping[str, Any], kind: str, place: str, read: ReadTurns) -> None:
    """Raise RecordError for keys of another kind, and such as would be lost."""
    others = ("image", "image_url") if kind == "text" else ("text",)
    for name in others:
        if not is_absent(part.get(name)):
            reject_key(f"{place}: `{name}` of a part of type {shown(part.get('type'))}", "a part is a text or an image")
    read.ignored += check_part_keys(part, _OBEYED_OF_PARTS[kind], place, is_image=kind == "image")


def _image_of(part: Mapping[str, Any]) -> Any:
    """Return what a part says of its image, None for nothing."""
    given = [name for name in _IMAGE_NAMES if not is_absent(part.get(name))]
    told = [_image_at(part[name]) for name in given]
    if any(other != told[0] for other in told[1:]):
        names = " and ".join(f"`{name}`" for name in given)
        raise RecordError(f"a part has {names}, and other images in them; expected one of them", reason="malformed")
    return told[0] if told else None


def _image_at(value: Any) -> Any:
    """Return what OpenAI's ``{"url": …}`` holds, anything else as it is."""
    is_wrapped = isinstance(value, Mapping) and not is_absent(value.get("url"))
    return value["url"] if is_wrapped else value


def count_markers(turns: tuple[Turn, ...]) -> int:
    """Count the image markers of what is spoken; in the system's text no image can stand."""
    return sum(turn.value.count(IMAGE_TOKEN) for turn in turns if turn.role != "system")

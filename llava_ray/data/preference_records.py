"""Preference records: the form of TRL, LLaVA-RLHF's, RLAIF-V's and RLHF-V's, each as the two conversations it compares.

Each side is then an instruction record, so turns, images and keys are read and checked as everywhere else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from llava_ray.chat.conversation import IMAGE_TOKEN, Turn, find_role
from llava_ray.data.json_text import parse_json
from llava_ray.data.record_keys import CONVERSATION_KEYS, IMAGE_KEYS, OUTPUTS, SIDES, is_absent
from llava_ray.errors import RecordError
from llava_ray.reading import short_repr

PROVENANCE_KEY = "provenance"  # where our own preferences come from; never read by training
_EXPECTED = (
    'expected `prompt`, `chosen` and `rejected` (texts or lists of messages), or LLaVA-RLHF\'s "conversations", '
    '"output_1", "output_2" and "preference"'
)


def is_preference(values: Mapping[str, Any]) -> bool:
    """Return whether a record seems to be a preference, of any form."""
    text = values.get("text")
    in_text = isinstance(text, str) and all(f'"{name}"' in text for name in SIDES)
    return in_text or any(all(name in values for name in names) for names in (SIDES, OUTPUTS))


@dataclass(frozen=True)
class PreferenceSides:
    """A preference record as two instruction records, and the messages at the end of each that are its answer."""

    chosen: dict[str, Any]
    rejected: dict[str, Any]
    num_chosen: int
    num_rejected: int


def split_preference(values: Mapping[str, Any]) -> PreferenceSides:
    """Split a preference record into its sides. Raises RecordError for a record of no known form."""
    values = {key: value for key, value in values.items() if key != PROVENANCE_KEY}
    if all(name in values for name in OUTPUTS):
        prompt, sides, used = *_read_outputs(values), {*CONVERSATION_KEYS, *OUTPUTS, "preference"}
    else:
        text = values.get("text")
        if isinstance(text, str) and all(values.get(name) is None for name in SIDES):  # RLHF-V's column of JSON
            values = _with_parsed(values, text)
        prompt, sides, used = *_read_sides(values), {"prompt", "question", *SIDES}
    rest = {key: value for key, value in values.items() if key not in used}
    has_images = any(not is_absent(values.get(name)) for name in IMAGE_KEYS)
    prompt = _with_markers(prompt, values) if has_images else prompt
    chosen, rejected = ({**rest, "messages": [*prompt, *side]} for side in sides)
    return PreferenceSides(chosen, rejected, *map(len, sides))


def join_sides(
    chosen: Sequence[Turn], rejected: Sequence[Turn], sides: PreferenceSides
) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
    """Return the turns of the prompt and the chosen answer, and those of the rejected answer.

    Answers within the prompt are not supervised. Raises RecordError for sides that do not answer the same prompt, or
    that are equal.
    """
    prompt, better = chosen[: -sides.num_chosen], chosen[-sides.num_chosen :]
    other_prompt, worse = rejected[: -sides.num_rejected], rejected[-sides.num_rejected :]
    if prompt != other_prompt or not any(turn.role == "human" for turn in prompt):
        raise RecordError(
            "chosen and rejected do not answer the same prompt; expected one `prompt`, or the same messages at the "
            "start of both",
            reason="no_prompt",
        )
    if any(not side or side[0].role != "gpt" for side in (better, worse)):
        raise RecordError("a side does not begin with an answer of the assistant; fix the record", reason="roles")
    _check_answers(better, worse)
    quiet = tuple(replace(turn, supervised=False) if turn.role == "gpt" else turn for turn in prompt)
    return (*quiet, *better), tuple(worse)


def _check_answers(better: Sequence[Turn], worse: Sequence[Turn]) -> None:
    """Raise RecordError for sides that are equal, that part at a question, or that lack an answer to learn."""
    if any(side[-1].role != "gpt" for side in (better, worse)):
        raise RecordError("a side does not end with an answer of the assistant; fix the record", reason="roles")
    if not (better[0].supervised and worse[0].supervised):
        raise RecordError(
            "a side begins with an answer that is not trained on (weight, loss or train is 0 or false); where both "
            "sides have it, move it into the prompt, otherwise remove the record",
            reason="nothing_to_learn",
        )
    # White space around an answer is nothing to prefer: templates drop it.
    both = [[replace(turn, value=turn.value.strip()) for turn in side] for side in (better, worse)]
    parted = next((pair for pair in zip(*both, strict=False) if pair[0] != pair[1]), None)
    if parted is None:
        what = "equal" if len(better) == len(worse) else "equal as far as the shorter one goes"
        raise RecordError(f"chosen and rejected are {what}: there is nothing to prefer", reason="equal_sides")
    if any(turn.role != "gpt" for turn in parted):
        raise RecordError(
            "chosen and rejected do not answer the same prompt: the first difference between them is no answer but "
            f"{short_repr(parted[0].value)} and {short_repr(parted[1].value)}",
            reason="no_prompt",
        )


def _read_outputs(values: Mapping[str, Any]) -> tuple[list[Any], list[list[Any]]]:
    """Return the prompt and the sides, the better one first, of LLaVA-RLHF's form."""
    found = [values[name] for name in CONVERSATION_KEYS if not is_absent(values.get(name))]
    prompt = _messages(found[0] if found else None, "conversations", "human")
    sides = [_messages(_text_of(values[name]), name, "gpt") for name in OUTPUTS]
    preferred = values.get("preference")
    if isinstance(preferred, bool) or preferred not in (1, 2):
        raise RecordError(
            f"`preference` is {short_repr(preferred)}; expected 1 or 2, the better output. Remove ties",
            reason="malformed",
        )
    return prompt, sides if preferred == 1 else sides[::-1]


def _text_of(value: Any) -> Any:
    """Return the text of one of LLaVA-RLHF's outputs, whose speaker is the name of a model."""
    return value["value"] if isinstance(value, Mapping) and isinstance(value.get("value"), str) else value


def _with_parsed(values: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Return a record with what its ``text`` holds. Raises RecordError where that contradicts another column."""
    parsed, others = _parsed_text(text), {key: value for key, value in values.items() if key != "text"}
    for key in parsed.keys() & others.keys():
        if not is_absent(others[key]) and others[key] != parsed[key]:
            raise RecordError(f"`{key}` differs from that in `text`; expected one of them", reason="malformed")
    return others | parsed


def _parsed_text(text: str) -> dict[str, Any]:
    """Parse RLHF-V's column: an object with question, chosen and rejected."""
    try:
        parsed = parse_json(text.encode("utf-8", "surrogatepass"))
    except RecordError:
        parsed = None
    if not isinstance(parsed, dict) or not all(name in parsed for name in SIDES):
        raise RecordError(
            f"`text` is no JSON object with question, chosen and rejected; {_EXPECTED}", reason="no_turns"
        )
    return parsed


def _read_sides(values: Mapping[str, Any]) -> tuple[list[Any], list[list[Any]]]:
    """Return the prompt and the sides of TRL's and RLAIF-V's forms; without a prompt, what both sides begin with."""
    lacking = [name for name in SIDES if _is_missing(values.get(name))]
    if lacking:
        raise RecordError(f"no preference: `{lacking[0]}` is missing or empty; {_EXPECTED}", reason="no_turns")
    sides = [_messages(values[name], name, "gpt") for name in SIDES]
    asked = [values[name] for name in ("prompt", "question") if not _is_missing(values.get(name))]
    if len(asked) > 1 and asked[0] != asked[1]:
        raise RecordError("`prompt` and `question` differ; expected one of them", reason="malformed")
    listed = next((values[name] for name in CONVERSATION_KEYS if not is_absent(values.get(name))), None)
    if listed is not None:
        raise RecordError(
            "a preference record has `prompt` in place of `conversations` or `messages`; rename it", reason="malformed"
        )
    if asked:
        return _messages(asked[0], "prompt", "human"), sides
    shared = list(takewhile(lambda pair: pair[0] == pair[1], zip(*sides, strict=False)))
    # An answer with which both sides begin is a part of the prompt only if another question follows it.
    num_shared = min(len(shared), *(len(side) - 1 for side in sides))
    while num_shared and _is_answer(sides[0][num_shared - 1]):
        num_shared -= 1
    if not num_shared and _written(sides[0][0]) == _written(sides[1][0]):
        raise RecordError(
            "chosen and rejected show different images with the same question; expected the same images on both sides",
            reason="image_mismatch",
        )
    if not num_shared:
        raise RecordError(
            "`chosen` and `rejected` without a `prompt`, and they do not begin with the same question; add the prompt",
            reason="no_prompt",
        )
    return sides[0][:num_shared], [side[num_shared:] for side in sides]


def _is_missing(value: Any) -> bool:
    """Return whether a text or list is missing; "None" and "null" are answers that a model may give."""
    return not value.strip() if isinstance(value, str) else is_absent(value)


def _messages(value: Any, name: str, speaker: str) -> list[Any]:
    """Return messages as a list: a plain text is one message of ``speaker``. Raises RecordError."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":  # tables may hold lists as JSON
        try:
            parsed = parse_json(value)
        except RecordError:
            parsed = None
        value = parsed if isinstance(parsed, list) and parsed and all(map(_is_message, parsed)) else value
    if isinstance(value, str) and value.strip():
        return [{"role": "user" if speaker == "human" else "assistant", "content": value}]
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list) and value and all(map(_is_message, value)):
        return [_without_nothing(message) for message in value]
    raise RecordError(f"`{name}` is {short_repr(value)}; expected a text or a list of messages", reason="malformed")


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and bool({"content", "value", "tool_calls"} & set(value))


def _without_nothing(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without the empty keys by which tables fill its content parts."""
    kept = {key: value for key, value in message.items() if value is not None}
    if isinstance(kept.get("content"), list):
        kept["content"] = [
            {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else part
            for part in kept["content"]
        ]
    return kept


def _is_answer(message: Mapping[str, Any]) -> bool:
    return find_role(message.get("role") or message.get("from")) == "gpt"


def _with_markers(prompt: list[Any], values: Mapping[str, Any]) -> list[Any]:
    """Put the images before the first question, as TRL does, where the prompt says nothing of where they stand."""
    if any(IMAGE_TOKEN in _written(message) or _has_image_part(message) for message in prompt):
        return prompt
    found = next(values[name] for name in IMAGE_KEYS if not is_absent(values.get(name)))
    markers = f"{IMAGE_TOKEN}\n" * (len(found) if isinstance(found, list) else 1)
    for number, message in enumerate(prompt):
        if find_role(message.get("role") or message.get("from")) == "human":
            key = "content" if message.get("content") is not None else "value"
            return [*prompt[:number], {**message, key: markers + _written(message)}, *prompt[number + 1 :]]
    return prompt


def _written(message: Mapping[str, Any]) -> str:
    """Return the text of a message."""
    content = message.get("content") if message.get("content") is not None else message.get("value")
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def _has_image_part(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return isinstance(content, list) and any(
        isinstance(part, Mapping) and "image" in str(part.get("type", "image" if "image" in part else ""))
        for part in content
    )

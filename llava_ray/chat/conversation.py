"""Conversations as turns, and LLaVA's JSON parsed into them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Literal, cast

from llava_ray.errors import RecordError
from llava_ray.reading import short_repr

if TYPE_CHECKING:
    pass

IMAGE_TOKEN = "<image>"  # never in the vocabulary: text is split on it
# LLaVA's placeholder for an image in a list of ids. No vocabulary has negative ids, so it cannot collide with text, and
# the embedding table need not grow; the model replaces it by image features before the language model runs.
IMAGE_TOKEN_INDEX = -200
IGNORE_INDEX = -100  # the label of unsupervised positions: PyTorch's cross-entropy skips it

_Role = Literal["human", "gpt", "system"]

# LLaVA's role names, those of OpenAI's message lists, and the assistants of ShareGPT's dumps; in any letter case.
_ROLES: dict[str, _Role] = {
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "model": "gpt",
    "chatgpt": "gpt",
    "bing": "gpt",
    "bard": "gpt",
    "system": "system",
    "developer": "system",
}
_TOOL_ROLES = {"tool", "function", "function_call", "function_response", "tool_call", "tool_response", "observation"}

_UNLEARNT = "_unlearnt"  # suffix of the role of an unsupervised answer in stored turns (part of the shard format)


@dataclass(frozen=True)
class Turn:
    """One message. ``value`` may hold image markers.

    A conversation may begin with a system turn, whose text replaces the template's system prompt.
    """

    role: _Role
    value: str
    supervised: bool = True
    """Whether an answer is supervised; a question never is."""

    def to_row(self) -> dict[str, str]:
        """Convert the turn to its stored form."""
        return {"role": self.role + ("" if self.supervised else _UNLEARNT), "value": self.value}

    @classmethod
    def from_row(cls, row: Mapping[str, str]) -> Turn:
        """Build a turn from what `to_row` returned."""
        role = row["role"].removesuffix(_UNLEARNT)
        return cls(cast("_Role", role), row["value"], supervised=role == row["role"])


@dataclass(frozen=True)
class Span:
    """A piece of a rendered conversation; ``supervised`` if the model is trained to produce it."""

    text: str
    supervised: bool
    message_ranges: tuple[tuple[int, int], ...] = field(default=(), compare=False)
    """Ranges (start and stop) of characters from messages; all others are the template's."""


def read_turns(conversations: Sequence[Mapping[str, object]]) -> tuple[Turn, ...]:
    """Read a record's ``conversations`` list, in LLaVA's form or OpenAI's, into alternating turns.

    Leading system turns are merged, as in serving. A leading answer is dropped, as the original did. Raises
    RecordError with reason ``roles`` (an unknown speaker), ``malformed`` (a turn without text), ``no_turns``,
    ``alternation`` or ``empty_answer``.
    """
    if not isinstance(conversations, Sequence) or isinstance(conversations, str | bytes):
        raise RecordError(
            f"`conversations` is {type(conversations).__name__}; expected a list of turns, "
            'each {"from": "human" or "gpt", "value": text}.',
            reason="malformed",
        )
    turns = [_read_turn(entry, number) for number, entry in enumerate(conversations, start=1)]
    system_turns = list(takewhile(lambda turn: turn.role == "system", turns))
    turns = turns[len(system_turns) :]
    if turns and turns[0].role == "gpt":
        turns = turns[1:]
    check_turns(turns)
    system = "\n".join(turn.value for turn in system_turns)
    return (Turn("system", system), *turns) if system else tuple(turns)


def split_system(turns: Sequence[Turn]) -> tuple[str | None, Sequence[Turn]]:
    """Return the system prompt (None where there is none) and the turns that follow it."""
    if turns and turns[0].role == "system":
        return turns[0].value, turns[1:]
    return None, turns


def first_question(turns: Sequence[Turn]) -> tuple[str | None, Sequence[Turn], Turn] | None:
    """Return the system prompt, the turns before the first supervised answer, and that answer; None without one."""
    system, spoken = split_system(turns)
    place = next((index for index, turn in enumerate(spoken) if turn.role == "gpt" and turn.supervised), None)
    return None if place is None else (system, spoken[:place], spoken[place])


def check_turns(turns: Sequence[Turn], *, supervised: bool = True) -> None:
    """Raise RecordError unless turns alternate, beginning with a question, and no supervised answer is empty.

    An unsupervised answer, and with ``supervised=False`` any answer, may be empty.
    """
    if not turns:
        raise RecordError(
            "the conversation has no turns; expected a human turn first. Remove the record.",
            reason="no_turns",
        )
    for index, turn in enumerate(turns):
        expected: _Role = "gpt" if index % 2 else "human"
        if turn.role == "system":
            raise RecordError(
                f"turn {index + 1} of {len(turns)} is a system turn (begins {turn.value[:40]!r}); expected it before "
                "all others. Move it to the front, or remove it.",
                reason="roles",
            )
        if turn.role != expected:
            raise RecordError(
                f"turn {index + 1} of {len(turns)} is from {turn.role!r} (begins {turn.value[:40]!r}); "
                f"expected {expected!r}: human and gpt must alternate, human first. "
                "Merge or remove adjacent turns of one speaker.",
                reason="alternation",
            )
        if supervised and turn.supervised and turn.role == "gpt" and not turn.value.strip():
            raise RecordError(
                f"turn {index + 1} of {len(turns)} is an empty answer ({turn.value!r}); "
                "expected text to train on. Remove the exchange.",
                reason="empty_answer",
            )


def _read_turn(entry: Mapping[str, object], number: int) -> Turn:
    if not isinstance(entry, Mapping):
        raise RecordError(
            f'turn {number} is {type(entry).__name__}; expected an object {{"from": ..., "value": ...}}.',
            reason="malformed",
        )
    role_key = "role" if entry.get("role") is not None else "from"
    text_key = "content" if entry.get("content") is not None else "value"
    if role_key == "role" and entry.get("value") is None:
        text_key = "content"
    role, text = entry.get(role_key), entry.get(text_key)
    known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        tools = isinstance(role, str) and role.strip().lower() in _TOOL_ROLES
        raise RecordError(
            f"turn {number}: {role_key!r} is {short_repr(role)}; expected one of {', '.join(_ROLES)}. "
            + ("Tool turns are not supported: remove the record." if tools else "Fix or remove the turn."),
            reason="roles",
        )
    if not isinstance(text, str):
        raise RecordError(
            f"turn {number} (from {role!r}): {text_key!r} is {type(text).__name__}; expected a string, "
            f"with {IMAGE_TOKEN} where an image stands.",
            reason="malformed",
        )
    return Turn(known, text, supervised=entry.get("learnt") is not False)


def with_markers(question: str, num_images: int) -> str:
    """Prepend a marker for each image to a question that has none."""
    return question if IMAGE_TOKEN in question else f"{IMAGE_TOKEN}\n" * num_images + question


def join_parts(parts: Iterable[str | None]) -> str:
    """Join the texts and images (None) of one message, each on a line of its own: in training as in serving."""
    return "\n".join(IMAGE_TOKEN if part is None else part for part in parts)


def break_markers(text: str) -> str:
    """Break up image markers in text that has no images: each would otherwise wait for an image."""
    return text.replace(IMAGE_TOKEN, "< image >")

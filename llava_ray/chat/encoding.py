"""A piece of a written conversation, encoded with no control tokens but the template's own."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_ray.errors import RecordError

if TYPE_CHECKING:
    from llava_ray.chat.controls import Controls, Range


@dataclass(frozen=True)
class EncodedText:
    """The text between two images, encoded."""

    start: int
    """Where it stands in the whole text."""
    text: str
    ids: Sequence[int]
    offsets: Sequence[Range]
    """Which of its characters each token covers."""


def without_forged(chunk: EncodedText, said: bytes, controls: Controls) -> EncodedText:
    """Return a chunk in which no control token covers what a message says; ``said`` is not 0 there.

    Most hold none, and are returned as they are. Raises RecordError for a tokenizer that cannot tell them apart.
    """
    found = controls.find(chunk.ids, chunk.offsets, chunk.text)
    if any(any(said[start:stop]) for _, start, stop in found):
        return encode_apart(chunk, _find_own(chunk, said, controls, found), controls)
    return chunk


def encode_apart(chunk: EncodedText, own: Sequence[tuple[int, int, int]], controls: Controls) -> EncodedText:
    """Encode a chunk again with no control tokens but ``own`` (id, start and stop), which get names for this.

    Raises RecordError ("control_tokens") for a tokenizer that does not find these.
    """
    written, pieces, place = 0, [], 0
    starts, origins = [0], [0]  # of the pieces, in the new text and in the chunk's: every second is a name
    for token, start, stop in own:
        for piece, end in ((chunk.text[place:start], start), (controls.names[token], stop)):
            pieces.append(piece)
            written += len(piece)
            starts.append(written)
            origins.append(end)
        place = stop
    text = "".join([*pieces, chunk.text[place:]])
    encoded = controls.respelt.encode(text, add_special_tokens=False)
    names = {name: token for token, name in controls.names.items()}
    again = [
        (token, names.get(text[start:stop])) for token, start, stop in controls.find(encoded.ids, encoded.offsets, text)
    ]
    if [pair for pair in again if pair != (controls.unknown, None)] != [(token, token) for token, *_ in own]:
        raise RecordError(
            "a message holds control tokens written out as text, and this tokenizer does not find the template's own "
            "once they are told apart. Take them out of the message, or load the model's original tokenizer.json.",
            reason="control_tokens",
        )

    def origin(place: int) -> int:
        """Return where a character of the new text comes from; those of a name from their token's first."""
        piece = bisect_right(starts, place) - 1
        return origins[piece] if piece % 2 else origins[piece] + place - starts[piece]

    return EncodedText(
        chunk.start, chunk.text, encoded.ids, [(origin(start), origin(stop)) for start, stop in encoded.offsets]
    )


def _find_own(
    chunk: EncodedText, said: bytes, controls: Controls, found: Sequence[tuple[int, int, int]]
) -> list[tuple[int, int, int]]:
    """Return id, start and stop of the template's control tokens, with those that a forged one took characters of."""
    own = {}
    for token, start, stop in found:
        known = token != controls.unknown or chunk.text[start:stop] == controls.spellings[token]
        if known and start < stop and not any(said[start:stop]):
            own[start] = (token, start, stop)
    tokens = {spelling: token for token, spelling in controls.spellings.items()}
    across = [(start, stop) for _, start, stop in found if any(said[start:stop]) and not all(said[start:stop])]
    for stretch in re.finditer(rb"\0+", said) if across else ():
        for match in controls.pattern.finditer(chunk.text, *stretch.span()):
            start, stop = match.span()
            if any(first < stop and start < last for first, last in across):
                own[start] = (tokens[match[0]], start, stop)
    return [own[start] for start in sorted(own)]

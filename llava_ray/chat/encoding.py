"""Encoding of a piece of a rendered conversation with no control tokens but the template's own."""

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
    """The encoded text between two images."""

    start: int
    """The position of its first character in the whole text."""
    text: str
    ids: Sequence[int]
    offsets: Sequence[Range]
    """The range of characters that each token covers."""


def without_forged(chunk: EncodedText, owners: bytes, controls: Controls) -> EncodedText:
    """Return a chunk in which no control token covers a message's characters; ``owners`` is not 0 there.

    Most chunks hold none and are returned unchanged. Raises RecordError for a tokenizer that cannot separate them.
    """
    found = controls.find(chunk.ids, chunk.offsets, chunk.text)
    if any(any(owners[start:stop]) for _, start, stop in found):
        return encode_apart(chunk, _find_own(chunk, owners, controls, found), controls)
    return chunk


def encode_apart(chunk: EncodedText, own: Sequence[tuple[int, int, int]], controls: Controls) -> EncodedText:
    """Encode a chunk again with no control tokens but ``own`` (id, start and stop), written by their random names.

    Raises RecordError ("control_tokens") for a tokenizer that does not find these.
    """
    written, pieces, place = 0, [], 0
    starts, origins = [0], [0]  # of the pieces, in the new text and in the chunk: every second piece is a name
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
        """Map a position in the new text to the chunk; all positions in a name map to its token's start."""
        piece = bisect_right(starts, place) - 1
        return origins[piece] if piece % 2 else origins[piece] + place - starts[piece]

    return EncodedText(
        chunk.start, chunk.text, encoded.ids, [(origin(start), origin(stop)) for start, stop in encoded.offsets]
    )


def _find_own(
    chunk: EncodedText, owners: bytes, controls: Controls, found: Sequence[tuple[int, int, int]]
) -> list[tuple[int, int, int]]:
    """Return id, start and stop of the template's control tokens, those that a forged token overlaps included."""
    own = {}
    for token, start, stop in found:
        known = token != controls.unknown or chunk.text[start:stop] == controls.spellings[token]
        if known and start < stop and not any(owners[start:stop]):
            own[start] = (token, start, stop)
    tokens = {spelling: token for token, spelling in controls.spellings.items()}
    across = [(start, stop) for _, start, stop in found if any(owners[start:stop]) and not all(owners[start:stop])]
    for stretch in re.finditer(rb"\0+", owners) if across else ():
        for match in controls.pattern.finditer(chunk.text, *stretch.span()):
            start, stop = match.span()
            if any(first < stop and start < last for first, last in across):
                own[start] = (tokens[match[0]], start, stop)
    return [own[start] for start in sorted(own)]

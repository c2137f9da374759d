"""Log-probabilities of a prompt's own tokens, collected while it is read.

A prompt whose tokens are scored is read whole: keys and values that are known from before have no logits.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from llava_ray.generate.builtin.scheduling import PrefillChunk
from llava_ray.generate.logprobs import PromptLogprobs, RankedLogprob

if TYPE_CHECKING:
    from llava_ray.generate.builtin.running_request import RunningRequest

MOST_SCORED = 256  # tokens of a step, of all requests: each takes memory for the logits of the whole vocabulary

_Entry = tuple[int, float, int]  # id, log-probability, rank


class PromptScores:
    """The scores of one prompt, as far as it is read."""

    def __init__(self, ids: Sequence[int], num_best: int) -> None:
        """Initialise for a prompt of these ids, negative ones for images, and the ``num_best`` likeliest tokens."""
        self.ids = ids
        self.num_best = num_best
        self.is_finite = True
        """Whether all logits so far are finite."""
        self._parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(self, start: int, logits: Float[Tensor, "n vocab"]) -> None:
        """Add the logits after the tokens from ``start`` on: they score the tokens from ``start + 1`` on."""
        self.is_finite = self.is_finite and bool(logits.isfinite().all())
        mine = [max(0, token) for token in self.ids[start + 1 : start + 1 + len(logits)]]
        tokens = torch.tensor(mine, device=logits.device).unsqueeze(1)
        every = logits.log_softmax(-1)
        chosen = every.gather(1, tokens)
        ranks = (every > chosen).sum(1) + 1
        best = every.topk(min(self.num_best, every.shape[1]), dim=-1)
        self._parts.append((chosen.squeeze(1).cpu(), ranks.cpu(), best.indices.cpu(), best.values.cpu()))

    def read(self, decode: Callable[[list[int]], str | list[str]]) -> PromptLogprobs:
        """Return the scores of the whole prompt; ``decode`` gives the text of a token."""
        text = functools.cache(lambda token: str(decode([token])))
        scored = itertools.chain.from_iterable(map(_read_part, self._parts))
        found: list[tuple[RankedLogprob, ...] | None] = [None]
        for token, (logprob, rank, best) in zip(self.ids[1:], scored, strict=True):
            if token < 0:
                found.append(None)
                continue
            entries: list[_Entry] = [(token, logprob, rank), *(one for one in best if one[0] != token)]
            found.append(tuple(RankedLogprob(other, text(other), value, place) for other, value, place in entries))
        return tuple(found)


def _read_part(part: tuple[Tensor, Tensor, Tensor, Tensor]) -> Iterator[tuple[float, int, list[_Entry]]]:
    """Yield a token's log-probability and rank, and the likeliest tokens, best first."""
    chosen, ranks, ids, values = (tensor.tolist() for tensor in part)
    for logprob, rank, others, of_others in zip(chosen, ranks, ids, values, strict=True):
        yield logprob, rank, list(zip(others, of_others, range(1, len(others) + 1), strict=True))


def bound_scored(chunks: "Sequence[PrefillChunk[RunningRequest]]") -> "list[PrefillChunk[RunningRequest]]":
    """Shorten the parts of scored prompts to what one step may score; those without room wait for the next."""
    left, kept = MOST_SCORED, []
    for chunk in chunks:
        if chunk.request.scores is None:
            kept.append(chunk)
        elif left:
            kept.append(PrefillChunk(chunk.request, min(left, chunk.num_tokens)))
            left -= kept[-1].num_tokens
    return kept


def score_prompts(
    chunks: "Sequence[PrefillChunk[RunningRequest]]", first: int, wanted: list[int], logits: Tensor
) -> tuple[list[int], Tensor]:
    """Score the parts of prompts that a step has read; return the rows that are left, for the answers' next tokens.

    ``chunks`` are the inputs from ``first`` on, ``wanted`` has the input of each row of ``logits``.
    """
    if all(chunk.request.scores is None for chunk in chunks):
        return wanted, logits
    scored: set[int] = set()
    for index, chunk in enumerate(chunks, start=first):
        if chunk.request.scores is None:
            continue
        start, end = chunk.slots
        place = wanted.index(index)
        last = place + chunk.num_tokens - (end == len(chunk.request.prompt.ids))  # one more for the first new token
        if last > place:
            chunk.request.scores.add(start, logits[place:last])
        scored.update(range(place, last))
    left = [row for row in range(len(wanted)) if row not in scored]
    return [wanted[row] for row in left], logits[left]

"""Speculative decoding by prompt lookup: an answer that repeats its prompt, or itself, is guessed and then checked.

The tokens that followed the last three the time before are taken as a draft. One step computes the logits after each of
them; the tokens that greedy decoding would have chosen anyway are accepted, and the first other one replaces the rest.
So the answer is that of plain greedy decoding, and a step may write several tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from llava_ray.generate.engine import Sampling
from llava_ray.generate.sampling import COLDEST

_MATCHED = 3  # tokens that must have occurred before
_LONGEST_PAUSE = 32  # tokens without a draft after one that was wrong; it doubles from 1

# Settings that a checked draft satisfies as they are. Any other one, once it is set, excludes drafts.
_HARMLESS = frozenset({"max_tokens", "temperature", "top_p", "top_k", "stop", "seed", "ignore_eos"})


def may_draft(sampling: Sampling) -> bool:
    """Return whether drafts leave an answer with these settings as it is: plain greedy ones only."""
    plain = Sampling()
    others = (one.name for one in fields(sampling) if one.name not in _HARMLESS)
    return sampling.temperature < COLDEST and all(getattr(sampling, name) == getattr(plain, name) for name in others)


def count_accepted(draft: Sequence[int], chosen: Sequence[int]) -> int:
    """Return how many tokens of a draft are those that the model chose at their places."""
    pairs = zip(draft, chosen, strict=False)
    return next((place for place, (mine, its) in enumerate(pairs) if mine != its), len(draft))


@dataclass
class DraftSource:
    """The drafts of one answer: where each three tokens occurred last, and how well drafts have done so far."""

    longest: int
    """Most tokens of a draft."""
    ids: list[int] = field(default_factory=list)
    _places: dict[tuple[int, ...], int] = field(default_factory=dict)
    _length: int = 2
    """Tokens of the next draft: more after one that was right to its end."""
    _pause: int = 0
    _waiting: int = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens of prompt or answer; negative ones, which stand for images, match nothing."""
        for token in tokens:
            # What came before is entered now, so that the last three never find themselves.
            if len(self.ids) >= _MATCHED:
                self._places[tuple(self.ids[-_MATCHED:])] = len(self.ids)
            self.ids.append(token)
        self._waiting = max(0, self._waiting - len(tokens))

    def draft(self, most: int) -> list[int]:
        """Return up to ``most`` tokens that may come next, often none."""
        place = self._places.get(tuple(self.ids[-_MATCHED:])) if len(self.ids) >= _MATCHED else None
        if place is None or self._waiting or min(self.ids[-_MATCHED:]) < 0:
            return []
        guessed = self.ids[place : place + min(most, self._length)]
        return guessed[: next((at for at, token in enumerate(guessed) if token < 0), len(guessed))]

    def learn(self, num_drafted: int, num_accepted: int) -> None:
        """Adapt to how a draft did: longer ones while they are right, a pause after one that was wrong at once."""
        if num_accepted == num_drafted:
            self._length, self._pause = min(self.longest, 2 * num_drafted), 0
        else:
            self._length = max(2, min(self.longest, num_accepted + 1))
            self._pause = 0 if num_accepted else min(_LONGEST_PAUSE, max(1, 2 * self._pause))
            self._waiting = self._pause

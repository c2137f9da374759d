"""Changes of a row's logits that a request asks for: penalties of tokens already written, and biases of tokens.

The formulas are OpenAI's (presence and frequency, over the answer's tokens) and that of transformers and vLLM
(repetition, over prompt and answer), in vLLM's order: biases first, then repetition, then frequency and presence.
"""

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llava_ray.errors import RecordError
from llava_ray.generate.engine import Sampling

_LARGEST = 1e30  # of a changed logit: dividing it by the lowest temperature leaves it finite
_SHOWN_IDS = 5  # in an error message


def edits_logits(sampling: Sampling) -> bool:
    """Return whether an answer's logits are changed before its tokens are chosen."""
    return bool(
        sampling.logit_bias
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.repetition_penalty != 1
    )


def check_biased_tokens(sampling: Sampling, num_rows: int, known: Collection[int]) -> None:
    """Check that a logit_bias names tokens below ``num_rows``, the model's vocabulary, among those of its tokenizer.

    Raises RecordError.
    """
    unknown = [token for token, _ in sampling.logit_bias if not 0 <= token < num_rows or token not in known]
    if unknown:
        shown = ", ".join(map(str, unknown[:_SHOWN_IDS])) + (", …" if len(unknown) > _SHOWN_IDS else "")
        raise RecordError(
            f"logit_bias names tokens that this model does not have: {shown}; expected ids below {num_rows} that its "
            "tokenizer knows.",
            reason="sampling",
            field="logit_bias",
        )


class LogitEdits:
    """The changes of one answer's logits, and the tokens that they count.

    Only the logits of these tokens are read and written: a step's cost does not depend on the vocabulary.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], device: torch.device) -> None:
        """Initialise for an answer to ``prompt``, whose image tokens are negative and do not count."""
        self.presence = sampling.presence_penalty
        self.frequency = sampling.frequency_penalty
        # No float in 32 bits is 0 or infinite then.
        self.repetition = min(max(sampling.repetition_penalty, 1 / _LARGEST), _LARGEST)
        self.counts_tokens = bool(self.presence or self.frequency or self.repetition != 1)
        biases = dict(sampling.logit_bias)
        self.biased = torch.tensor(list(biases), dtype=torch.long, device=device)
        self.biases = torch.tensor(list(biases.values()), dtype=torch.float32, device=device)
        self._places: dict[int, int] = {}
        seen = sorted({token for token in prompt if token >= 0}) if self.repetition != 1 else []
        self._ids = torch.tensor(seen, dtype=torch.long, device=device)
        self._counts = torch.zeros(len(seen), device=device)
        """How often the answer has each of these tokens, of which the first ``len(_places)`` are in use."""
        self._places = {token: place for place, token in enumerate(seen)}

    def count(self, token: int) -> None:
        """Count a token that was appended to the answer."""
        if not self.counts_tokens:
            return
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            more = max(64, place)  # doubled, so that appending stays cheap
            self._ids = torch.cat([self._ids, self._ids.new_zeros(more)])
            self._counts = torch.cat([self._counts, self._counts.new_zeros(more)])
        self._ids[place] = token
        self._counts[place] += 1

    def apply(self, logits: Float[Tensor, " vocab"]) -> None:
        """Change the logits of the answer's next token, in place."""
        if len(self.biased):
            logits[self.biased] += self.biases
        if not self._places:
            return
        ids, counts = self._ids[: len(self._places)], self._counts[: len(self._places)]
        scores = logits[ids]
        if self.repetition != 1:
            scores = torch.where(scores > 0, scores / self.repetition, scores * self.repetition)
            scores = scores.clamp(-_LARGEST, _LARGEST)
        logits[ids] = scores - self.frequency * counts - self.presence * (counts > 0)


def edit_rows(edits: Sequence[LogitEdits | None], logits: Float[Tensor, "n vocab"]) -> None:
    """Change the logits of each row by its own edits, in place."""
    for row, mine in enumerate(edits):
        if mine is not None:
            mine.apply(logits[row])

"""The rows of a batch whose next token a grammar restricts.

Their masks are computed while the model runs. A row whose mask is not ready then waits with its logits, outside the
batch, so that a costly grammar never delays the answers of others.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from llava_ray.errors import RecordError
from llava_ray.generate.builtin.running_request import RunningRequest

_PATIENCE_S = 0.02  # of a step, for all masks together
_IDLE_S = 0.05  # of a step that has nothing else to do, for the others
_LIMIT_S = 30.0  # for one mask, after which the answer ends


class ConstrainedRows:
    """The grammars of one batch; used in the model's thread only."""

    def __init__(self) -> None:
        """Create the threads of the masks, which start at the first constrained request."""
        self._quick = ThreadPoolExecutor(1, thread_name_prefix="grammar-masks")
        self._slow = ThreadPoolExecutor(2, thread_name_prefix="slow-grammar-masks")

    def begin(self, running: RunningRequest) -> None:
        """Begin to compute the mask of a request's next token, if a grammar restricts it."""
        if running.prompt.grammar is not None:
            running.prompt.grammar.begin(self._quick, self._slow)

    def exchange(
        self, rows: "list[RunningRequest]", logits: Tensor | None, others: "Sequence[RunningRequest]"
    ) -> "tuple[list[RunningRequest], Tensor | None]":
        """Hold rows whose masks are not ready, and add those of ``others`` that were held and are ready now."""
        held = [running for running in others if running.held is not None]
        if not held and not any(running.prompt.grammar for running in rows):
            return rows, logits
        now = time.monotonic()
        until = now + _PATIENCE_S
        ready, parts = [], []
        for place, running in enumerate(rows):
            assert logits is not None
            grammar = running.prompt.grammar
            # A step waits for a late mask once; it must not be slowed down by a grammar that is always late.
            if grammar is None or _is_ready(running, now if grammar.is_late else until):
                ready.append(place)
            else:
                running.held = logits[place].clone()
            if grammar is not None:
                grammar.is_late = running.held is not None
        until = now if rows else now + _IDLE_S
        released = [running for running in held if _is_ready(running, until)]
        for running in released:
            assert running.held is not None
            parts.append(running.held[None])
            running.held = None
        if logits is not None and ready:
            parts.insert(0, logits if len(ready) == len(rows) else logits[ready])
        return [*(rows[place] for place in ready), *released], torch.cat(parts) if parts else None

    def split_failed(
        self, rows: "Sequence[RunningRequest]", logits: Tensor
    ) -> "tuple[list[RunningRequest], Tensor, list[tuple[RunningRequest, RecordError]]]":
        """Return the rows that can continue, with their logits, and the errors of the others."""
        failed = [
            (running, running.prompt.grammar.failed())
            for running in rows
            if running.prompt.grammar is not None and running.prompt.grammar.forbidden is None
        ]
        if not failed:
            return list(rows), logits, []
        gone = {id(running) for running, _ in failed}
        good = [place for place, running in enumerate(rows) if id(running) not in gone]
        return [rows[place] for place in good], logits[good], failed

    def mask(self, rows: "Sequence[RunningRequest]", logits: Tensor) -> None:
        """Set the logits of tokens that may not follow to -inf, in place."""
        known = {place: running.prompt.grammar for place, running in enumerate(rows)}
        masks = {place: grammar.forbidden for place, grammar in known.items() if grammar is not None}
        if not masks:
            return
        width = min(logits.shape[1], *(len(mask) for mask in masks.values() if mask is not None))
        forbidden = torch.from_numpy(np.stack([mask[:width] for mask in masks.values() if mask is not None]))
        forbidden = forbidden.to(logits.device)
        if len(masks) == len(rows):
            logits[:, :width].masked_fill_(forbidden, -torch.inf)
            logits[:, width:] = -torch.inf
        else:
            places = torch.tensor(list(masks), device=logits.device)
            logits[places, :width] = logits[places, :width].masked_fill(forbidden, -torch.inf)
            logits[places, width:] = -torch.inf

    def close(self) -> None:
        """Stop the threads."""
        self._quick.shutdown(wait=False, cancel_futures=True)
        self._slow.shutdown(wait=False, cancel_futures=True)


def _is_ready(running: RunningRequest, until: float) -> bool:
    grammar = running.prompt.grammar
    if grammar is None or grammar.wait(max(0.0, until - time.monotonic())):
        return True
    if time.monotonic() - grammar.begun > _LIMIT_S:
        grammar.forbidden = None
        return True
    return False

"""Attention of a step's tokens, of many requests in one line, each over the row of its own request.

transformers' models call it as their attention function and pass ``step`` on to it. The line is of batch 1: the
matrices of a layer see all tokens of the step at once, without padding; only attention knows whose they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from llava_ray.generate.builtin.kv_cache import CacheSlot, SizeClass

NAME = "llava_ray_rows"


@dataclass(frozen=True)
class TokenSpan:
    """Tokens of one request in a step: the next ``count`` of its row, after ``start`` that were read before."""

    row: CacheSlot
    start: int
    count: int


class NextTokens:
    """One new token of each of several rows of a shelf: one batch, each row a query over its own keys."""

    def __init__(self, shelf: SizeClass, spans: Sequence[TokenSpan], first: int, like: Tensor) -> None:
        """Take the spans in the order of their rows; ``first`` is the place of their tokens in the line."""
        self.shelf = shelf
        self.first, self.last = first, first + len(spans)
        positions = [span.start for span in spans]
        indices = [span.row.index for span in spans]
        self.width = max(positions) + 1
        self.num_rows = indices[-1] + 1
        self.rows = torch.tensor(indices, device=like.device)
        self.positions = torch.tensor(positions, device=like.device)
        self.gaps = self.num_rows != len(spans)  # rows in between that are not asked in this step
        self.masks: dict[int | None, Tensor] = {}

    def mask(self, window: int | None, like: Tensor) -> Float[Tensor, "rows 1 1 width"]:
        """Return 0 where a row may look, -inf elsewhere; the same for all layers with this window."""
        if window not in self.masks:
            last = self.positions
            if self.gaps:
                last = last.new_zeros(self.num_rows).index_copy(0, self.rows, last)
            ahead = torch.arange(self.width, device=like.device) - last[:, None]
            hidden = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)
            mask = like.new_zeros(self.num_rows, self.width).masked_fill_(hidden, -torch.inf)
            self.masks[window] = mask[:, None, None]
        return self.masks[window]

    def attend(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, how: "AttentionSettings") -> Tensor:
        """Write keys and values, return what the queries (1, heads, t, d) of these tokens see, (t, heads, e)."""
        layer = self.shelf.layer(layer_index, key, value)
        mine = slice(self.first, self.last)
        layer.keys[self.rows, :, self.positions] = key[0, :, mine].transpose(0, 1)
        layer.values[self.rows, :, self.positions] = value[0, :, mine].transpose(0, 1)
        keys, values = (seen[: self.num_rows, :, : self.width] for seen in (layer.keys, layer.values))
        asked = query[0, :, mine].transpose(0, 1)
        if self.gaps:
            asked = asked.new_zeros(self.num_rows, *asked.shape[1:]).index_copy(0, self.rows, asked)
        # The query heads that share keys are so many queries of one head: nothing is repeated.
        grouped = asked.reshape(self.num_rows, keys.shape[1], -1, asked.shape[-1])
        seen = how.apply(grouped, keys, values, self.mask(how.window, query)).flatten(1, 2)
        return seen[self.rows] if self.gaps else seen


class PromptChunk:
    """Some tokens of one prompt, after those of it that are in its row already."""

    def __init__(self, span: TokenSpan, first: int) -> None:
        """``first`` is the place of its tokens in the line."""
        self.row = span.row
        self.first, self.last = first, first + span.count
        self.start, self.end = span.start, span.start + span.count
        self.masks: dict[int | None, Tensor] = {}

    def mask(self, window: int | None, like: Tensor) -> Float[Tensor, "t width"]:
        """Return 0 where a token may look, -inf elsewhere."""
        if window not in self.masks:
            ahead = torch.arange(self.end, device=like.device) - torch.arange(
                self.start, self.end, device=like.device
            ).unsqueeze(1)
            hidden = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)
            self.masks[window] = like.new_zeros(ahead.shape).masked_fill_(hidden, -torch.inf)
        return self.masks[window]

    def attend(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, how: "AttentionSettings") -> Tensor:
        """Write keys and values, return what the queries (1, heads, t, d) of these tokens see, (t, heads, e)."""
        layer = self.row.shelf.layer(layer_index, key, value)
        mine, index = slice(self.first, self.last), self.row.index
        layer.keys[index, :, self.start : self.end] = key[0, :, mine]
        layer.values[index, :, self.start : self.end] = value[0, :, mine]
        keys, values = (seen[index : index + 1, :, : self.end] for seen in (layer.keys, layer.values))
        num_groups = query.shape[1] // keys.shape[1]
        if num_groups > 1:
            keys, values = keys.repeat_interleave(num_groups, 1), values.repeat_interleave(num_groups, 1)
        whole = self.start == 0 and (how.window is None or how.window >= self.end)
        mask = None if whole and not how.softcap else self.mask(how.window, query)
        return how.apply(query[:, :, mine], keys, values, mask)[0].transpose(0, 1)


@dataclass(frozen=True)
class AttentionSettings:
    """What a layer asks of its attention."""

    scaling: float
    window: int | None = None
    softcap: float | None = None

    def apply(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Attend; without a mask causally."""
        if self.softcap is None:
            causal = mask is None and query.shape[2] > 1
            return scaled_dot_product_attention(query, keys, values, mask, scale=self.scaling, is_causal=causal)
        scores = torch.matmul(query, keys.transpose(-1, -2)) * self.scaling
        scores = torch.tanh(scores / self.softcap) * self.softcap
        weights = (scores if mask is None else scores + mask).softmax(-1, dtype=torch.float32).to(query.dtype)
        return torch.matmul(weights, values)


@dataclass
class BatchStep:
    """The tokens of one forward pass, in line: each part knows its own."""

    parts: list[NextTokens | PromptChunk]
    positions: Int[Tensor, "1 t"]
    last: Int[Tensor, " n"]
    """Places of the tokens after which a request wants to know the next one."""
    num_calls: int = field(default=0)
    """How often attention was asked for: once a layer, if the model does as it is told."""


def _attend_rows(  # noqa: PLR0913 - transformers' own list
    module: Any,
    query: Float[Tensor, "1 h t d"],
    key: Float[Tensor, "1 kv t d"],
    value: Float[Tensor, "1 kv t e"],
    attention_mask: Tensor | None,
    *,
    step: BatchStep,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "1 t h e"], None]:
    """Attend as a transformers' attention function does."""
    step.num_calls += 1
    how = AttentionSettings(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    seen = [part.attend(module.layer_idx, query, key, value, how) for part in step.parts]
    return (seen[0] if len(seen) == 1 else torch.cat(seen)).unsqueeze(0), None


AttentionInterface.register(NAME, _attend_rows)

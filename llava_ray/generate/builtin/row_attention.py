"""Attention over a flattened batch: tokens of many requests, each attending to its own request's cache slot.

transformers' models call it as their attention function and pass ``step`` on to it. The batch size is 1: the matrices
of a layer see all tokens of the step at once, without padding; only attention separates the requests.
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
_FEW_TOKENS = 16  # of a chunk whose heads are joined: the draft of an answer


@dataclass(frozen=True)
class TokenSpan:
    """Tokens of one request in a step: the next ``count`` of its slot, after ``start`` that are cached."""

    row: CacheSlot
    start: int
    count: int


class NextTokens:
    """One new token of each of several slots of a size class: one batched attention, each query over its own keys."""

    def __init__(self, size_class: SizeClass, spans: Sequence[TokenSpan], first: int, like: Tensor) -> None:
        """Initialise with spans in the order of their slots; ``first`` is the position of their tokens in the step."""
        self.size_class = size_class
        self.first, self.last = first, first + len(spans)
        positions = [span.start for span in spans]
        indices = [span.row.index for span in spans]
        self.width = max(positions) + 1
        self.num_rows = indices[-1] + 1
        self.rows = torch.tensor(indices, device=like.device)
        self.positions = torch.tensor(positions, device=like.device)
        self.lines: Tensor | None = None
        """Of the cache, as a list of vectors: where each head of each token goes."""
        self.gaps = self.num_rows != len(spans)  # slots in between without a token in this step
        self.masks: dict[int | None, Tensor] = {}

    def mask(self, window: int | None, like: Tensor) -> Float[Tensor, "rows 1 1 width"]:
        """Return the mask, 0 or -inf, of visible positions; cached for all layers with the same window."""
        # Layers of one model may alternate between full attention and a sliding window (Gemma, Mistral): one mask
        # per window size, not one per layer.
        if window not in self.masks:
            last = self.positions
            if self.gaps:
                last = last.new_zeros(self.num_rows).index_copy(0, self.rows, last)
            ahead = torch.arange(self.width, device=like.device) - last[:, None]
            hidden = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)
            mask = like.new_zeros(self.num_rows, self.width).masked_fill_(hidden, -torch.inf)
            self.masks[window] = mask[:, None, None]
        return self.masks[window]

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, attention: "AttentionSettings"
    ) -> Tensor:
        """Write keys and values to the cache and return the attention output (t, heads, e) of these tokens."""
        layer = self.size_class.layer(layer_index, key, value)
        mine = slice(self.first, self.last)
        self._write(layer.keys, key[0, :, mine])
        self._write(layer.values, value[0, :, mine])
        keys, values = (outputs[: self.num_rows, :, : self.width] for outputs in (layer.keys, layer.values))
        queries = query[0, :, mine].transpose(0, 1)
        if self.gaps:
            queries = queries.new_zeros(self.num_rows, *queries.shape[1:]).index_copy(0, self.rows, queries)
        # The query heads that share keys are so many queries of one head: nothing is repeated.
        grouped = queries.reshape(self.num_rows, keys.shape[1], -1, queries.shape[-1])
        outputs = attention.apply(grouped, keys, values, self.mask(attention.window, query)).flatten(1, 2)
        return outputs[self.rows] if self.gaps else outputs

    def _write(self, cache: Float[Tensor, "rows kv length d"], new: Float[Tensor, "kv t d"]) -> None:
        """Write one token of each row: as one copy of lines, several times faster than by three indices."""
        num_heads, length = cache.shape[1:3]
        if self.lines is None or len(self.lines) != num_heads * len(self.rows):
            heads = torch.arange(num_heads, device=cache.device).unsqueeze(1)
            self.lines = ((self.rows * num_heads + heads) * length + self.positions).flatten()
        cache.view(-1, cache.shape[3]).index_copy_(0, self.lines, new.flatten(0, 1))


class PromptChunk:
    """A chunk of one prompt, after its tokens that are cached already."""

    def __init__(self, span: TokenSpan, first: int) -> None:
        """Initialise with the position ``first`` of its tokens in the step."""
        self.row = span.row
        self.first, self.last = first, first + span.count
        self.start, self.end = span.start, span.start + span.count
        self.masks: dict[int | None, Tensor] = {}

    def mask(self, window: int | None, like: Tensor) -> Float[Tensor, "t width"]:
        """Return the mask, 0 or -inf, of positions visible to each token."""
        if window not in self.masks:
            ahead = torch.arange(self.end, device=like.device) - torch.arange(
                self.start, self.end, device=like.device
            ).unsqueeze(1)
            hidden = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)
            self.masks[window] = like.new_zeros(ahead.shape).masked_fill_(hidden, -torch.inf)
        return self.masks[window]

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, attention: "AttentionSettings"
    ) -> Tensor:
        """Write keys and values to the cache and return the attention output (t, heads, e) of these tokens."""
        layer = self.row.size_class.layer(layer_index, key, value)
        mine, index = slice(self.first, self.last), self.row.index
        layer.keys[index, :, self.start : self.end] = key[0, :, mine]
        layer.values[index, :, self.start : self.end] = value[0, :, mine]
        keys, values = (outputs[index : index + 1, :, : self.end] for outputs in (layer.keys, layer.values))
        queries, num_groups = query[:, :, mine], query.shape[1] // keys.shape[1]
        whole = self.start == 0 and (attention.window is None or attention.window >= self.end)
        mask = None if whole and not attention.softcap else self.mask(attention.window, query)
        if mask is not None and num_groups > 1 and self.last - self.first <= _FEW_TOKENS:
            # As for next tokens: the heads that share keys are so many queries of one.
            grouped = queries.reshape(1, keys.shape[1], -1, queries.shape[-1])
            found = attention.apply(grouped, keys, values, mask.repeat(num_groups, 1))
            return found.reshape(query.shape[1], -1, values.shape[-1]).transpose(0, 1)
        if num_groups > 1 and (attention.softcap or query.device.type != "cpu"):  # else the kernel shares them itself
            keys, values = keys.repeat_interleave(num_groups, 1), values.repeat_interleave(num_groups, 1)
        return attention.apply(queries, keys, values, mask)[0].transpose(0, 1)


@dataclass(frozen=True)
class AttentionSettings:
    """The attention settings of a layer."""

    scaling: float
    window: int | None = None
    softcap: float | None = None

    def apply(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Compute attention; causal without a mask."""
        if self.softcap is None:
            causal = mask is None and query.shape[2] > 1
            shared = query.shape[1] != keys.shape[1]
            return scaled_dot_product_attention(
                query, keys, values, mask, scale=self.scaling, is_causal=causal, enable_gqa=shared
            )
        scores = torch.matmul(query, keys.transpose(-1, -2)) * self.scaling
        scores = torch.tanh(scores / self.softcap) * self.softcap
        weights = (scores if mask is None else scores + mask).softmax(-1, dtype=torch.float32).to(query.dtype)
        return torch.matmul(weights, values)


@dataclass
class BatchStep:
    """The flattened tokens of one forward pass, in parts with their own attention."""

    parts: list[NextTokens | PromptChunk]
    positions: Int[Tensor, "1 t"]
    last: Int[Tensor, " n"]
    """Positions of the tokens whose logits are needed."""
    states: Float[Tensor, "n d"] | None = None
    """The states of these tokens before the language model's head, where they are known."""
    num_calls: int = field(default=0)
    """Number of calls of attention: one per layer, if the model uses this function everywhere."""


def _attend_rows(  # noqa: PLR0913 - transformers' signature
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
    """Compute attention with the signature of transformers' attention functions."""
    attention = AttentionSettings(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    return attend_parts(step, module.layer_idx, query, key, value, attention).unsqueeze(0), None


def attend_parts(
    step: BatchStep,
    layer_index: int,
    query: Float[Tensor, "1 h t d"],
    key: Float[Tensor, "1 kv t d"],
    value: Float[Tensor, "1 kv t e"],
    attention: AttentionSettings,
) -> Float[Tensor, "t h e"]:
    """Write keys and values of all tokens of a step to the cache, and return their attention outputs."""
    step.num_calls += 1
    outputs = [part.attend(layer_index, query, key, value, attention) for part in step.parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


AttentionInterface.register(NAME, _attend_rows)

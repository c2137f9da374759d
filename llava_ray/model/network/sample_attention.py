"""Attention over a packed row, sample by sample: no mask of the whole row, no work for pairs of tokens in two samples.

transformers' models call it as their attention function and pass ``borders`` on to it. transformers builds no mask for
a name that it does not know, a padding mask neither: the function refuses to run without borders.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.nn.functional import dropout as drop_out
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from llava_ray.errors import ModelError
from llava_ray.model.network.transfer import to_device

SAMPLE_ATTENTION = "llava_ray_samples"

# Arguments by which some models change what attention computes, none of which is done here.
_UNSUPPORTED = ("s_aux", "sinks", "position_bias", "cache", "head_mask")
_MAX_HEAD_SIZE = 256
# Flash Attention's backward pass for heads wider than this runs on data-centre GPUs only.
_MAX_SMALL_HEAD_SIZE = 192
_DATA_CENTRE = ((8, 0), (9, 0), (10, 0))


@dataclass(frozen=True, eq=False)
class SampleBorders:
    """The places of the samples in a packed row. ``ends`` are 0 and the end of each sample, on the row's device."""

    lengths: tuple[int, ...]
    ends: Int32[Tensor, " n"]
    branches: tuple[tuple[int, int] | None, ...] = ()
    """Of each sample that branches: the tokens of its trunk, and of trunk and first branch together. The second branch
    is the rest, and sees the trunk but not the first. () where none does."""
    windows: list[int | None] = field(default_factory=list)
    """The sliding window of each call of attention so far."""

    @classmethod
    def of(
        cls, lengths: Sequence[int], device: torch.device, branches: Sequence[tuple[int, int] | None] = ()
    ) -> "SampleBorders":
        """Return the borders of samples of these lengths, one behind the other; no device is waited for."""
        kept = tuple(int(length) for length in lengths)
        ends = to_device(torch.tensor([0, *accumulate(kept)], dtype=torch.int32), device)
        return cls(kept, ends, tuple(branches) if any(branches) else ())


@dataclass(frozen=True)
class _Scores:
    """The weighing of a sample's earlier tokens by a layer."""

    scaling: float
    dropout: float
    window: int | None
    softcap: float | None

    def attend_sample(
        self, query: Tensor, key: Tensor, value: Tensor, branch: tuple[int, int] | None
    ) -> Float[Tensor, "1 h t e"]:
        """Compute causal attention within one sample; the second branch sees the trunk and itself."""
        if branch is None:
            return self.attend(query, key, value)
        trunk, end = branch
        first = self.attend(query[:, :, :end], key[:, :, :end], value[:, :, :end])
        keys, values = (torch.cat([one[:, :, :trunk], one[:, :, end:]], dim=2) for one in (key, value))
        return torch.cat([first, self.attend(query[:, :, end:], keys, values)], dim=2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Float[Tensor, "1 h t e"]:
        """Compute causal attention of consecutive tokens; query heads may share keys.

        The queries are those of the last tokens, where there are fewer of them than keys.
        """
        num_keys, shared = key.shape[2], query.shape[1] != key.shape[1]
        masked = query.shape[2] < num_keys or (self.window is not None and num_keys > self.window)
        hidden = self._hidden(num_keys, query.device)[-query.shape[2] :] if masked or self.softcap is not None else None
        if self.softcap is not None:
            assert hidden is not None
            return self._attend_capped(query, key, value, hidden)
        mask = None if hidden is None else ~hidden
        return scaled_dot_product_attention(
            query,
            key,
            value,
            mask,
            dropout_p=self.dropout,
            is_causal=mask is None,
            scale=self.scaling,
            enable_gqa=shared,
        )

    def _attend_capped(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Float[Tensor, "1 h t e"]:
        """Compute attention whose scores are bounded, which no fused kernel does; softmax in fp32."""
        num_groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(num_groups, 1), value.repeat_interleave(num_groups, 1)
        scores = torch.matmul(query, key.transpose(2, 3)) * self.scaling
        assert self.softcap is not None
        scores = torch.tanh(scores / self.softcap) * self.softcap
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32).to(query.dtype)
        return torch.matmul(drop_out(weights, self.dropout), value)

    def _hidden(self, num_tokens: int, device: torch.device) -> Tensor:
        """Return which (query, key) pairs are later tokens, or earlier ones outside the window."""
        positions = torch.arange(num_tokens, device=device)
        ahead = positions - positions[:, None]
        return ahead > 0 if self.window is None else (ahead > 0) | (ahead <= -self.window)


def attend_samples(  # noqa: PLR0913 - transformers' signature
    module: Any,
    query: Float[Tensor, "b h t d"],
    key: Float[Tensor, "b kv u d"],
    value: Float[Tensor, "b kv u e"],
    attention_mask: Tensor | None,
    *,
    borders: SampleBorders | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "1 t h e"], None]:
    """Compute causal attention within each sample of a packed row, as an attention function of transformers.

    Raises ModelError without borders, with a mask, or for attention of another kind.
    """
    checked = _check_borders(borders, query, key, attention_mask)
    _check_kind(module, others)
    checked.windows.append(sliding_window)
    # Half precision on recent GPUs: one kernel for all samples. Everywhere else, and for what it cannot do: a loop.
    scores = _Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, dropout, sliding_window, softcap)
    if not checked.branches and fits_kernel(query, value, dropout, softcap):
        return _attend_at_once(query, key, value, checked, scores).unsqueeze(0), None
    # In half precision the CPU's kernel took a quarter longer than in fp32, with AVX512-BF16 as with AMX.
    widened = [tensor.float() if tensor.device.type == "cpu" else tensor for tensor in (query, key, value)]
    parts = (tensor.split(list(checked.lengths), dim=2) for tensor in widened)
    branches = checked.branches or (None,) * len(checked.lengths)
    outputs = [
        scores.attend_sample(queries, keys, values, branch).transpose(1, 2)
        for (queries, keys, values), branch in zip(zip(*parts, strict=True), branches, strict=True)
    ]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)).to(query.dtype), None


def fits_kernel(query: Tensor, value: Tensor, dropout: float, softcap: float | None) -> bool:
    """Return whether torch's Flash Attention for rows of samples can do this."""
    size = query.shape[-1]
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16) or dropout or softcap is not None:
        return False
    if size % 8 or size > _MAX_HEAD_SIZE or value.shape[-1] != size:
        return False
    capability = torch.cuda.get_device_capability(query.device)
    return capability >= (8, 0) and (size <= _MAX_SMALL_HEAD_SIZE or capability in _DATA_CENTRE)


def _attend_at_once(
    query: Tensor, key: Tensor, value: Tensor, borders: SampleBorders, scores: _Scores
) -> Float[Tensor, "t h e"]:
    """Compute attention of all samples in one kernel on a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    longest = max(borders.lengths)
    reach = -1 if scores.window is None or longest <= scores.window else scores.window - 1
    attended = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        borders.ends,
        borders.ends,
        longest,
        longest,
        scale=scores.scaling,
        window_size=(reach, 0),  # earlier tokens within reach, no later ones
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(attended, Tensor)  # a pair only where more is asked for
    return attended


def _check_borders(borders: SampleBorders | None, query: Tensor, key: Tensor, mask: Tensor | None) -> SampleBorders:
    """Return the borders. Raises ModelError if they are missing or are not those of this row."""
    num_rows, num_tokens = query.shape[0], query.shape[2]
    if borders is None:
        raise ModelError(
            f"attention by sample got a batch of {num_rows} x {num_tokens} tokens without the borders of its samples; "
            "it is for packed training rows alone. Give Llava.forward the borders, or call the model while its "
            "SampleAttention is paused."
        )
    if mask is not None:
        raise ModelError(f"attention by sample got a mask of shape {tuple(mask.shape)}; it knows borders alone.")
    if num_rows != 1 or key.shape[2] != num_tokens or sum(borders.lengths) != num_tokens:
        raise ModelError(
            f"attention by sample got {num_rows} row(s) of {num_tokens} tokens with {key.shape[2]} keys, but borders "
            f"of {len(borders.lengths)} samples of {sum(borders.lengths)} tokens; expected one row of as many."
        )
    return borders


def _check_kind(module: Any, others: dict[str, Any]) -> None:
    """Raise ModelError for attention that is not plain causal attention."""
    found = [name for name in _UNSUPPORTED if others.get(name) is not None]
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        found.append("attention to later tokens")
    if found:
        raise ModelError(f"attention by sample does not know {' or '.join(found)} of {type(module).__name__}")


AttentionInterface.register(SAMPLE_ATTENTION, attend_samples)

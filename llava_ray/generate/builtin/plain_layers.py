"""The layers of a plain Llama, Mistral or Qwen2, run without transformers' machinery around each of them.

It computes the same numbers by the same operations, bit for bit. On a CPU the calls between them (modules, wrappers,
keyword arguments, views) take half of the time of a step that decodes few rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralForCausalLM, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2ForCausalLM, Qwen2RMSNorm

from llava_ray.generate.builtin.packed_linear import join_linears
from llava_ray.generate.builtin.row_attention import AttentionSettings, BatchStep, attend_parts
from llava_ray.generate.row_adapters import AdaptedLinear

_MODELS = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM)
_NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm)
_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}


def has_plain_layers(model: PreTrainedModel) -> bool:
    """Return whether a model is exactly of one of the known forms; subclasses and changed layers are not."""
    if type(model) not in _MODELS:
        return False
    inner: Any = model.model
    return type(inner.norm) in _NORMS and all(
        {name for name, _ in layer.named_children()} == _PARTS
        and {name for name, _ in layer.self_attn.named_children()} == _PROJECTIONS
        and type(layer.input_layernorm) in _NORMS
        and type(layer.post_attention_layernorm) in _NORMS
        and type(layer).forward.__module__ == type(model).__module__
        for layer in inner.layers
    )


class PlainLayers:
    """The layers of such a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Join the projections of each layer that have the same input, where they are packed."""
        self.model: Any = model
        layers = self.model.model.layers
        self.attention = [_Projections(layer.self_attn, ("q_proj", "k_proj", "v_proj")) for layer in layers]
        self.mlp = [_Projections(layer.mlp, ("gate_proj", "up_proj")) for layer in layers]

    def run(self, embedded: Float[Tensor, "1 t d"], step: BatchStep) -> Float[Tensor, "n vocab"]:
        """Compute the logits at the step's last tokens."""
        inner = self.model.model
        cos, sin = inner.rotary_emb(embedded, position_ids=step.positions)
        half = sin.shape[-1] // 2
        # rotate_half negates half of a vector; negating that half of the sines instead gives the same products.
        sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)[0].unsqueeze(1)
        cos = cos[0].unsqueeze(1)
        hidden = embedded
        layers = inner.layers[: inner.config.num_hidden_layers]
        for layer, attention, mlp in zip(layers, self.attention, self.mlp, strict=False):
            normed = _normalize(layer.input_layernorm, hidden)
            hidden = hidden + _attend(layer.self_attn, attention(normed), cos, sin, step)
            gate, up = mlp(_normalize(layer.post_attention_layernorm, hidden))
            hidden = hidden + layer.mlp.down_proj(layer.mlp.act_fn(gate) * up)
        states = _normalize(inner.norm, hidden)[:, step.last]
        step.states = states[0]
        logits: Tensor = self.model.lm_head(states)
        return logits[0]


class _Projections:
    """The layers of a block that have the same input."""

    def __init__(self, block: nn.Module, names: Sequence[str]) -> None:
        """Join them where they are packed; each may have adapters, now or later."""
        self.block: Any = block
        self.names = names
        layers = [block.get_submodule(name) for name in names]
        self.joined = join_linears([layer.plain if isinstance(layer, AdaptedLinear) else layer for layer in layers])

    def __call__(self, inputs: Float[Tensor, "1 t d"]) -> Sequence[Tensor]:
        """Return the outputs of each layer, with the terms of its adapters."""
        layers = [getattr(self.block, name) for name in self.names]
        if self.joined is None:
            return [layer(inputs) for layer in layers]
        return [
            layer.adapt(inputs, outputs) if isinstance(layer, AdaptedLinear) else outputs
            for layer, outputs in zip(layers, self.joined(inputs), strict=True)
        ]


def _normalize(norm: Any, hidden: Float[Tensor, "1 t d"]) -> Float[Tensor, "1 t d"]:
    """Apply an RMS norm."""
    wide = hidden.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    normed: Tensor = norm.weight * wide.to(hidden.dtype)
    return normed


def _attend(
    attention: Any,
    projected: Sequence[Float[Tensor, "1 t _"]],
    cos: Float[Tensor, "t 1 e"],
    sin: Float[Tensor, "t 1 e"],
    step: BatchStep,
) -> Float[Tensor, "1 t d"]:
    """Compute the attention block of a layer from its queries, keys and values."""
    num_tokens, size = projected[0].shape[1], attention.head_dim
    query, key, value = (one.view(num_tokens, -1, size) for one in projected)
    both = torch.cat((query, key), 1)
    both = both * cos + both.roll(size // 2, -1) * sin
    num_heads = query.shape[1]
    query, key = both[:, :num_heads].transpose(0, 1), both[:, num_heads:].transpose(0, 1)
    settings = AttentionSettings(attention.scaling, _find_window(attention))
    found = attend_parts(
        step, attention.layer_idx, query.unsqueeze(0), key.unsqueeze(0), value.transpose(0, 1).unsqueeze(0), settings
    )
    outputs: Tensor = attention.o_proj(found.reshape(1, num_tokens, -1))
    return outputs


def _find_window(attention: nn.Module) -> int | None:
    """Return the sliding window of a layer: Qwen2's layers have their own, Mistral's the model's, Llama's none."""
    if isinstance(attention, Qwen2Attention):
        own: int | None = attention.sliding_window
        return own
    window: int | None = getattr(attention.config, "sliding_window", None)
    return window if isinstance(attention, MistralAttention) else None

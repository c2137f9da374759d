"""The terms that a LoRA adapter adds to each linear layer, extracted from a model as plain tensors without peft."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from transformers import PreTrainedModel

from llava_ray.errors import ModelError
from llava_ray.invocation import command
from llava_ray.model.lora.adapters import (
    ADAPTER,
    adapter_layers,
    compute_probe_logits,
    load_adapter,
    peft_config,
    remove_adapter,
)
from llava_ray.model.network.quantization import find_dtype


@dataclass(frozen=True)
class LayerTerm:
    """The term of one layer, whose output is ``gain * (W x) + x down^T up + bias + shift``.

    Low rank as in https://arxiv.org/abs/2106.09685; ``gain`` as in DoRA, https://arxiv.org/abs/2402.09353.
    """

    down: Float[Tensor, "r i"]
    up: Float[Tensor, "r o"]
    """Includes the adapter's scaling and DoRA's gain."""
    gain: Float[Tensor, " o"] | None = None
    """DoRA's gain; None for 1."""
    shift: Float[Tensor, " o"] | None = None
    """Trained bias minus the base's; None for 0."""


Terms = Mapping[str, LayerTerm]
"""Terms by the names of the language model's linear layers."""


@torch.no_grad()
def load_terms(
    language_model: PreTrainedModel, folder: Path, *, base_fingerprint: str | None
) -> tuple[Terms, Float32[Tensor, "t vocab"]]:
    """Load an adapter's terms, and the logits of a fixed text (`compute_probe_logits`) while peft has it injected.

    The model is left unchanged. Raises ModelError for an adapter that is incomplete, damaged, of another model, or that
    changes more than linear layers.
    """
    before = {name: bias.detach().clone() for name, bias in _biases(language_model).items()}
    load_adapter(language_model, folder, base_fingerprint=base_fingerprint)
    try:
        logits = compute_probe_logits(language_model)
        shifts = {name: bias.detach() - before[name] for name, bias in _biases(language_model).items()}
        terms = _read_terms(language_model, {name: shift for name, shift in shifts.items() if shift.any()}, folder)
    finally:
        remove_adapter(language_model)
        for name, bias in _biases(language_model).items():
            bias.copy_(before[name])
    return terms, logits


@torch.no_grad()
def extract_lora_weights(
    language_model: PreTrainedModel, folder: Path
) -> tuple[Terms, Float32[Tensor, "t vocab"], Callable[[], None]]:
    """Remove a model's adapter; return its terms, its logits, and a function that restores it. Raises ModelError."""
    layers, settings = adapter_layers(language_model), vars(language_model)["peft_config"]
    if peft_config(language_model).bias != "none":
        raise ModelError(
            f"the adapter in {folder} has trained biases, and its base's own are no longer known, so no other "
            "adapter can be served beside it. Serve it alone, or as one of the adapters over its base."
        )
    terms, logits = _read_terms(language_model, {}, folder), compute_probe_logits(language_model)
    remove_adapter(language_model)

    def restore() -> None:
        for name, layer in layers.items():
            language_model.set_submodule(name, layer)
        language_model.peft_config = settings

    return terms, logits, restore


def _read_terms(language_model: PreTrainedModel, shifts: Mapping[str, Tensor], folder: Path) -> dict[str, LayerTerm]:
    """Return the terms of the model's adapter, with its changes of biases. Raises ModelError."""
    dtype, terms = find_dtype(language_model), {}
    left = dict(shifts)
    for name, layer in adapter_layers(language_model).items():
        if not isinstance(layer.get_base_layer(), nn.Linear):
            raise ModelError(
                f"the adapter in {folder} adapts {name}, a {type(layer.get_base_layer()).__name__}; only linear layers "
                f"can be adapted request by request. Merge it ({command('export', 'merge')}) and serve the whole model."
            )
        terms[name] = _read_term(layer, left.pop(f"{name}.bias", None), dtype)
    linears = {name: module for name, module in language_model.named_modules() if isinstance(module, nn.Linear)}
    for name in list(left):
        layer = linears.get(name.removesuffix(".bias"))
        if layer is None:
            raise ModelError(
                f"the adapter in {folder} has learnt {name}, which is no bias of a linear layer and so cannot differ "
                f"from request to request. Merge it ({command('export', 'merge')}) and serve the whole model."
            )
        down, up = (left[name].new_zeros(0, width) for width in (layer.in_features, layer.out_features))
        terms[name.removesuffix(".bias")] = LayerTerm(down, up, shift=left.pop(name))
    return terms


def _read_term(layer: Any, shift: Tensor | None, dtype: torch.dtype) -> LayerTerm:
    """Compute the term of one of peft's layers."""
    from peft.utils.integrations import dequantize_module_weight

    down, up = layer.lora_A[ADAPTER].weight.float(), layer.lora_B[ADAPTER].weight.float() * layer.scaling[ADAPTER]
    gain = None
    if ADAPTER in layer.lora_magnitude_vector:
        whole = dequantize_module_weight(layer.get_base_layer()).float() + up @ down
        gain = layer.lora_magnitude_vector[ADAPTER].weight.float() / torch.linalg.vector_norm(whole, dim=1)
        up = up * gain[:, None]
    return LayerTerm(down.to(dtype), up.T.contiguous().to(dtype), None if gain is None else gain.to(dtype), shift)


def _biases(language_model: nn.Module) -> dict[str, Tensor]:
    """Return the model's own biases, by the names that they have without an adapter."""
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in language_model.named_parameters()
        if name.endswith("bias") and "lora_" not in name
    }

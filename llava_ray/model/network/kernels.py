"""Liger's kernels in a language model on a GPU: norms, rotary embeddings and gated MLPs, each in one pass over memory.

Of the extra ``gpu``. Not used is its fused linear cross-entropy: with a loss for each token it computes the head twice
and makes the host wait for the GPU, where ``head_loss``, of the same making (chunks whose gradients follow at once),
computes it once and does not.
"""

import importlib.util
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from llava_ray.errors import ConfigError
from llava_ray.model.network.packing import PROVEN

_LIBRARY = "liger_kernel"
_SWIGLU_ACTIVATIONS = ("silu", "swish")
_GEGLU_ACTIVATION = "gelu_pytorch_tanh"


def use_kernels(
    language_model: PreTrainedModel, wanted: bool | Literal["auto"], device: torch.device
) -> tuple[str, ...]:
    """Let a language model compute with Liger's kernels; return which, none where they cannot be used and need not be.

    Raises ConfigError where they are ``wanted`` and cannot be used.
    """
    if wanted is False:
        return ()
    missing = _find_missing(language_model, device)
    if missing is None:
        return _apply(language_model)
    if wanted is True:
        raise ConfigError(f'train.use_liger_kernel = true, but {missing}, or set "auto" or false')
    return ()


def choose_kernels(config: Any) -> dict[str, bool]:
    """Return which of Liger's kernels compute what a model of this config does, by Liger's names.

    Liger replaces a gated MLP whatever its activation is, and turns all of each head.
    """
    activation = getattr(config, "hidden_activation" if config.model_type == "gemma2" else "hidden_act", None)
    rope: Any = getattr(config, "rope_parameters", None) or {}
    partial = getattr(config, "partial_rotary_factor", None) or rope.get("partial_rotary_factor") or 1.0
    return {
        "rms_norm": True,
        "rope": partial == 1.0,
        "swiglu": activation in _SWIGLU_ACTIVATIONS,
        "geglu": activation == _GEGLU_ACTIVATION,
    }


def _find_missing(language_model: PreTrainedModel, device: torch.device) -> str | None:
    """Return what keeps a model from these kernels, and its remedy; None if nothing does."""
    if device.type != "cuda":
        return f"the workers compute on {device.type}, and Liger's kernels are for GPUs; set cluster.use_gpu = true"
    if importlib.util.find_spec(_LIBRARY) is None:
        return "liger-kernel is not installed; pip install 'llava_ray[gpu]'"
    kind = language_model.config.model_type
    if kind not in PROVEN:
        return f"models of type {kind!r} are not tested with Liger; choose one of {', '.join(sorted(PROVEN))}"
    return None


def _apply(language_model: PreTrainedModel) -> tuple[str, ...]:
    """Replace what a model computes with; return the names of the kernels."""
    from transformers.integrations.liger import apply_liger_kernel

    chosen = choose_kernels(language_model.config)
    apply_liger_kernel(language_model, chosen | {"cross_entropy": False, "fused_linear_cross_entropy": False})
    gated = "geglu" if language_model.config.model_type.startswith("gemma") else "swiglu"
    unused = {"swiglu", "geglu"} - {gated}
    return tuple(name for name, used in chosen.items() if used and name not in unused)

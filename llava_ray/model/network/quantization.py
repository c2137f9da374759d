"""Quantisation of language models to 8 or 4 bits by bitsandbytes: configuration, detection, counting, reversal.

bitsandbytes is imported inside the functions: it is an extra, and most processes never need it.
"""

import importlib
import logging
from typing import Any, get_args

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from llava_ray.config.lora import Bits, Quantization
from llava_ray.errors import ModelError

# As in the original: activations beyond this stay in 16 bits (LLM.int8, https://arxiv.org/abs/2208.07339).
_INT8_THRESHOLD = 6.0

# PEFT and transformers import bitsandbytes wherever it is installed, and on CPUs with AVX-512 BF16 it warns of a kernel
# that it would have to download, in every chat and merge. ``set_compute_dtype`` switches that kernel off anyway.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")
)


def bitsandbytes_config(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Build the config for ``from_pretrained``; the head and tensors tied to it are not quantised.

    Raises ModelError if bitsandbytes is not installed.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it repeats itself at every forward pass
    try:
        importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ModelError(
            f"lora.bits = {quantization.bits} needs bitsandbytes, which cannot be imported ({error}): "
            "pip install 'llava_ray[qlora]', or set lora.bits = 16."
        ) from error
    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=_INT8_THRESHOLD)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
    )


def choose_quantization(bits: int | None, trained: Quantization | None) -> Quantization | None:
    """Return the quantisation of a language model for inference: as it was ``trained`` unless ``bits`` is given.

    Raises ModelError for another number of bits.
    """
    if bits not in (None, *get_args(Bits)):
        raise ModelError(f"bits is {bits}; expected 16, 8 or 4.")
    if bits is None or (trained is not None and trained.bits == bits):
        return trained
    return None if bits == 16 else Quantization(bits=8 if bits == 8 else 4)


def set_compute_dtype(language_model: PreTrainedModel) -> None:
    """Make 4-bit matrices compute alike on all CPUs.

    On CPUs with AVX-512 BF16 bitsandbytes 0.50 rounds activations and scales to bfloat16 as soon as no gradient is
    required, in place and permanently, and fails on layers narrower than a block.
    """
    for module in language_model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - not an attribute of torch's own


def find_quantization(language_model: PreTrainedModel) -> Quantization | None:
    """Return the quantisation of a language model in memory, or None."""
    if not _is_quantized(language_model):
        return None
    config: BitsAndBytesConfig = language_model.config.quantization_config
    if config.load_in_8bit:
        return Quantization(bits=8)
    return Quantization(
        bits=4,
        quant_type="fp4" if config.bnb_4bit_quant_type == "fp4" else "nf4",
        double_quant=config.bnb_4bit_use_double_quant,
    )


def _is_quantized(language_model: PreTrainedModel) -> bool:
    """Return whether its matrices are bitsandbytes'."""
    return getattr(language_model.config, "quantization_config", None) is not None


def find_dtype(model: nn.Module) -> torch.dtype:
    """Return a model's compute dtype: that of its first parameter that is not quantised."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def dequantize(language_model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace quantised matrices by ordinary ones of the same values in ``dtype``."""
    logging.getLogger("transformers.integrations.bitsandbytes").setLevel(logging.ERROR)
    language_model.dequantize(dtype=dtype)


def count_elements(parameter: nn.Parameter) -> int:
    """Count the numbers of a parameter, also if packed by bitsandbytes or partitioned by ZeRO 3."""
    state: Any = getattr(parameter, "quant_state", None)
    if state is not None:
        return int(state.shape.numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))

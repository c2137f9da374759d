"""Language models whose matrices bitsandbytes keeps in 8 or 4 bits: made, recognised, counted, undone.

bitsandbytes is imported inside the functions: it is an extra, and most processes never need it.
"""

import importlib
import logging
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from llava_ray.config.lora import Bits, Quantization
from llava_ray.errors import ModelError

# As the original: activations beyond this stay in 16 bits (LLM.int8, https://arxiv.org/abs/2208.07339).
_INT8_THRESHOLD = 6.0

# PEFT and transformers import bitsandbytes wherever it is installed, and on CPUs with AVX-512 BF16 it warns of a kernel
# which it would have to download, in every chat and merge. ``settle`` switches that kernel off: nothing is lost.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")
)


def bitsandbytes_config(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return what ``from_pretrained`` is told; the head and whatever is tied to it stay as they are.

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


def chosen(bits: Bits | None, trained: Quantization | None) -> Quantization | None:
    """Return how to keep a language model for use: as it was ``trained`` unless ``bits`` says otherwise.

    Raises ModelError for another number of bits.
    """
    if bits not in (None, 4, 8, 16):
        raise ModelError(f"bits is {bits}; expected 16, 8 or 4.")
    if bits is None or (trained is not None and trained.bits == bits):
        return trained
    return None if bits == 16 else Quantization(bits=bits)


def set_compute_dtype(language_model: PreTrainedModel) -> None:
    """Let 4-bit matrices compute alike wherever they run.

    On CPUs with AVX-512 BF16 bitsandbytes 0.50 rounds activations and scales to bfloat16 as soon as no gradient is
    asked for, in place and for good, and fails on layers narrower than a block.
    """
    for module in language_model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - not torch's own attribute


def find_quantization(language_model: PreTrainedModel) -> Quantization | None:
    """Return how a language model in memory is quantised, or None."""
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
    """Return whether bitsandbytes holds its matrices."""
    return getattr(language_model.config, "quantization_config", None) is not None


def find_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype that a model computes in: that of its first parameter which is not packed in few bits."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def dequantize(language_model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Put ordinary matrices of the same values (in ``dtype``) in the place of quantised ones."""
    logging.getLogger("transformers.integrations.bitsandbytes").setLevel(logging.ERROR)
    language_model.dequantize(dtype=dtype)


def count_elements(parameter: nn.Parameter) -> int:
    """Return how many numbers a parameter stands for, packed by bitsandbytes or partitioned by ZeRO 3."""
    state: Any = getattr(parameter, "quant_state", None)
    if state is not None:
        return int(state.shape.numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))

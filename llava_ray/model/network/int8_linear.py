"""Linear layers with 8-bit weights in memory, for inference on a CPU.

Weights have one scale for each output; inputs are rounded to 8 bits as they come, with one scale for each token (as in
W8A8 with dynamic scales per token, https://arxiv.org/abs/2211.10438). Products of integers are exact, so a token's
result does not depend on the other tokens of a batch.
"""

import ctypes
import logging
import warnings
from typing import Any

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from transformers import PreTrainedModel

from llava_ray.errors import ModelError
from llava_ray.model.network.quantization import find_quantization

_log = logging.getLogger(__name__)

_STEPS = 127  # of a weight's 8 bits on each side of zero
_TINIEST = 1e-30  # a row of zeros has no scale
_MIB = 2**20


class Int8Linear(nn.Linear):
    """A linear layer whose weights are kept as 8-bit integers."""

    def __init__(self, plain: nn.Linear) -> None:
        """Round ``plain``'s weights. Raises ModelError if they are not finite."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.bias = plain.bias
        self.dtype = plain.weight.dtype
        rounded, self.scales = round_weights(plain.weight.detach())
        self.packed: Any = _pack(rounded, self.scales) if has_packed_kernel() else None
        self.rounded = None if self.packed is not None else rounded

    @property
    def weight(self) -> Float[Tensor, "o i"]:  # type: ignore[override]
        """Return the weights in the model's precision, computed anew: for code that reads a Linear's attributes."""
        if self.rounded is None:
            unpacked, _ = torch.ops.quantized.linear_unpack(self.packed)
            return unpacked.dequantize().to(self.dtype)
        return (self.rounded.float() * self.scales[:, None]).to(self.dtype)

    def forward(self, inputs: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        """Apply the layer to inputs rounded to 8 bits, each row by its own scale."""
        rows = inputs.reshape(-1, self.in_features).float()
        largest = rows.abs().amax(-1, keepdim=True).clamp_min(_TINIEST)
        outputs = self._multiply(rows / largest).mul_(largest)
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.to(inputs.dtype).view(*inputs.shape[:-1], self.out_features)

    def _multiply(self, rows: Float[Tensor, "n i"]) -> Float[Tensor, "n o"]:
        """Return the products of rows between -1 and 1."""
        if self.rounded is None:
            steps = _input_steps()
            return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
                rows, 1 / steps, steps + 1, self.packed
            )
        if not len(rows):
            return rows.new_empty(0, self.out_features)
        whole = torch._int_mm(rows.mul(_STEPS).round_().nan_to_num_(0).to(torch.int8), self.rounded.t())
        return whole.float() * (self.scales / _STEPS)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Int8Linear":
        """Copy the module, not its weights, which nothing changes."""
        copied = Int8Linear.__new__(Int8Linear)
        nn.Module.__init__(copied)
        copied.in_features, copied.out_features, copied.dtype = self.in_features, self.out_features, self.dtype
        copied.scales, copied.packed, copied.rounded = self.scales, self.packed, self.rounded
        bias = self.bias
        if bias is not None:
            bias = memo[id(bias)] if id(bias) in memo else nn.Parameter(bias.detach().clone(), requires_grad=False)
        copied.bias = bias
        copied.train(self.training)
        return copied


def round_weights(weight: Float[Tensor, "o i"]) -> tuple[Int8[Tensor, "o i"], Float[Tensor, " o"]]:
    """Return weights as 8-bit integers, and the scale of each output. Raises ModelError if they are not finite."""
    wide = weight.float()
    scales = wide.abs().amax(1).clamp_min(_TINIEST) / _STEPS
    if not bool(scales.isfinite().all()):
        raise ModelError(
            "the language model has weights that are not finite (NaN or infinite), so they have no 8-bit form. Its "
            "training diverged, or a file is damaged: copy it again, or use an earlier checkpoint."
        )
    return (wide / scales[:, None]).round_().to(torch.int8), scales


def has_packed_kernel() -> bool:
    """Return whether this torch has FBGEMM's products of 8-bit integers: on x86 processors with AVX2."""
    return (
        any(name in torch.backends.quantized.supported_engines for name in ("x86", "fbgemm"))
        and torch.cpu._is_avx2_supported()
        and hasattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32")
    )


def _pack(rounded: Int8[Tensor, "o i"], scales: Float[Tensor, " o"]) -> Any:
    """Return weights in FBGEMM's own layout."""
    with warnings.catch_warnings():  # torch announces the end of its quantised tensors; then the other kernel is used
        warnings.simplefilter("ignore", UserWarning)
        zeros = torch.zeros(len(scales), dtype=torch.long)
        tensor = torch._make_per_channel_quantized_tensor(rounded, scales.double(), zeros, 0)
        before = torch.backends.quantized.engine
        try:
            torch.backends.quantized.engine = "fbgemm" if before not in ("x86", "fbgemm") else before
            return torch.ops.quantized.linear_prepack(tensor, None)
        finally:
            torch.backends.quantized.engine = before


def _input_steps() -> int:
    """Return the steps of an input on each side of zero: without VNNI, sums of two products have only 16 bits."""
    return 127 if torch.cpu._is_vnni_supported() and torch.cpu._is_avx512_supported() else 63


def has_int8_weights(model: nn.Module) -> bool:
    """Return whether a model has layers with 8-bit weights."""
    return any(isinstance(module, Int8Linear) for module in model.modules())


def round_to_int8(language_model: PreTrainedModel) -> None:
    """Replace a language model's linear layers, without its head, by ones with 8-bit weights, in place.

    Raises ModelError for a model that is not on a CPU, is quantised already, or has no such layers.
    """
    where = language_model.config.name_or_path or "the language model"
    if language_model.device.type != "cpu":
        raise ModelError(
            f"{where}: int8 weights are for a CPU, and the model is on {language_model.device}. On a GPU leave "
            "quantization out, or serve with engine=vllm and engine.quantization=bitsandbytes."
        )
    if find_quantization(language_model) is not None:
        raise ModelError(
            f"{where} is quantised by bitsandbytes already; leave quantization out, or load it with bits=16."
        )
    head = language_model.get_output_embeddings()
    names = [
        name
        for name, module in language_model.named_modules()
        if type(module) is nn.Linear and module is not head and not _is_of_adapter(name)
    ]
    if not names:
        raise ModelError(
            f"{where}: {type(language_model).__name__} has no plain linear layers, so it cannot have int8 weights; "
            "leave quantization out."
        )
    before = after = 0
    for name in names:  # one at a time: each one's own weights are free before the next is rounded
        plain = language_model.get_submodule(name)
        assert isinstance(plain, nn.Linear)
        before += plain.weight.nbytes
        after += plain.weight.numel() + 4 * plain.out_features
        language_model.set_submodule(name, Int8Linear(plain))
        del plain
    _return_memory()
    _log.info("int8: %d linear layers take %.0f MiB, %.0f before", len(names), after / _MIB, before / _MIB)


def _is_of_adapter(name: str) -> bool:
    """Return whether a layer is a low-rank matrix of peft's."""
    return any(part.startswith("lora_") for part in name.split("."))


def _return_memory() -> None:
    """Let the C library return freed memory to the system, where it can be told to."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # not glibc
        return

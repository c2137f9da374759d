"""Matrices of a half-precision model laid out for this processor, in the precision that it is faster at.

torch lays the weights of a product out anew each time. Few rows gain by having it done once. Many rows gain by float32
where the processor has no AMX: such x86 processors multiply bfloat16 at half the speed. Either way inputs and results
keep their dtype, and float32 is exact on them, so the results differ by the order of their sums only.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

TRIED = (8, 16, 32, 64, 128)  # rows of which the faster way is measured
NOWHERE = 2**31
REPEATS = 4
DIFFERENT = 16  # matrices of one shape that are multiplied in turn
MARGIN = 0.95  # float32 has to take less than this part of the time
BYTES = 6  # a number: its copies in half and in single precision


class PackedLinear(nn.Module):
    """A linear layer on the CPU; its float32 copy serves inputs of at least ``num_wide_rows`` rows."""

    def __init__(self, plain: nn.Linear, num_wide_rows: int) -> None:
        """Lay out copies of ``plain``'s weights; the float32 one only where it may be used."""
        super().__init__()
        self.weight, self.bias = plain.weight, plain.bias  # whoever looks for them
        self.num_wide_rows = num_wide_rows
        self.narrow = pack(plain.weight)
        self.wide = None if num_wide_rows == NOWHERE else pack(plain.weight.float())
        self.wide_bias = None if plain.bias is None else plain.bias.detach().float()

    def forward(self, inputs: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        """Multiply."""
        if self.wide is None or inputs.numel() < self.num_wide_rows * inputs.shape[-1]:
            return multiply(inputs, self.narrow, self.bias)
        return multiply(inputs.float(), self.wide, self.wide_bias).to(inputs.dtype)


def pack(weight: Float[Tensor, "o i"]) -> Tensor:
    """Return a matrix in oneDNN's own layout, as torch's compiler does to a frozen model."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    return packed


def multiply(inputs: Float[Tensor, "... i"], packed: Tensor, bias: Tensor | None) -> Float[Tensor, "... o"]:
    """Return ``linear(inputs, weight, bias)``."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")
    return product


def can_pack(layer: nn.Linear) -> bool:
    """Tell whether a layer's products have a faster way."""
    weight = layer.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def pack_linears(models: Sequence[nn.Module], max_bytes: int) -> Callable[[], None]:
    """Replace the models' plain linear layers where that is faster, and takes at most ``max_bytes`` more.

    Returns what puts them back.
    """
    plain = [
        (model, name, layer)
        for model in models
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and can_pack(layer)
    ]
    if not plain or sum(layer.weight.numel() * BYTES for _, _, layer in plain) > max_bytes:
        return lambda: None
    num_wide_rows = find_wide_rows([layer for _, _, layer in plain])
    for model, name, layer in plain:
        model.set_submodule(name, PackedLinear(layer, num_wide_rows))

    def undo() -> None:
        for model, name, layer in plain:
            model.set_submodule(name, layer)

    return undo


@torch.inference_mode()
def find_wide_rows(layers: Sequence[nn.Linear]) -> int:
    """Measure on the most frequent shape from how many rows on float32 is faster; NOWHERE if it never is."""
    [(shape, _)] = Counter(layer.weight.shape for layer in layers).most_common(1)
    # Several of them, as in a model: one alone would lie in the processor's cache, where its bytes cost nothing.
    some = [PackedLinear(layer, 0) for layer in layers if layer.weight.shape == shape][:DIFFERENT]
    fewest = NOWHERE
    for num_rows in sorted(TRIED, reverse=True):
        inputs = torch.randn(num_rows, shape[1]).to(some[0].weight.dtype)
        if time_rows(some, inputs, wide_from=0) > MARGIN * time_rows(some, inputs, wide_from=NOWHERE):
            break
        fewest = num_rows
    return fewest


def time_rows(layers: Sequence[PackedLinear], inputs: Float[Tensor, "n i"], *, wide_from: int) -> float:
    """Return the least seconds that layers kept this thread busy: of other work on the machine it knows nothing."""
    seconds = []
    for layer in layers:
        layer.num_wide_rows = wide_from
    for _ in range(REPEATS):
        start = time.thread_time()
        for layer in layers:
            layer(inputs)
        seconds.append(time.thread_time() - start)
    return min(seconds)

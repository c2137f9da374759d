"""Weight matrices repacked for this processor, in the precision that it computes faster.

torch repacks the weights for every product. Few rows gain by packing them once. Many rows of a
half-precision model gain by float32 where the processor has no AMX: such x86 processors multiply bfloat16 at half the
speed, and those without any bfloat16 instructions at a tenth of it. Either way inputs and results keep their dtype, and
float32 is exact on them, so the results differ by the order of their sums only.
"""

import time
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

TRIED = (1, 2, 4, 8, 16, 32, 64, 128)  # rows of which the faster way is measured
NOWHERE = 2**31
_REPEATS = 4
_DIFFERENT = 16  # matrices of one shape that are multiplied in turn
_MARGIN = 0.95  # float32 has to take less than this part of the time


class PackedLinear(nn.Module):
    """A linear layer on the CPU; its float32 copy serves inputs of at least ``num_wide_rows`` rows."""

    def __init__(self, plain: nn.Linear, num_wide_rows: int) -> None:
        """Pack copies of ``plain``'s weights; the float32 one only where it may be used."""
        super().__init__()
        self.weight, self.bias = plain.weight, plain.bias  # for code that reads a Linear's attributes
        self.num_wide_rows = num_wide_rows
        self.narrow = _pack(plain.weight) if _has_narrow_copy(plain) else None
        self.wide = None if num_wide_rows == NOWHERE else _pack(plain.weight.float())
        self.wide_bias = None if plain.bias is None else plain.bias.detach().float()

    def forward(self, inputs: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        """Apply the layer, through the copy that is faster for so many rows."""
        if self.wide is not None and inputs.numel() >= self.num_wide_rows * inputs.shape[-1]:
            return _multiply(inputs.float(), self.wide, self.wide_bias).to(inputs.dtype)
        if self.narrow is not None:
            return _multiply(inputs, self.narrow, self.bias)
        return nn.functional.linear(inputs, self.weight, self.bias)

    def drop_copies(self) -> None:
        """Free the packed copies; the layer still works, through its own weights."""
        self.narrow = self.wide = None


class JoinedLinear:
    """Layers with the same input as one product: fewer and larger products keep the cores busier."""

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        """Pack the layers' weights together; their own copies are freed."""
        self.sizes = [len(layer.weight) for layer in layers]
        weight = torch.cat([layer.weight.detach() for layer in layers])
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.dtype = torch.float32 if layers[0].narrow is None else weight.dtype
        self.packed = _pack(weight.to(self.dtype))
        self.bias = torch.cat(biases).to(self.dtype) if biases else None
        for layer in layers:
            layer.drop_copies()

    def __call__(self, inputs: Float[Tensor, "... i"]) -> tuple[Tensor, ...]:
        """Return the outputs of each layer."""
        outputs = _multiply(inputs.to(self.dtype), self.packed, self.bias).to(inputs.dtype)
        return outputs.split(self.sizes, -1)


def join_linears(layers: Sequence[nn.Module]) -> JoinedLinear | None:
    """Join layers with the same input; None where they are not packed in the same way for any number of rows."""
    packed = [layer for layer in layers if isinstance(layer, PackedLinear)]
    with_bias = sum(layer.bias is not None for layer in packed)
    if len(packed) < len(layers) or with_bias not in (0, len(packed)):
        return None
    narrow = all(layer.narrow is not None and layer.wide is None for layer in packed)
    wide = all(layer.wide is not None and layer.num_wide_rows <= 1 for layer in packed)
    return JoinedLinear(packed) if narrow or wide else None


def _pack(weight: Float[Tensor, "o i"]) -> Tensor:
    """Return a matrix in oneDNN's own layout, as torch's compiler does to a frozen model."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    return packed


def _multiply(inputs: Float[Tensor, "... i"], packed: Tensor, bias: Tensor | None) -> Float[Tensor, "... o"]:
    """Return ``linear(inputs, weight, bias)``."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")
    return product


def can_pack(layer: nn.Linear) -> bool:
    """Return whether a layer can be packed on this machine."""
    weight = layer.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.bfloat16, torch.float32)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _has_narrow_copy(layer: nn.Linear) -> bool:
    """Return whether few rows use a packed copy too: the processor has bfloat16 instructions for it."""
    return layer.weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def num_packed_bytes(layer: nn.Linear) -> int:
    """Return the most bytes that a layer's copies take."""
    return layer.weight.numel() * (4 + 2 * _has_narrow_copy(layer))


def pack_linears(models: Sequence[nn.Module], max_bytes: int) -> Callable[[], None]:
    """Replace the models' linear layers by packed ones, if the copies take at most ``max_bytes``.

    Return a function that restores them.
    """
    plain = [
        (model, name, layer)
        for model in models
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and can_pack(layer)
    ]
    if not plain or sum(num_packed_bytes(layer) for _, _, layer in plain) > max_bytes:
        return lambda: None
    by_shape: dict[torch.Size, list[nn.Linear]] = {}
    for _, _, layer in plain:
        by_shape.setdefault(layer.weight.shape, []).append(layer)
    num_wide_rows = {shape: measure_wide_rows(layers) for shape, layers in by_shape.items()}
    for model, name, layer in plain:
        model.set_submodule(name, PackedLinear(layer, num_wide_rows[layer.weight.shape]))

    def undo() -> None:
        for model, name, layer in plain:
            model.set_submodule(name, layer)

    return undo


@torch.inference_mode()
def measure_wide_rows(layers: Sequence[nn.Linear]) -> int:
    """Measure the least number of rows for which float32 is faster, on layers of one shape; NOWHERE if none."""
    # Several of them, as in a model: a single one would stay in the processor's cache, where reading it costs nothing.
    some = [PackedLinear(layer, 0) for layer in layers[:_DIFFERENT]]
    for num_rows in TRIED:  # upwards: where bfloat16 is slow, many rows of it would take minutes
        inputs = torch.randn(num_rows, layers[0].in_features).to(layers[0].weight.dtype)
        if _time_rows(some, inputs, wide_from=0) < _MARGIN * _time_rows(some, inputs, wide_from=NOWHERE):
            return num_rows
    return NOWHERE


def _time_rows(layers: Sequence[PackedLinear], inputs: Float[Tensor, "n i"], *, wide_from: int) -> float:
    """Return the least CPU seconds of this thread for the layers, unaffected by other load on the machine."""
    seconds = []
    for layer in layers:
        layer.num_wide_rows = wide_from
    for _ in range(_REPEATS):
        start = time.thread_time()
        for layer in layers:
            layer(inputs)
        seconds.append(time.thread_time() - start)
    return min(seconds)

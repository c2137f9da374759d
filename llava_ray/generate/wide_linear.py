"""Half-precision matrices multiplied in the precision that this processor is faster at.

Without AMX, x86 processors multiply bfloat16 at half the speed of float32, from some tens of rows on: what a batch
gains over its requests one by one is then lost to the number format. The products are the same numbers but for the
order of their sums: inputs and results keep their dtype, and float32 is exact on them.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

TRIED = (8, 16, 32, 64, 128)  # rows of which the faster way is measured
REPEATS = 5
MARGIN = 0.9  # float32 has to take less than this part of the time


class WideLinear(nn.Module):
    """A linear layer that takes its float32 copy for inputs of at least ``num_rows`` rows."""

    def __init__(self, narrow: nn.Linear, num_rows: int) -> None:
        """Keep ``narrow`` for inputs of fewer rows."""
        super().__init__()
        self.narrow = narrow
        self.num_rows = num_rows
        self.weight = narrow.weight
        self.wide = narrow.weight.detach().float()
        self.bias = None if narrow.bias is None else narrow.bias.detach().float()

    def forward(self, inputs: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        """Multiply."""
        if inputs.numel() < self.num_rows * inputs.shape[-1]:
            output: Tensor = self.narrow(inputs)
            return output
        return linear(inputs.float(), self.wide, self.bias).to(inputs.dtype)


def widen(models: Sequence[nn.Module], max_bytes: int) -> Callable[[], None]:
    """Put float32 copies beside the models' plain linear layers where they are faster and take at most ``max_bytes``.

    Returns what takes them away again.
    """
    plain = [
        (model, name, layer) for model in models for name, layer in model.named_modules() if type(layer) is nn.Linear
    ]
    fits = sum(layer.weight.numel() * 4 for _, _, layer in plain) <= max_bytes
    num_rows = find_wide_rows([layer for _, _, layer in plain]) if fits else None
    if num_rows is None:
        return lambda: None
    for model, name, layer in plain:
        model.set_submodule(name, WideLinear(layer, num_rows))

    def undo() -> None:
        for model, name, layer in plain:
            model.set_submodule(name, layer)

    return undo


@torch.inference_mode()
def find_wide_rows(layers: Sequence[nn.Linear]) -> int | None:
    """Measure on the most frequent shape from how many rows on float32 is faster; None if nowhere."""
    if not layers or layers[0].weight.dtype == torch.float32 or layers[0].weight.device.type != "cpu":
        return None
    [(shape, _)] = Counter(layer.weight.shape for layer in layers).most_common(1)
    narrow = next(layer for layer in layers if layer.weight.shape == shape)
    wide = WideLinear(narrow, 0)
    faster_from = None
    for num_rows in sorted(TRIED, reverse=True):
        inputs = torch.randn(num_rows, narrow.in_features).to(narrow.weight.dtype)
        if fastest(partial(wide, inputs)) > MARGIN * fastest(partial(narrow, inputs)):
            break
        faster_from = num_rows
    return faster_from


def fastest(run: Callable[[], object]) -> float:
    """Return the least seconds that a few runs kept this thread busy: of other work on the machine it knows nothing."""
    run()
    seconds = []
    for _ in range(REPEATS):
        start = time.thread_time()
        run()
        seconds.append(time.thread_time() - start)
    return min(seconds)

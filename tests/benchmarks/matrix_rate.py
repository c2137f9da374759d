"""The rate at which the processor multiplies matrices: what a training step's rate is a share of."""

import statistics
import time

import torch

_ROW = 1600  # tokens: about two rows hold a batch of eight


def measure_matrix_rate(dtype: torch.dtype, num_rounds: int = 9) -> float:
    """Return the operations per second of the multiplications of a block, forward and backward; a median."""
    shapes = [(512, 512)] * 4 + [(512, 1376)] * 2 + [(1376, 512)]
    tensors = [
        (torch.randn(_ROW, rows).to(dtype), torch.randn(columns, rows).to(dtype), torch.randn(_ROW, columns).to(dtype))
        for rows, columns in shapes
    ]
    work = sum(6 * _ROW * rows * columns for rows, columns in shapes)
    seconds = []
    for _ in range(num_rounds):
        start = time.perf_counter()
        for states, weight, slopes in tensors:
            torch.mm(states, weight.t())
            torch.mm(slopes, weight)
            torch.mm(slopes.t(), states)
        seconds.append(time.perf_counter() - start)
    return work / statistics.median(seconds)

"""A rough estimate of computing time: FLOPs and bytes over a device's known or measured throughput."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from llava_ray.config.run import ClusterConfig
from llava_ray.train.planning.peaks import PEAKS

_REACHED = 0.35
"""Share of the peak that models of this size reach on a GPU."""
_SIDE = 768  # of the matrices that a CPU is measured with
_MEASURED_SECONDS = 0.2


@dataclass(frozen=True)
class Pace:
    """The throughput of a device that models reach."""

    name: str
    flops: float
    bandwidth: float
    """Bytes of memory read."""

    def seconds(self, flops: float, num_bytes: float = 0.0) -> float:
        """Return the seconds for so many operations and bytes: whichever takes longer."""
        return max(flops / self.flops, num_bytes / self.bandwidth)


def find_pace(cluster: ClusterConfig) -> Pace | None:
    """Return the pace of cluster.accelerator_type, or of this machine where the run stays here; None if unknown."""
    name = cluster.accelerator_type
    if name is not None:
        return known_pace(name)
    if cluster.address is not None or cluster.use_gpu is True:
        return None
    import torch

    return None if torch.cuda.is_available() and cluster.use_gpu else measure_cpu()


def known_pace(name: str) -> Pace | None:
    """Return the pace of an accelerator by Ray's name."""
    if name not in PEAKS:
        return None
    peak, bandwidth = PEAKS[name]
    return Pace(f"{_REACHED:.0%} of the peak of {name}", _REACHED * peak, bandwidth)


def measure_cpu() -> Pace:
    """Measure the pace of this machine's CPU with all its threads, briefly."""
    import torch

    left, large = torch.ones(_SIDE, _SIDE), torch.ones(2**24)
    return Pace(
        "this machine's CPU, just measured",
        2 * _SIDE**3 / _seconds_of(lambda: torch.mm(left, left)),
        large.numel() * large.element_size() / _seconds_of(large.sum),
    )


def format_duration(seconds: float) -> str:
    """Format a duration: "40 s", "12 min", "3.5 h"."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.{0 if unit == 'min' or seconds >= 10 * size else 1}f} {unit}"
    return f"{max(1, round(seconds))} s"


def _seconds_of(work: Callable[[], object]) -> float:
    work()
    start, num = time.perf_counter(), 0
    while time.perf_counter() - start < _MEASURED_SECONDS / 2:
        work()
        num += 1
    return (time.perf_counter() - start) / num

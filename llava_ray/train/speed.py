"""The metrics of a step: time, tokens, padding, waiting for data, memory, share of the device's peak."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from llava_ray.data.batches import MicroBatch
from llava_ray.model.network.llava import Llava
from llava_ray.model.network.quantization import count_elements
from llava_ray.objectives.objective import find_supervised

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

# Dense bf16 peak in FLOP/s, from the makers' data sheets, by torch's device name.
_PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


class Meter:
    """Measure one rank's steps; metrics of the whole run assume that ranks are alike, which packing ensures."""

    def __init__(self, llava: Llava, device: torch.device, world_size: int) -> None:
        """Count the parameters of one forward pass per token."""
        # A trainable tower is left out like a frozen one: it processes views, not the tokens counted here.
        counted = [p for name, p in llava.named_parameters() if not name.startswith("vision_tower.")]
        sizes = [(count_elements(p), p.requires_grad) for p in counted]
        # Forward 2, gradient of activations 2, gradient of weights 2 FLOPs a parameter and token.
        self.flops_per_token = sum(6 * size if trainable else 4 * size for size, trainable in sizes)
        self.device = device
        self.world_size = world_size
        self.peak = _PEAK_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.waited = 0.0
        self.last = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the time that the block spends waiting for data."""
        start = time.perf_counter()
        yield
        self.waited = time.perf_counter() - start

    @contextmanager
    def excluded_from_timing(self) -> Iterator[None]:
        """Exclude the block from the next step's time."""
        start = time.perf_counter()
        yield
        self.last += time.perf_counter() - start

    def measure(
        self, loss: float, batches: list[MicroBatch], engine: "DeepSpeedEngine", row_length: int
    ) -> dict[str, float]:
        """Return the metrics of the step that has just ended."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        num_tokens = sum(sum(batch.num_tokens) for batch in batches)
        supervised = sum(len(find_supervised(batch.labels, batch.position_ids)[0]) for batch in batches)
        rates = dict(zip((g["name"] for g in engine.optimizer.param_groups), engine.get_lr(), strict=True))
        metrics = {
            "loss": loss,
            "learning_rate": next((rate for name, rate in rates.items() if name.startswith("language")), 0.0),
            "mm_projector_lr": next((rate for name, rate in rates.items() if name.startswith("projector")), 0.0),
            "samples_per_second": self.world_size * sum(len(batch.ids) for batch in batches) / seconds,
            "tokens_per_second": self.world_size * num_tokens / seconds,
            "supervised_tokens_per_second": self.world_size * supervised / seconds,
            "padding_share": 1 - num_tokens / (len(batches) * row_length),
            "data_wait_seconds": self.waited,
            "step_seconds": seconds,
            "memory_gib": self.memory() / 2**30,
            "skipped_steps": float(engine.skipped_steps),
        }
        if any(name.startswith("vision_tower") for name in rates):
            metrics["mm_vision_tower_lr"] = next(
                rate for name, rate in rates.items() if name.startswith("vision_tower")
            )
        norm = engine.get_global_grad_norm()
        if norm is not None:  # DeepSpeed does not compute it at stage 0 in fp32
            metrics["grad_norm"] = float(norm)
        if self.peak:
            metrics["mfu"] = self.flops_per_token * num_tokens / seconds / self.peak
        return metrics

    def memory(self) -> int:
        """Return this rank's peak memory in bytes: the GPU's, or the process's resident set."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

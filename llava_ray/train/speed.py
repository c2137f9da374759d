"""The metrics of a step: time and its phases, tokens, padding, memory, useful operations and their share of a peak."""

import resource
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llava_ray.data.batches import MicroBatch
from llava_ray.model.assembly import LlavaParts
from llava_ray.objectives.objective import find_supervised
from llava_ray.train.flops import StepWork, UsefulFlops
from llava_ray.train.phases import PhaseClock
from llava_ray.train.planning.peaks import find_peak

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class StepNotes:
    """What the host knows of a step on this rank when it has ended there."""

    num_samples: int
    num_tokens: int
    num_supervised: int
    flops: float
    metrics: dict[str, float]
    norm: float | Tensor | None
    """Of the gradients; perhaps still on its way from the device."""


class Meter:
    """Measure one rank's steps; metrics of the whole run assume that ranks are alike, which packing ensures."""

    def __init__(self, parts: LlavaParts, device: torch.device, world_size: int) -> None:
        """Count the model's operations, and watch the collectives of its engine, which exists."""
        from deepspeed.comm import comm

        self.parts = parts
        self.flops = UsefulFlops.measure(parts.llava, parts.tower, parts.image_spec.height)
        self.phases = PhaseClock(device)
        self.phases.watch_collectives(comm.cdb)
        self.device = device
        self.world_size = world_size
        self.peak = find_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.waited = 0.0
        self.last = time.perf_counter()

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Measure the block as one of a step's ``PHASES``."""
        return self.phases.phase(name)

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

    def note(self, batches: list[MicroBatch], engine: "DeepSpeedEngine", row_length: int) -> StepNotes:
        """Note what the host knows of the step that has just ended; no GPU is waited for."""
        num_tokens = sum(sum(batch.num_tokens) for batch in batches)
        supervised = sum(len(find_supervised(batch.labels, batch.position_ids)[0]) for batch in batches)
        rates = dict(zip((g["name"] for g in engine.optimizer.param_groups), engine.get_lr(), strict=True))
        metrics = {
            "learning_rate": next((rate for name, rate in rates.items() if name.startswith("language")), 0.0),
            "mm_projector_lr": next((rate for name, rate in rates.items() if name.startswith("projector")), 0.0),
            "padding_share": 1 - num_tokens / (len(batches) * row_length),
            "data_wait_seconds": self.waited,
            "skipped_steps": float(engine.skipped_steps),
        } | self.phases.end_step()
        if any(name.startswith("vision_tower") for name in rates):
            metrics["mm_vision_tower_lr"] = next(
                rate for name, rate in rates.items() if name.startswith("vision_tower")
            )
        return StepNotes(
            num_samples=sum(len(batch.ids) for batch in batches),
            num_tokens=num_tokens,
            num_supervised=supervised,
            flops=self.flops.count(self.work_of(batches, supervised)),
            metrics=metrics,
            norm=engine.get_global_grad_norm(),  # None: DeepSpeed does not compute it at stage 0 in fp32
        )

    def take_seconds(self, num_steps: int) -> float:
        """Return the seconds of each of the steps since this was last asked; one by one a GPU's host does not know."""
        now = time.perf_counter()
        seconds, self.last = (now - self.last) / num_steps, now
        return seconds

    def measure(self, loss: float, notes: StepNotes, seconds: float) -> dict[str, float]:
        """Return the metrics of a step that took so many seconds."""
        metrics = {
            "loss": loss,
            "samples_per_second": self.world_size * notes.num_samples / seconds,
            "tokens_per_second": self.world_size * notes.num_tokens / seconds,
            "supervised_tokens_per_second": self.world_size * notes.num_supervised / seconds,
            "step_seconds": seconds,
            "memory_gib": self.memory() / 2**30,
            "useful_tflops": notes.flops / seconds / 1e12,
        } | notes.metrics
        if notes.norm is not None:
            metrics["grad_norm"] = float(notes.norm)
        if self.peak:
            metrics["mfu"] = notes.flops / seconds / self.peak
        return metrics

    def work_of(self, batches: list[MicroBatch], num_supervised: int) -> StepWork:
        """Return what this rank had to compute for its micro-batches."""
        num_views = [sum(self.parts.image_tokens.num_views(*size) for size in batch.image_sizes) for batch in batches]
        here = sum(views for batch, views in zip(batches, num_views, strict=True) if batch.pixels is not None)
        num_features = sum(num_views) * self.parts.image_tokens.num_features
        return StepWork([n for batch in batches for n in batch.num_tokens], num_supervised, num_features, here)

    def memory(self) -> int:
        """Return this rank's peak memory in bytes: the GPU's, or the process's resident set."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""Training steps of our modules in bare torch, without Ray and DeepSpeed: padded as others do it, or packed as we do.

``padded`` is the baseline: batches of eight samples of similar lengths, padded, masked SDPA, logits at all positions.
``packed`` is the ceiling of a run: the same rows, attention and losses as a run's, and nothing around them.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from matrix_rate import measure_matrix_rate
from torch import Tensor
from torch.nn.functional import cross_entropy

from llava_ray.chat.conversation import IGNORE_INDEX
from llava_ray.config.finetune import FinetuneConfig
from llava_ray.data.batches import MicroBatch, micro_batch
from llava_ray.data.descriptors import describe_micro_batches
from llava_ray.data.packing import NO_STEP
from llava_ray.data.plan import Plan
from llava_ray.data.preparation import prepare_data
from llava_ray.data.settings import StreamSettings
from llava_ray.data.stages import add_images, read_micro_batches
from llava_ray.images.processing import normalize_pixels
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.freezing import freeze
from llava_ray.objectives.cross_entropy import CrossEntropy
from llava_ray.objectives.objective import find_supervised
from llava_ray.runtime import Resources
from llava_ray.train.allocation import keep_freed_memory
from llava_ray.train.engine import assemble_for
from llava_ray.train.flops import StepWork, UsefulFlops
from llava_ray.train.objective import build_row
from llava_ray.train.run_data import make_plan, stream_settings

CPU = torch.device("cpu")
Loss = Callable[[Sequence[MicroBatch]], float]


def read_steps(
    config: FinetuneConfig, parts: LlavaParts, num_steps: int
) -> tuple[list[list[MicroBatch]], StreamSettings]:
    """Return the micro-batches of a run's first steps, images decoded."""
    config = config.replaced({"data.vision_features": "inline"})
    prepared = prepare_data(config.data, show_progress=False)
    lengths, plan = make_plan(config, prepared, parts)
    settings = stream_settings(config, prepared, parts, Resources(1, 1.0, False, None))
    return list(_steps(plan, lengths, settings, num_steps)), settings


def _steps(plan: Plan, lengths, settings: StreamSettings, num_steps: int) -> Iterator[list[MicroBatch]]:
    """Yield the micro-batches of each step."""
    by_step: dict[int, list[MicroBatch]] = {}
    for window in describe_micro_batches(plan, lengths, range(num_steps), settings.row_length, 1):
        for table in read_micro_batches(window, settings):
            for row in add_images(table, settings).to_pylist():
                if row["step"] != NO_STEP:
                    by_step.setdefault(row["step"], []).append(micro_batch(row, settings))
    yield from by_step.values()


class Optimizer:
    """AdamW with clipping; the weights of a model in bf16 have fp32 copies, as DeepSpeed keeps them."""

    def __init__(self, parts: LlavaParts) -> None:
        """Copy the weights, if they are in half precision."""
        self.own = [p for p in parts.llava.parameters() if p.requires_grad]
        self.half = self.own[0].dtype != torch.float32
        self.master = [p.detach().float().requires_grad_() for p in self.own] if self.half else self.own
        self.adamw = torch.optim.AdamW(self.master, lr=2e-5, weight_decay=0.0, fused=True)

    def step(self) -> None:
        """Clip, step and clear the gradients."""
        if self.half:
            for master, own in zip(self.master, self.own, strict=True):
                master.grad, own.grad = own.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.master, 1.0)
        self.adamw.step()
        if self.half:
            torch._foreach_copy_([p.data for p in self.own], [p.data for p in self.master])
        self.adamw.zero_grad()


def packed(parts: LlavaParts, settings: StreamSettings, features: dict[int, Tensor] | None) -> Loss:
    """Return a step's forward and backward as a run computes it."""
    parts.llava.attend_by_sample()

    def compute(batches: Sequence[MicroBatch]) -> float:
        total = 0.0
        for batch in batches:
            if features is not None and id(batch) in features:
                batch = _with(batch, pixels=None, features=features[id(batch)])
            output = CrossEntropy().compute(parts.llava, build_row(batch, parts, settings, CPU))
            loss = output.loss_sum / batch.num_supervised
            loss.backward()
            total += float(loss.detach())
        return total

    return compute


def padded(parts: LlavaParts, settings: StreamSettings) -> Loss:
    """Return a step's forward and backward as a padded batch."""

    def compute(batches: Sequence[MicroBatch]) -> float:
        samples = [sample for batch in batches for sample in _split(batch)]
        width = max(len(ids) for ids, _ in samples)
        ids = torch.stack([torch.nn.functional.pad(ids, (0, width - len(ids))) for ids, _ in samples])
        labels = [
            torch.nn.functional.pad(labels, (0, width - len(labels)), value=IGNORE_INDEX) for _, labels in samples
        ]
        mask = torch.stack([torch.arange(width) < len(ids) for ids, _ in samples]).long()
        pixels = [batch.pixels for batch in batches if batch.pixels is not None]
        features = None
        if pixels:
            views = normalize_pixels(torch.cat(pixels), settings.image_spec)
            features = parts.tower.extract(views)
        logits = parts.llava.language_model(
            inputs_embeds=parts.llava.embed(ids, features), attention_mask=mask, use_cache=False
        ).logits
        following = torch.stack(labels)[:, 1:].flatten()
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), following, ignore_index=IGNORE_INDEX)
        loss.backward()
        return float(loss.detach())

    return compute


def _split(batch: MicroBatch) -> list[tuple[Tensor, Tensor]]:
    """Return the ids and labels of each sample of a row."""
    return list(zip(batch.input_ids[0].split(batch.num_tokens), batch.labels[0].split(batch.num_tokens), strict=True))


def _with(batch: MicroBatch, **changes) -> MicroBatch:
    return MicroBatch(**{**vars(batch), **changes})


def group_by_length(steps: list[list[MicroBatch]]) -> list[list[MicroBatch]]:
    """Return the same samples in batches of eight of similar lengths, each sample a row of its own."""
    rows = []
    for batch in (batch for step in steps for batch in step):
        image = 0
        for number, (ids, labels) in enumerate(_split(batch)):
            shown = bool((ids == -200).any())
            pixels = batch.pixels[image : image + 1] if shown and batch.pixels is not None else None
            sizes = batch.image_sizes[image : image + 1] if shown else []
            image += shown
            rows.append(
                _with(
                    batch,
                    ids=[batch.ids[number]],
                    num_tokens=[len(ids)],
                    input_ids=ids[None],
                    labels=labels[None],
                    position_ids=torch.arange(len(ids))[None],
                    pixels=pixels,
                    image_sizes=sizes,
                )
            )
    rows.sort(key=lambda row: row.num_tokens[0])
    groups = [rows[start : start + 8] for start in range(0, len(rows) - 7, 8)]
    return groups[::2] + groups[1::2]  # short and long ones in turn


def count_work(parts: LlavaParts, batches: Sequence[MicroBatch], *, inline: bool) -> float:
    """Return the useful operations of a step, as a run counts them; the tower's only where it runs here."""
    num_images = sum(len(batch.image_sizes) for batch in batches)
    work = StepWork(
        [length for batch in batches for length in batch.num_tokens],
        sum(len(find_supervised(batch.labels, batch.position_ids)[0]) for batch in batches),
        num_images * parts.image_tokens.num_features,
        num_images if inline else 0,
    )
    return UsefulFlops.measure(parts.llava, parts.tower, parts.image_spec.height).count(work)


def time_steps(
    config: FinetuneConfig, *, way: str, num_steps: int, num_warm: int, trace: Path | None = None
) -> dict[str, float]:
    """Time steps of one way; return medians of rates and seconds."""
    keep_freed_memory()
    parts = assemble_for(config)
    freeze(parts.llava, parts.tower, config.model)
    parts.llava.train()
    steps, settings = read_steps(config, parts, num_steps)
    cached = config.data.vision_features == "cached"
    features = {id(b): build_row(b, parts, settings, CPU).features for s in steps for b in s if b.pixels is not None}
    if way == "padded":
        steps, compute = group_by_length(steps), padded(parts, settings)
    else:
        compute = packed(parts, settings, features if cached else None)
    optimizer = Optimizer(parts)
    matrix_rate = measure_matrix_rate(torch.bfloat16 if config.train.bf16 else torch.float32)
    rates, seconds = [], []
    for number, batches in enumerate(steps):
        start = time.perf_counter()
        with _profiling(trace if number == len(steps) - 1 else None):
            compute(batches)
            optimizer.step()
        took = time.perf_counter() - start
        if number >= num_warm:
            seconds.append(took)
            rates.append(count_work(parts, batches, inline=not cached) / took)
    return {
        "useful_gflops": statistics.median(rates) / 1e9,
        "step_seconds": statistics.median(seconds),
        "matrix_gflops": matrix_rate / 1e9,
    }


def _profiling(trace: Path | None):
    """Return a context that prints where a step's time goes, and writes its trace."""
    from contextlib import contextmanager, nullcontext

    @contextmanager
    def profiled():
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            yield
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))
        if trace:
            profiler.export_chrome_trace(str(trace))

    return profiled() if trace else nullcontext()

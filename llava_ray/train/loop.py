"""The training loop of every worker: set-up, then batch → forward → loss → backward → step → report → checkpoint."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device

from llava_ray.data.batches import describe_row, iterate_steps
from llava_ray.model.assembly import LlavaParts
from llava_ray.objectives.table import OBJECTIVES
from llava_ray.train.allocation import keep_freed_memory
from llava_ray.train.checkpoints import Checkpointer
from llava_ray.train.engine import build_engine, load_parts
from llava_ray.train.final_model import save_final_model
from llava_ray.train.heartbeat import Heartbeat
from llava_ray.train.held_out import HeldOutEvaluator
from llava_ray.train.nonfinite import StepGuard
from llava_ray.train.objective import StepLoss, build_row
from llava_ray.train.out_of_memory import naming_memory
from llava_ray.train.profiling import StepProfiler
from llava_ray.train.randomness import seed_all
from llava_ray.train.settings import LoopSettings
from llava_ray.train.speed import Meter

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def train_loop(settings: LoopSettings, blocks: Iterator[pa.Table]) -> None:
    """Train from the committed checkpoint; write the final bundle after the plan's last step."""
    rank, config = ray.train.get_context().get_world_rank(), settings.config
    heart = Heartbeat(settings.journal, rank, config.run.hang_minutes)
    with heart.watching(), naming_memory(rank, config, lambda: heart.doing):
        _train(settings, blocks, heart)


def _train(settings: LoopSettings, blocks: Iterator[pa.Table], heart: Heartbeat) -> None:
    """Train from the committed checkpoint, as ``train_loop`` does, under a heartbeat."""
    config, journal = settings.config, settings.journal
    rank, world_size = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    device = get_device()
    engine, parts = _load(settings, rank, device, heart)
    checkpointer = Checkpointer(engine, parts, settings)
    first_step = _resume(checkpointer, heart)
    # By every rank before the first step: a late call would drop what others have recorded of it.
    ray.get(journal.rewind.remote(rank, first_step, world_size))
    heart.enter("first batch")
    objective = OBJECTIVES[settings.objective]
    examiner = HeldOutEvaluator(settings.held_out, parts, objective, rank, world_size)
    meter = Meter(parts, device, world_size)
    guard = StepGuard(engine, parts, settings, device)
    profiler = StepProfiler(settings.profile, settings.run_folder, rank, journal.say.remote)

    told: ray.ObjectRef | None = None
    steps = iterate_steps(blocks, rank, first_step, settings.stream)
    for step in range(first_step, settings.until):
        heart.mark(heart.phase_of(step, first_step), f"step {step}, waiting for data")
        profiler.start(step)
        with meter.waiting():
            batches = next(steps)
        step_loss = StepLoss(objective, device)
        for batch in batches:
            heart.mark(heart.phase, f"step {step}, {describe_row(batch)}")
            row = build_row(batch, parts, settings.stream, device, meter.phase)
            with meter.phase("forward"):
                output = objective.compute(engine, row)
            guard.keep(batch, output)
            with meter.phase("backward"):
                # DeepSpeed averages gradients over ranks; ours are already parts of one mean over the step's terms.
                engine.backward(step_loss.add(output, batch) * world_size, scale_wrt_gas=False)
        heart.mark(heart.phase, f"step {step}, optimiser")
        loss, objective_metrics = guard.step(step_loss, meter.phase)
        with meter.phase("communication"):
            stopping = _agree_to_stop(told, device)
        profiler.end(step)
        diverged = guard.check(step, loss)
        if diverged is not None:
            # Every rank returns: Ray then commits checkpoints that are still on their way, and repeats nothing.
            ray.get(journal.fail.remote(diverged))
            return
        metrics = meter.measure(loss, batches, engine, config.train.row_length) | objective_metrics
        judged: dict[str, float] = {}
        if checkpointer.is_due(step + 1):
            heart.mark("held-out evaluation", f"step {step}, held-out evaluation")
            with meter.excluded_from_timing():
                judged = examiner.evaluate(engine, device)
        told = journal.record.remote(rank, step, metrics | judged, [name for batch in batches for name in batch.ids])
        if stopping or checkpointer.is_due(step + 1):
            heart.mark("saving", f"step {step}, saving")
            checkpointer.save(step + 1, judged)
        if stopping and step + 1 < settings.until:
            return
    if settings.until == settings.num_steps:
        heart.enter("writing the model")
        save_final_model(engine, parts, settings)


def _load(
    settings: LoopSettings, rank: int, device: torch.device, heart: Heartbeat
) -> tuple["DeepSpeedEngine", LlavaParts]:
    """Load the model and build the engine around it."""
    config = settings.config
    torch.set_num_threads(settings.num_threads)
    if device.type == "cpu":  # a GPU's host would keep the memory through which the weights came
        keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = config.train.tf32
    seed_all(config.train.seed, 0, rank)
    heart.enter("loading the model")
    parts = load_parts(config, device, say=settings.journal.say.remote)
    heart.enter("starting DeepSpeed")
    return build_engine(parts, config, settings.num_steps), parts


def _resume(checkpointer: Checkpointer, heart: Heartbeat) -> int:
    """Restore the committed checkpoint and return its step; before the first step try to write one."""
    heart.enter("looking for a checkpoint")
    first_step = checkpointer.restore()
    if first_step == 0:
        heart.enter("trying to write a checkpoint")
        checkpointer.save_dry_run()
    return first_step


def _agree_to_stop(told: ray.ObjectRef | None, device: torch.device) -> bool:
    """Return whether any rank has learned, from the recorder's answer to an earlier step, that the run is to stop.

    All ranks have to leave the loop after the same step. Collective.
    """
    heard = told is not None and bool(ray.wait([told], timeout=0)[0]) and ray.get(told)
    stop = torch.tensor(int(heard), device=device)
    dist.all_reduce(stop, dist.ReduceOp.MAX)
    return bool(stop.item())

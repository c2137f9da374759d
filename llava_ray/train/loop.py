"""The training loop of every worker: set-up, then batch → forward → loss → backward → step → report → checkpoint."""

import math
from collections.abc import Iterator

import pyarrow as pa
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device

from llava_ray.data.batches import MicroBatch, iterate_steps
from llava_ray.errors import DivergedError
from llava_ray.invocation import command
from llava_ray.objectives.table import OBJECTIVES
from llava_ray.train.allocation import keep_freed_memory
from llava_ray.train.checkpoints import Checkpointer, seed_all
from llava_ray.train.engine import build_engine, load_parts
from llava_ray.train.final_model import save_final_model
from llava_ray.train.held_out import HeldOutEvaluator
from llava_ray.train.objective import StepLoss, build_row
from llava_ray.train.settings import LoopSettings
from llava_ray.train.speed import Meter


def train_loop(settings: LoopSettings, blocks: Iterator[pa.Table]) -> None:
    """Train from the committed checkpoint; write the final bundle after the plan's last step."""
    config, journal = settings.config, settings.journal
    rank, world_size = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    torch.set_num_threads(settings.num_threads)
    keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = config.train.tf32
    device = get_device()

    seed_all(config.train.seed, 0, rank)
    journal.enter.remote("loading the model")
    parts = load_parts(config, device, say=journal.say.remote)
    journal.enter.remote("starting DeepSpeed")
    engine = build_engine(parts, config, settings.num_steps)
    checkpointer = Checkpointer(engine, parts, settings)
    journal.enter.remote("looking for a checkpoint")
    first_step = checkpointer.restore()
    rewound = journal.rewind.remote(rank, first_step, world_size)
    if first_step == 0:
        journal.enter.remote("trying to write a checkpoint")
        checkpointer.save_dry_run()
    journal.enter.remote("first batch")
    objective = OBJECTIVES[settings.objective]
    examiner = HeldOutEvaluator(settings.held_out, parts, objective, rank, world_size)
    meter = Meter(parts.llava, device, world_size)

    ray.get(rewound)  # by every rank before the first step: a late one would drop what others have recorded of it
    told: ray.ObjectRef | None = None
    steps = iterate_steps(blocks, rank, first_step, settings.stream)
    for step in range(first_step, settings.until):
        with meter.waiting():
            batches = next(steps)
        step_loss = StepLoss(objective, device)
        for batch in batches:
            output = objective.compute(engine, build_row(batch, parts, settings.stream, device))
            # DeepSpeed averages gradients over ranks; ours are already parts of one mean over the step's terms.
            engine.backward(step_loss.add(output, batch) * world_size, scale_wrt_gas=False)
        engine.step()
        loss, objective_metrics = step_loss.reduce()
        stopping = _agree_to_stop(told, device)
        _check_loss_finite(loss, step, batches)
        metrics = meter.measure(loss, batches, engine, config.train.row_length) | objective_metrics
        samples = [sample for batch in batches for sample in batch.ids]
        judged: dict[str, float] = {}
        if checkpointer.is_due(step + 1):
            with meter.excluded_from_timing():
                judged = examiner.evaluate(engine, device)
        told = journal.record.remote(rank, step, metrics | judged, samples)
        if stopping or checkpointer.is_due(step + 1):
            checkpointer.save(step + 1, judged)
        if stopping and step + 1 < settings.until:
            return
    if settings.until == settings.num_steps:
        journal.enter.remote("writing the model")
        save_final_model(engine, parts, settings)


def _agree_to_stop(told: ray.ObjectRef | None, device: torch.device) -> bool:
    """Return whether any rank has learned, from the recorder's answer to an earlier step, that the run is to stop.

    All ranks have to leave the loop after the same step. Collective.
    """
    heard = told is not None and bool(ray.wait([told], timeout=0)[0]) and ray.get(told)
    stop = torch.tensor(int(heard), device=device)
    dist.all_reduce(stop, dist.ReduceOp.MAX)
    return bool(stop.item())


def _check_loss_finite(loss: float, step: int, batches: list[MicroBatch]) -> None:
    """Raise DivergedError for a loss that is not finite, naming this rank's samples."""
    if not math.isfinite(loss):
        ids = ", ".join(sample for batch in batches for sample in batch.ids)
        raise DivergedError(
            f"step {step}: the loss is {loss}; this rank's samples were {ids}. Look at them with {command('preview')}; "
            "if they are sound, lower train.learning_rate"
        )

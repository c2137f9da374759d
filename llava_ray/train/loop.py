"""The training loop of every worker: set-up, then batch → forward → loss → backward → step → report → checkpoint."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device

from llava_ray.config.held_out import HeldOutConfig
from llava_ray.data.batches import MicroBatch, describe_row, iterate_steps
from llava_ray.model.assembly import LlavaParts
from llava_ray.objectives.table import build_held_out_objective, build_objective
from llava_ray.train.allocation import keep_freed_memory
from llava_ray.train.checkpoints import Checkpointer
from llava_ray.train.engine import build_engine, load_parts
from llava_ray.train.final_model import save_final_model
from llava_ray.train.heartbeat import Heartbeat
from llava_ray.train.held_out_sets import HeldOutSets
from llava_ray.train.loss_window import EndedStep, LossWindow
from llava_ray.train.nonfinite import StepEnd, StepGuard
from llava_ray.train.objective import RowsAhead, StepLoss
from llava_ray.train.out_of_memory import naming_memory
from llava_ray.train.profiling import StepProfiler
from llava_ray.train.randomness import seed_all
from llava_ray.train.reference import check_reference
from llava_ray.train.rollouts.rows import find_ledger_ids, find_step_metrics
from llava_ray.train.rollouts.source import RolloutsEndedError, RolloutSource
from llava_ray.train.score_history import ScoreHistory
from llava_ray.train.settings import LoopSettings
from llava_ray.train.speed import Meter

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def train_loop(settings: LoopSettings, blocks: Iterator[pa.Table]) -> None:
    """Train from the committed checkpoint; write the final bundle after the plan's last step."""
    rank, config = ray.train.get_context().get_world_rank(), settings.config
    heart = Heartbeat(settings.journal, rank, config.run.hang_minutes)
    with heart.watching(), naming_memory(rank, config, lambda: heart.doing):
        loop = _Loop(settings, heart)
        if loop.run(blocks) and settings.until == settings.num_steps:
            heart.enter("writing the model")
            loop.write_model()


class _Loop:
    """The steps of one worker."""

    scores = ScoreHistory(HeldOutConfig())
    sources: Sequence[str] = ()

    def __init__(self, settings: LoopSettings, heart: Heartbeat) -> None:
        """Load the model and restore the committed checkpoint; collective."""
        config, context = settings.config, ray.train.get_context()
        self.settings, self.heart, self.journal = settings, heart, settings.journal
        self.rank, self.world_size, self.device = context.get_world_rank(), context.get_world_size(), get_device()
        self.engine, self.parts = _load(settings, self.rank, self.device, heart)
        self.checkpointer = Checkpointer(self.engine, self.parts, settings)
        self.first_step = self.last_step = _resume(self.checkpointer, heart)
        self.scores, self.sources = self.checkpointer.scores, [one.name for one in config.data.sources]
        # By every rank before the first step: a late call would drop what others have recorded of it.
        ray.get(self.journal.rewind.remote(self.rank, self.first_step, self.world_size))
        heart.enter("first batch")
        self.objective, judged = build_objective(config), build_held_out_objective(config)
        self.examiner = HeldOutSets(settings.held_out, self.parts, judged, self.rank, self.world_size)
        self.meter = Meter(self.parts, self.device, self.world_size)
        self.guard = StepGuard(self.engine, self.parts, settings, self.device)
        self.profiler = StepProfiler(settings.profile, settings.run_folder, self.rank, self.journal.say.remote)
        self.rows = RowsAhead(self.parts, settings.stream, self.device, self.meter.phase)
        self.window = LossWindow(config.train, self.device)
        self.dtype = torch.bfloat16 if config.train.uses_bf16 else torch.float32
        self.told: ray.ObjectRef | None = None
        self.rollouts = (
            RolloutSource(settings.rollouts, self.engine, heart, settings.until) if settings.rollouts else None
        )

    def run(self, blocks: Iterator[pa.Table]) -> bool:
        """Take the steps to the last, or until scores stall; return False where the run is to go on later."""
        steps: Iterator[Sequence[MicroBatch]] = iterate_steps(blocks, self.rank, self.first_step, self.settings.stream)
        if self.rollouts is not None:
            self.rollouts.begin(self.first_step)
            steps = self.rollouts.steps(self.first_step)
        for step in range(self.first_step, self.settings.until):
            if self.scores.has_stalled:
                self.journal.say.remote(self.scores.describe_end(step))
                break
            self.heart.mark(self.heart.phase_of(step, self.first_step), f"step {step}, waiting for data")
            self.profiler.start(step)
            try:
                with self.meter.waiting():
                    batches = list(next(steps))
            except RolloutsEndedError as failed:  # the same on every rank, and after every restart
                ray.get(self.journal.fail.remote(failed.error))
                return False
            step_loss, end = self._compute(step, batches)
            if self.rollouts is not None:
                self.rollouts.publish(step + 1)
            due, stopping = self.checkpointer.is_due(step + 1), False
            looking = due or self.window.is_full
            if looking:
                with self.meter.phase("communication"):
                    stopping = _agree_to_stop(self.told, self.device)
            self.profiler.end(step)
            notes = self.meter.note(batches, self.engine, self.settings.config.train.row_length)
            self.window.add(EndedStep(step, batches, step_loss, end, notes))
            if looking and not self._look(step, due=due, stopping=stopping):
                return False
            self.last_step = step + 1
        return True

    def write_model(self) -> None:
        """Write the final model, from the best checkpoint where it is asked for and not the last; collective."""
        best = self.scores.model_step
        if best is not None and best != self.last_step:
            self.checkpointer.restore_step(best)
        save_final_model(self.engine, self.parts, self.settings, self.last_step if best is None else best)

    def _compute(self, step: int, batches: list[MicroBatch]) -> tuple[StepLoss, StepEnd]:
        """Compute a step's rows and let the optimiser step; collective."""
        step_loss = StepLoss(self.objective, self.device, self.sources)
        for number, (batch, build) in enumerate(self.rows.of(batches)):
            self.heart.mark(self.heart.phase, f"step {step}, {describe_row(batch)}")
            row = build()
            if step == 0 and number == 0 and getattr(self.objective, "needs_reference", False):
                check_reference(self.engine, batch, row, self.dtype)
            with self.meter.phase("forward"):
                output = self.objective.compute(self.engine, row)
            self.guard.keep(batch, output)
            with self.meter.phase("backward"):
                # DeepSpeed averages gradients over ranks; ours are already parts of one mean over the step's terms.
                self.engine.backward(step_loss.add(output, batch) * self.world_size, scale_wrt_gas=False)
        self.heart.mark(self.heart.phase, f"step {step}, optimiser")
        return step_loss, self.guard.step(step_loss, self.meter.phase)

    def _look(self, step: int, *, due: bool, stopping: bool) -> bool:
        """Look at the losses of the steps up to ``step``, record them and save; return whether the run goes on."""
        fetched = list(self.window.fetch())
        seconds, judged = self.meter.take_seconds(len(fetched)), {}
        for ended, loss, objective_metrics in fetched:
            diverged = self.guard.check(ended.step, loss, ended.end)
            if diverged is not None:
                # Every rank returns: Ray then commits checkpoints that are still on their way, and repeats nothing.
                ray.get(self.journal.fail.remote(diverged))
                return False
            metrics = self.meter.measure(loss, ended.notes, seconds) | objective_metrics
            metrics |= find_step_metrics(ended.batches)
            if due and ended.step == step:
                self.heart.mark("held-out evaluation", f"step {step}, held-out evaluation")
                with self.meter.excluded_from_timing():
                    judged = self.examiner.evaluate(self.engine, self.device)
            ids = find_ledger_ids(ended.batches)
            self.told = self.journal.record.remote(self.rank, ended.step, metrics | judged, ids)
        self.scores.add(step + 1, judged)
        if stopping or due:
            self.heart.mark("saving", f"step {step}, saving")
            self.checkpointer.save(step + 1, judged)
        return not stopping or step + 1 == self.settings.until


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

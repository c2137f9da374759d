"""Steps whose loss or gradients are not finite: which samples did it, and whether the run stops or leaves them out."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from llava_ray.chat.conversation import IMAGE_TOKEN_INDEX
from llava_ray.data.batches import MicroBatch
from llava_ray.errors import DivergedError
from llava_ray.invocation import command
from llava_ray.model.assembly import LlavaParts
from llava_ray.objectives.objective import ObjectiveOutput, mean_by_sample
from llava_ray.train.objective import StepLoss, build_row
from llava_ray.train.settings import LoopSettings

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MOST_IN_A_ROW = 10  # skipped steps after which the run stops: it learns nothing any more
_MAX_NAMED = 20


@dataclass(frozen=True)
class StepEnd:
    """What is kept of a step until its loss has been looked at."""

    rows: list[tuple[MicroBatch, ObjectiveOutput]]
    skipped: bool
    """Whether it was left out, for its loss or by DeepSpeed for its gradients."""


class StepGuard:
    """Take each optimiser step or leave it out, as ``train.on_nonfinite`` says; alike on all ranks."""

    def __init__(self, engine: "DeepSpeedEngine", parts: LlavaParts, settings: LoopSettings, device: Any) -> None:
        """Begin with no step."""
        self.engine = engine
        self.parts = parts
        self.settings = settings
        self.device = device
        self.skips = settings.config.train.on_nonfinite == "skip"
        self.rows: list[tuple[MicroBatch, ObjectiveOutput]] = []
        self.in_a_row = 0

    def keep(self, batch: MicroBatch, output: ObjectiveOutput) -> None:
        """Keep the losses of a row of this step, without their graph."""
        self.rows.append((batch, ObjectiveOutput(output.losses.detach(), output.positions)))

    def step(self, step_loss: StepLoss, phase: Callable[[str], AbstractContextManager[None]]) -> StepEnd:
        """End the step, taken or left out, and reduce its loss and metrics over all ranks; collective.

        Gradients that are not finite make DeepSpeed leave it out by itself. The learning rate goes on in any case.
        ``phase`` measures a block under a name. Only where steps may be left out for their loss is it looked at here.
        """
        finite = True
        if self.skips:  # before the step, which it decides
            with phase("communication"):
                step_loss.reduce()
                finite = math.isfinite(step_loss.read()[0])
        before = self.engine.skipped_steps
        with nullcontext() if finite else leaving_out(self.engine), phase("optimizer"):
            self.engine.step()
        skipped = self.engine.skipped_steps > before
        if skipped and getattr(self.engine.optimizer, "overflow", False):
            self.engine.lr_scheduler.step()
        if not self.skips:
            with phase("communication"):
                step_loss.reduce()
        rows, self.rows = self.rows, []
        return StepEnd(rows, skipped)

    def check(self, step: int, loss: float, end: StepEnd) -> DivergedError | None:
        """Look at the loss of a step that has ended; say what was wrong, and return an error if the run must stop.

        To be called for every step in order. Collective where the loss is not finite: every rank names its samples.
        """
        if math.isfinite(loss):
            self.in_a_row = self.in_a_row + 1 if end.skipped else 0
            if not end.skipped:
                return None
            found = f"step {step}: the gradients are not finite (the loss is {loss:.4g})"
        else:
            self.in_a_row += 1
            found = f"step {step}: the loss is {loss}; {self._name_everywhere(end.rows)}"
        if (self.skips or math.isfinite(loss)) and self.in_a_row < MOST_IN_A_ROW:
            self.settings.journal.say.remote(
                f"Skipped {found}. Weights and optimiser stay as they were; metric skipped_steps counts such steps."
            )
            return None
        return DivergedError(found + self._remedy())

    def _remedy(self) -> str:
        """Return what to do about a run that stops."""
        look = f"Look at them with {command('preview')}; if they are sound, lower train.learning_rate"
        if self.in_a_row >= MOST_IN_A_ROW:
            return f". The last {self.in_a_row} steps were skipped: the run learns nothing any more. {look}"
        return f". {look}, or set train.on_nonfinite = 'skip' to resume without such steps"

    def _name_everywhere(self, rows: list[tuple[MicroBatch, ObjectiveOutput]]) -> str:
        """Return which samples of any rank did it, in words; collective."""
        features, losses = self._find(rows)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (features, losses))
        for index, what in ((0, "image features are not finite"), (1, "own loss is not finite")):
            ids = [name for ranks in gathered for name in ranks[index]]
            if ids:
                more = f" and {len(ids) - _MAX_NAMED} more" if len(ids) > _MAX_NAMED else ""
                return f"samples whose {what}: {', '.join(ids[:_MAX_NAMED])}{more}"
        return "no single sample's loss is: their sum is too large"

    def _find(self, rows: list[tuple[MicroBatch, ObjectiveOutput]]) -> tuple[list[str], list[str]]:
        """Return this rank's samples with features, and with losses, that are not finite."""
        features: list[str] = []
        losses: list[str] = []
        for batch, output in rows:
            features += find_bad_features(batch, self.parts, self.settings, self.device)
            losses += find_bad_losses(batch, output)
        return features, losses


def find_bad_losses(batch: MicroBatch, output: ObjectiveOutput) -> list[str]:
    """Return the ids of a row's samples whose mean loss is not finite."""
    means, counts = mean_by_sample(output, batch.position_ids.to(output.losses.device))
    bad = (~means.isfinite() & (counts > 0)).tolist()
    return [name for name, is_bad in zip(batch.ids, bad, strict=False) if is_bad]  # filler of a row has no id


def find_bad_features(batch: MicroBatch, parts: LlavaParts, settings: LoopSettings, device: torch.device) -> list[str]:
    """Return the ids of a row's samples with an image feature that is not finite; a frozen tower computes it again."""
    with torch.no_grad():
        features = build_row(batch, parts, settings.stream, device).features
    if features is None:
        return []
    bad = ~features.isfinite().all(-1).flatten().cpu()
    if not bad.any():
        return []
    order = parts.llava.arrange(len(bad), batch.image_sizes)
    if order is not None:  # newlines are no features: they stand behind all of them
        order = order.cpu()
        bad = torch.cat([bad, torch.zeros(max(0, int(order.max()) + 1 - len(bad)), dtype=torch.bool)])[order]
    sample = ((batch.position_ids[0] == 0).cumsum(0) - 1)[batch.input_ids[0] == IMAGE_TOKEN_INDEX]
    return [batch.ids[index] for index in sample[bad].unique().tolist()]


@contextmanager
def leaving_out(engine: "DeepSpeedEngine") -> Iterator[None]:
    """Let the engine's next step discard the gradients, as it does by itself after an overflow of fp16."""
    optimizer = engine.optimizer
    changed = _overflowing(optimizer)
    if "step" in changed:
        engine.skipped_steps += 1  # torch's own optimizer has no overflow that DeepSpeed could count
    kept = {name: vars(optimizer)[name] for name in changed if name in vars(optimizer)}
    vars(optimizer).update(changed)
    try:
        yield
    finally:
        for name in changed:
            del vars(optimizer)[name]
        vars(optimizer).update(kept)


def _overflowing(optimizer: Any) -> dict[str, Any]:
    """Return attributes with which one of DeepSpeed's optimizers finds an overflow in any gradients."""

    def overflow(update_scale: bool = True) -> bool:
        optimizer.overflow = True
        return bool(optimizer._loss_scale_update_and_overflow_cleanup()) if update_scale else True

    if hasattr(optimizer, "_overflow_check_and_loss_scale_update"):  # ZeRO 3
        return {"_overflow_check_and_loss_scale_update": overflow}
    if hasattr(optimizer, "check_grad_overflow"):  # ZeRO 1 and 2
        return {
            "check_grad_overflow": True,
            "check_overflow": lambda partition_gradients=True: overflow(update_scale=False),
        }
    if hasattr(optimizer, "overflow_checker"):  # stage 0 in bf16
        return {"overflow_checker": SimpleNamespace(check=lambda: True, has_overflow=lambda params: True)}
    if hasattr(optimizer, "get_grads_for_norm"):  # ZeRO 1 in bf16 with gradients in fp32
        return {"get_grads_for_norm": lambda for_clipping=False: ([torch.tensor(math.nan)], {})}
    return {"step": lambda closure=None: None}  # stage 0 in fp32

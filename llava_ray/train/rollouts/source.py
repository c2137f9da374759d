"""A rank's side of rollouts: it publishes the weights that sample answers, and takes its rows of each step."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import ray
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayTaskError
from torch import Tensor

from llava_ray.errors import LlavaRayError, TrainingError
from llava_ray.train.heartbeat import Heartbeat
from llava_ray.train.rollouts.rows import RankRows, RolloutBatch, make_batches

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_SECONDS_A_LOOK = 5.0
_COORDINATOR_DIED = TrainingError(
    "the process that deals sampled answers to the workers (RolloutCoordinator) died: somebody killed it, or its node "
    "ran out of memory. Start the run again: it resumes from its last checkpoint"
)
_WAITING = "rollouts"  # a phase without steps: patience is that of loading


class RolloutsEndedError(Exception):
    """The reason for which no step can be answered any more, the same on every rank."""

    def __init__(self, error: LlavaRayError) -> None:
        """Store the error."""
        super().__init__(str(error))
        self.error = error


class RolloutSource:
    """The steps of sampled answers of one rank."""

    def __init__(self, coordinator: ActorHandle, engine: "DeepSpeedEngine", heart: Heartbeat, until: int) -> None:
        """Store whom to ask."""
        self.coordinator, self.engine, self.heart, self.until = coordinator, engine, heart, until
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.published: ray.ObjectRef | None = None

    def begin(self, first_step: int) -> None:
        """Have the coordinator forget what earlier workers asked for, and publish the weights; collective."""
        if self.rank == 0:
            ray.get(self.coordinator.begin.remote(first_step, self.world_size))
        dist.barrier()  # no rank may ask before
        self.publish(first_step)

    def publish(self, version: int) -> None:
        """Publish the weights after ``version`` steps, unless no step follows; collective."""
        if version >= self.until:
            return
        tensors = gather_learnt(self.engine)
        if self.rank == 0:
            # The object lives as long as this process: workers that start again publish their own.
            self.coordinator.publish.remote(version, [ray.put(tensors)])

    def steps(self, first_step: int) -> Iterator[list[RolloutBatch]]:
        """Yield this rank's micro-batches, step by step. Raises RolloutsEndedError."""
        for step in range(first_step, self.until):
            yield make_batches(self._take(step), step, self.rank)

    def _take(self, step: int) -> RankRows:
        """Wait for a step's answers; the heart beats while there are new ones."""
        before = (self.heart.phase, self.heart.doing)
        asked = self.coordinator.take.remote(step, self.rank)
        num_answered = -1
        try:
            while not ray.wait([asked], timeout=_SECONDS_A_LOOK)[0]:
                now = ray.get(self.coordinator.count_answers.remote())
                if now != num_answered:
                    num_answered = now
                    self.heart.mark(_WAITING, f"step {step}, waiting for rollouts ({now} answers so far)")
            found: RankRows | LlavaRayError = ray.get(asked)
        except ActorDiedError as error:
            if isinstance(error, RayTaskError):  # it lives, and tells the death of an actor: workers start again
                raise
            raise RolloutsEndedError(_COORDINATOR_DIED) from error
        self.heart.mark(*before)
        if isinstance(found, LlavaRayError):
            raise RolloutsEndedError(found)
        return found


def gather_learnt(engine: "DeepSpeedEngine") -> dict[str, Tensor]:
    """Gather the trainable parameters on rank 0's CPU, one at a time; {} on others. Collective."""
    from deepspeed.runtime.zero import GatheredParameters

    partitioned = engine.zero_optimization_stage() == 3
    tensors: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        with GatheredParameters([parameter], enabled=partitioned), torch.no_grad():
            if dist.get_rank() == 0:
                tensors[name] = parameter.detach().cpu().clone()
    return tensors

"""The coordinator of rollouts: an actor that has each step's questions answered and deals the answers to ranks.

Step t is answered with the weights that come after ``t - max_staleness`` steps, as soon as rank 0 has published them;
for the first steps after a start, with those that the run starts from. Questions are answered in the same batches on
any number of actors, so the answers do not depend on it.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import ray
from jaxtyping import Float
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.grpo import GRPO
from llava_ray.data.plan import Plan
from llava_ray.data.settings import StreamSettings
from llava_ray.data.token_lengths import TokenLengths
from llava_ray.errors import ConfigError, LlavaRayError
from llava_ray.placement import can_grow, in_pool, pool_resources
from llava_ray.runtime import Resources
from llava_ray.train.rollouts.actor import RolloutActor
from llava_ray.train.rollouts.advantages import find_spread
from llava_ray.train.rollouts.answered import RolloutGroup
from llava_ray.train.rollouts.rewards import Rewards
from llava_ray.train.rollouts.rows import RankRows, deal_samples, make_samples
from llava_ray.train.rollouts.step_metrics import measure_rollouts

_RETRIES = 3  # of a batch of questions whose actor died
_FLAT_STEPS = 10  # steps without any spread of rewards after which the user is told


@dataclass(frozen=True)
class RolloutSettings:
    """Everything that the coordinator and its actors need."""

    config: FinetuneConfig
    stream: StreamSettings
    plan: Plan
    lengths: TokenLengths
    until: int
    journal: ActorHandle


class RolloutCoordinator:
    """Steps whose answers are being sampled, or wait for the ranks to take them; run as an asynchronous actor."""

    def __init__(self, settings: RolloutSettings, resources: Resources) -> None:
        """Start the actors, which load the model while the workers do."""
        self.settings, grpo = settings, settings.config.grpo
        places = {name: settings.lengths.column(name) for name in ("shard", "row")}
        self.places = np.stack([places["shard"], places["row"]], axis=1)
        # Without GPUs they compute while the workers wait for them, on the same cores.
        reserved = {"num_cpus": 1, "num_gpus": grpo.gpus_per_rollout_actor} if resources.use_gpu else {"num_cpus": 0}
        options = {"max_restarts": -1, "max_task_retries": _RETRIES} | reserved | in_pool("train")
        make = ray.remote(RolloutActor).options(**options)
        arguments = (settings.config, settings.stream, max(1, resources.cores // grpo.num_rollout_actors))
        self.actors = [make.remote(*arguments) for _ in range(grpo.num_rollout_actors)]
        self.rewards = Rewards.of(grpo)
        self.dealt: dict[int, asyncio.Future[list[RankRows] | LlavaRayError]] = {}
        self.taken: dict[int, int] = {}
        self.running: set[asyncio.Task[None]] = set()
        self.world_size, self.next = 0, 0
        self.num_answered = 0
        self.flat_steps = 0

    async def begin(self, first_step: int, world_size: int) -> None:
        """Forget all steps: the ranks start at ``first_step``, and rank 0 will publish its weights."""
        for task in self.running:
            task.cancel()
        for waiting in self.dealt.values():
            waiting.cancel()
        self.running, self.dealt, self.taken = set(), {}, {}
        self.world_size, self.next, self.flat_steps = world_size, first_step, 0

    async def publish(self, version: int, weights: Sequence[ray.ObjectRef]) -> None:
        """Have all steps answered that may be with the weights after ``version`` steps; [] for the run's first."""
        last = min(version + self.settings.config.grpo.max_staleness, self.settings.until - 1)
        for step in range(self.next, last + 1):
            task = asyncio.create_task(self._deal(step, version, weights))
            self.running.add(task)
            task.add_done_callback(self.running.discard)
        self.next = max(self.next, last + 1)

    async def take(self, step: int, rank: int) -> RankRows | LlavaRayError:
        """Return a rank's rows of a step once they are there, or why the run cannot go on."""
        found = await asyncio.shield(self._waiting(step))
        self.taken[step] = self.taken.get(step, 0) + 1
        if self.taken[step] == self.world_size:
            del self.dealt[step], self.taken[step]
        return found if isinstance(found, LlavaRayError) else found[rank]

    async def count_answers(self) -> int:
        """Return the number of answers so far, by which waiting ranks see that something happens."""
        return self.num_answered

    def _waiting(self, step: int) -> "asyncio.Future[list[RankRows] | LlavaRayError]":
        """Return what will hold a step's rows; ranks may ask before its weights are published."""
        if step not in self.dealt:
            self.dealt[step] = asyncio.get_running_loop().create_future()
        return self.dealt[step]

    async def _deal(self, step: int, version: int, weights: Sequence[ray.ObjectRef]) -> None:
        """Have a step answered, and deal the answers."""
        waiting, started = self._waiting(step), time.monotonic()
        try:
            groups = await self._answer(step, version, weights)
            values = np.stack([group.rewards for group in groups])
            totals = self.rewards.add_up(values)
            self._note_spread(totals)
            metrics = measure_rollouts(groups, values, totals, list(self.rewards.by_name))
            metrics |= {"rollout_staleness": float(step - version), "rollout_seconds": time.monotonic() - started}
            samples = make_samples(groups, totals, self.settings.config.grpo)
            row_length, cost = self.settings.config.train.row_length, self.settings.stream.cost
            outcome: list[RankRows] | LlavaRayError = deal_samples(
                samples, row_length, self.world_size, cost, [group.asked.id for group in groups], metrics
            )
        except LlavaRayError as error:
            outcome = error
        except Exception as error:  # noqa: BLE001 - of Ray or of an actor: the ranks raise it, and start again
            if not waiting.done():
                waiting.set_exception(error)
            return
        if not waiting.done():
            waiting.set_result(outcome)

    async def _answer(self, step: int, version: int, weights: Sequence[ray.ObjectRef]) -> list[RolloutGroup]:
        """Have the actors answer a step's questions, in batches; return the groups in the step's order."""
        places = [(int(shard), int(row)) for shard, row in self.places[self.settings.plan.step(step)]]
        grpo = self.settings.config.grpo
        size = max(1, grpo.rollout_batch_size // grpo.group_size)
        batches = [places[start : start + size] for start in range(0, len(places), size)]
        asked = [
            self.actors[number % len(self.actors)].sample.remote(step, batch, version, list(weights))
            for number, batch in enumerate(batches)
        ]
        groups: list[RolloutGroup] = []
        for ref in asked:
            answered = await ref
            if isinstance(answered, LlavaRayError):
                raise answered
            groups += answered
            self.num_answered += len(answered) * grpo.group_size
        return groups

    def _note_spread(self, totals: Float[np.ndarray, "n g"]) -> None:
        """Say once that nothing is learnt, when for many steps all answers to each question had the same reward."""
        self.flat_steps = 0 if find_spread(totals).any() else self.flat_steps + 1
        if self.flat_steps == _FLAT_STEPS:
            self.settings.journal.say.remote(
                f"In {_FLAT_STEPS} steps in a row all answers to a question had the same reward (the last mean: "
                f"{totals.mean():.3g}), so nothing is learnt. Check grpo.rewards against the records' answers, raise "
                "grpo.temperature or grpo.group_size, or choose questions that are neither too hard nor too easy."
            )


def start_rollouts(settings: RolloutSettings, resources: Resources) -> ActorHandle | None:
    """Start the coordinator of a run that learns from its own answers on the driver's node; None for any other."""
    if settings.config.train.objective != GRPO:
        return None
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(RolloutCoordinator).options(num_cpus=0, scheduling_strategy=here)
    return actor.remote(settings, resources)


@contextmanager
def ending_rollouts(coordinator: ActorHandle | None) -> Iterator[None]:
    """End a coordinator, and with it its actors, after the block."""
    try:
        yield
    finally:
        if coordinator is not None:
            ray.kill(coordinator)


def check_rollout_gpus(config: FinetuneConfig, resources: Resources) -> None:
    """Check that workers and rollout actors find their GPUs side by side. Raises ConfigError."""
    if config.train.objective != GRPO or not resources.use_gpu or can_grow():
        return
    grpo = config.grpo
    workers = resources.num_workers * resources.gpus_per_worker
    actors = grpo.num_rollout_actors * grpo.gpus_per_rollout_actor
    found = pool_resources("train")["GPU"]
    if workers + actors > found:
        raise ConfigError(
            f"{resources.num_workers} train workers need {workers:g} GPUs and {grpo.num_rollout_actors} rollout actors "
            f"{actors:g}, but the cluster has {found:g}; lower cluster.num_workers or grpo.num_rollout_actors, or let "
            "one worker and one actor share a GPU (cluster.gpus_per_worker and grpo.gpus_per_rollout_actor of 0.5)"
        )

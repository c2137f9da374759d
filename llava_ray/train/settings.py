"""Settings of every train worker.

Ray's own processes unpickle them: nothing here imports torch, transformers or MLflow.
"""

from dataclasses import dataclass

from ray.actor import ActorHandle

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.data.plan import Plan
from llava_ray.data.settings import StreamSettings
from llava_ray.data.token_lengths import TokenLengths


@dataclass(frozen=True)
class HeldOut:
    """The held-out samples, with everything that a worker needs to read them."""

    stream: StreamSettings
    plan: Plan
    lengths: TokenLengths
    num_answers: int
    max_new_tokens: int
    name: str | None = None
    """The source of a mixture that they are of; None for those of the whole run."""


@dataclass(frozen=True)
class LoopSettings:
    """Everything that a worker needs to run the training loop."""

    config: FinetuneConfig
    stream: StreamSettings
    num_steps: int
    """Of the whole run."""
    until: int
    """The step at which this start ends: ``num_steps``, or less where a sweep compares unfinished runs."""
    plan_hash: str
    data_hash: str
    run_folder: str
    bundle_folder: str
    num_threads: int
    journal: ActorHandle
    held_out: tuple[HeldOut, ...] = ()
    """The run's own first, then those of its sources."""
    profile: tuple[int, int] | None = None
    """The first and the last step to profile."""
    rollouts: ActorHandle | None = None
    """The coordinator that deals sampled answers to the ranks, in place of the stream."""

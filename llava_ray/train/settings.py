"""What every train worker is told.

Ray's own processes pass it on and unpack it: nothing here imports torch, transformers or MLflow.
"""

from dataclasses import dataclass

from ray.actor import ActorHandle

from llava_ray.config.sections import FinetuneConfig
from llava_ray.data.lengths import TokenLengths
from llava_ray.data.plan import Plan
from llava_ray.data.settings import StreamSettings


@dataclass(frozen=True)
class HeldOut:
    """The samples that are looked at beside a run's own, with everything that a worker needs to read it."""

    stream: StreamSettings
    plan: Plan
    lengths: TokenLengths
    num_answers: int
    max_new_tokens: int


@dataclass(frozen=True)
class LoopSettings:
    """All that a worker is told."""

    config: FinetuneConfig
    stream: StreamSettings
    num_steps: int
    """Of the whole run."""
    until: int
    """The step that this start goes to: ``num_steps``, or less where a sweep compares runs on their way."""
    plan_hash: str
    data_hash: str
    run_folder: str
    bundle_folder: str
    num_threads: int
    journal: ActorHandle
    held_out: HeldOut | None = None

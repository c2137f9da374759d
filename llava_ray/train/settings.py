"""What every train worker is told."""

from dataclasses import dataclass

from ray.actor import ActorHandle

from llava_ray.config.sections import FinetuneConfig
from llava_ray.data.settings import StreamSettings
from llava_ray.train.held_out import HeldOut


@dataclass(frozen=True)
class LoopSettings:
    """All that a worker is told."""

    config: FinetuneConfig
    stream: StreamSettings
    num_steps: int
    plan_hash: str
    data_hash: str
    run_folder: str
    bundle_folder: str
    num_threads: int
    journal: ActorHandle
    held_out: HeldOut | None = None

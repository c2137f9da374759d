"""Execution of the plan by Ray Data: windows of steps → read and tokenise → decode → (frozen tower) → train workers.

Several of Ray's own processes import this module to unpickle tasks, so it imports neither torch nor transformers.

A block of the stream is a few micro-batches of one rank (see ``descriptors``). ``TrainStream`` is what Ray Train
evaluates at every start of the workers: it begins at the committed step. ``DealToRanks`` then knows the world size and
lays out the blocks, which ``streaming_split`` hands out by turns, so order and place are exact for any timing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataIterator, Dataset, ExecutionOptions, TaskPoolStrategy
from ray.train import DataConfig as TrainDataConfig

from llava_ray.data.descriptors import StepWindow, plan_windows
from llava_ray.data.plan import Plan
from llava_ray.data.settings import StreamSettings
from llava_ray.data.stages import BlockImageDecoder, read_blocks
from llava_ray.data.token_lengths import TokenLengths
from llava_ray.placement import can_grow, in_pool, pool_resources

_CPUS_PER_READER = 8

# Of a pool that has no node yet; the smallest node that ours are made of has more. Decoders must not fill it: readers,
# which nothing else may run, would have no place.
_GROWING_CPUS = 8.0


@dataclass(frozen=True)
class TrainStream:
    """The ``datasets={"train": …}`` callable: the steps from the committed one to ``until``, for any world size."""

    committed_step: Callable[[], int]
    until: int

    def __call__(self) -> Dataset:
        """Return one row per step still to be taken."""
        return ray.data.from_arrow(pa.table({"step": pa.array(range(self.committed_step(), self.until), pa.int32())}))


class DealToRanks(TrainDataConfig):
    """A data config that turns steps into each rank's micro-batches, once the world size is known."""

    def __init__(self, plan: Plan, until: int, lengths: TokenLengths, settings: StreamSettings) -> None:
        """Store what the assignment to ranks needs; Ray Train sends this object to its data manager."""
        super().__init__(enable_shard_locality=False)
        self.plan = plan
        self.until = until
        self.lengths = lengths
        self.settings = settings

    def configure(
        self,
        datasets: dict[str, Dataset],
        world_size: int,
        worker_handles: list[Any] | None,
        worker_node_ids: list[str] | None,
        **kwargs: Any,
    ) -> list[dict[str, DataIterator]]:
        """Return each rank's iterator; called again with the new world size whenever the workers restart."""
        # Counting needs no execution, and the steps that remain are always the last ones.
        steps = range(self.until - datasets["train"].count(), self.until)
        windows = plan_windows(self.plan, steps, self.settings.row_length, world_size)
        dataset = stream(list(windows), self.lengths, self.settings, world_size)
        dataset.context.execution_options = ExecutionOptions(preserve_order=True)
        dataset.context.enable_progress_bars = False  # the run has one bar of its own
        dataset.context.memory_usage_poll_interval_s = None  # walks all pages of the object store each second
        return [{"train": split} for split in dataset.streaming_split(world_size, equal=False)]


def stream(windows: list[StepWindow], lengths: TokenLengths, settings: StreamSettings, world_size: int) -> Dataset:
    """Attach the stages to the windows. Every block is one row, of ROWS_PER_BLOCK micro-batches of one rank."""
    # A task for each window, whatever Ray would choose.
    dataset = ray.data.from_items(windows, override_num_blocks=max(1, len(windows)))
    cpus, total = settings.data.num_decode_cpus, _decoding_cpus()
    decoding = in_pool("decode")
    dataset = dataset.map_batches(
        read_blocks,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"settings": settings, "lengths": lengths, "world_size": world_size},
        # Reading is a small part of decoding. Ray would start as many as there is room for, and let them run far ahead.
        compute=TaskPoolStrategy(size=max(1, int(total) // _CPUS_PER_READER)),
        num_cpus=cpus / 2,
        **decoding,
    )
    # Actors, because tasks of less than a CPU cost more than they do: Ray ends every process beyond the number of CPUs
    # that has nothing to do for a second, and starts another for the next task.
    dataset = dataset.map_batches(
        BlockImageDecoder,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_kwargs={"settings": settings},
        compute=ActorPoolStrategy(min_size=1, max_size=settings.data.num_decoders or max(1, int(total / 2 / cpus))),
        num_cpus=cpus,
        **decoding,
    )
    if settings.data.vision_features == "streamed":
        from llava_ray.data.features import FeatureActor  # torch and transformers

        dataset = dataset.map_batches(
            FeatureActor,
            batch_size=None,
            batch_format="pyarrow",
            fn_constructor_kwargs={"settings": settings},
            compute=ActorPoolStrategy(size=settings.data.num_vision_actors),
            num_cpus=cpus,
            num_gpus=settings.vision_gpus,
            **in_pool("vision"),
        )
    # A block ends after each row. A repartition would do it too, in a stage of its own whose tasks wait for whole CPUs:
    # on two cores it kept the first of 20,000 images for 80 s.
    dataset.context.target_max_block_size = 1
    return dataset


def _decoding_cpus() -> float:
    """Return the CPUs that reading and decoding may count on: those of their pool, or of all nodes without one."""
    return max(pool_resources("decode")["CPU"], _GROWING_CPUS if can_grow() else 1.0)

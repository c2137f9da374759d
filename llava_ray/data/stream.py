"""Execution of the plan by Ray Data: descriptors → read and tokenise → decode → (frozen tower) → train workers.

Several of Ray's own processes import this module to unpickle tasks, so it imports neither torch nor transformers.

A block of the stream is a few micro-batches of one rank (see ``descriptors``). ``TrainStream`` is what Ray Train
evaluates at every start of the workers: it begins at the committed step. ``DealToRanks`` then knows the world size and
lays out the blocks, which ``streaming_split`` hands out by turns, so order and place are exact for any timing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataIterator, Dataset, ExecutionOptions, TaskPoolStrategy
from ray.train import DataConfig as TrainDataConfig

from llava_ray.chat.conversation import Turn
from llava_ray.data.blocks import pack_block, unpack_block
from llava_ray.data.descriptors import ROWS_PER_BLOCK, describe_micro_batches
from llava_ray.data.examples import Example
from llava_ray.data.feature_cache import fetch_features, location_key
from llava_ray.data.lengths import TokenLengths, load_encoder
from llava_ray.data.plan import Plan
from llava_ray.data.settings import StreamSettings
from llava_ray.data.shards import read_shard_rows
from llava_ray.errors import DataError
from llava_ray.images.anyres import Size
from llava_ray.images.geometry import crop_views
from llava_ray.images.reading import open_image
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
        steps = list(range(self.until - datasets["train"].count(), self.until))
        descriptors = describe_micro_batches(self.plan, self.lengths, steps, self.settings.row_length, world_size)
        dataset = stream(descriptors, self.settings)
        dataset.context.execution_options = ExecutionOptions(preserve_order=True)
        dataset.context.enable_progress_bars = False  # the run has one bar of its own
        dataset.context.memory_usage_poll_interval_s = None  # walks all pages of the object store each second
        return [{"train": split} for split in dataset.streaming_split(world_size, equal=False)]


def stream(descriptors: list[pa.Table], settings: StreamSettings) -> Dataset:
    """Attach the stages to the descriptors. Every block is one row, of ROWS_PER_BLOCK micro-batches of one rank."""
    dataset = ray.data.from_arrow(descriptors) if descriptors else ray.data.from_items([])
    cpus, total = settings.data.num_decode_cpus, _decoding_cpus()
    decoding = in_pool("decode")
    dataset = dataset.map_batches(
        read_blocks,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"settings": settings},
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


def read_blocks(descriptors: pa.Table, settings: StreamSettings) -> Iterator[pa.Table]:
    """Yield the micro-batches of one window, a block at a time."""
    yield from map(pack_block, read_micro_batches(descriptors, settings))


class BlockImageDecoder:
    """An actor that turns the encoded images of a block into pixels, or into their cached features."""

    def __init__(self, settings: StreamSettings) -> None:
        """Store the settings."""
        self.settings = settings

    def __call__(self, block: pa.Table) -> pa.Table:
        """Decode the images of a block, or look up their features."""
        return pack_block(add_images(unpack_block(block), self.settings))


def read_micro_batches(descriptors: pa.Table, settings: StreamSettings) -> Iterator[pa.Table]:
    """Read the records of one window and yield its micro-batches, packed, images still encoded."""
    encoder = load_encoder(settings.encoder)
    records = fetch_records(descriptors, settings)
    for start in range(0, descriptors.num_rows, ROWS_PER_BLOCK):
        yield pa.Table.from_pylist(
            [_packed(row, records, encoder.encode) for row in descriptors.slice(start, ROWS_PER_BLOCK).to_pylist()],
            schema=_PACKED_SCHEMA,
        )


_PACKED_SCHEMA = pa.schema(
    {
        "step": pa.int32(),
        "rank": pa.int32(),
        "num_supervised": pa.int32(),
        "num_micro_batches": pa.int32(),
        "ids": pa.list_(pa.string()),
        "num_tokens": pa.list_(pa.int32()),
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "images": pa.list_(pa.large_binary()),
        "image_sizes": pa.list_(pa.list_(pa.int32(), 2)),  # (width, height) of each
        "places": pa.list_(pa.int64()),  # of each in the feature cache
    }
)


_RECORD_COLUMNS = ["id", "turns", "images", "widths", "heights"]


def fetch_records(descriptors: pa.Table, settings: StreamSettings) -> dict[tuple[int, int], dict[str, Any]]:
    """Return the records that the descriptors name, each shard read once."""
    wanted: dict[int, set[int]] = {}
    for shards, rows in zip(descriptors["shard"].to_pylist(), descriptors["row"].to_pylist(), strict=True):
        for shard, row in zip(shards, rows, strict=True):
            wanted.setdefault(shard, set()).add(row)
    records = {}
    columns = [name for name in _RECORD_COLUMNS if name != "images" or not settings.features]
    for shard, row_set in wanted.items():
        rows = sorted(row_set)
        table = read_shard_rows(settings.prepared_path, settings.shard_names[shard], rows, columns=columns)
        records.update({(shard, row): record for row, record in zip(rows, table.to_pylist(), strict=True)})
    return records


def _packed(
    row: dict[str, Any],
    records: dict[tuple[int, int], dict[str, Any]],
    encode: Callable[[list[Turn], list[Size]], list[Example]],
) -> dict[str, Any]:
    """Pack one micro-batch's examples into one row, one behind the other."""
    examples, ids, images, shown, places = [], [], [], [], []
    for shard, number, part, num_tokens in zip(row["shard"], row["row"], row["part"], row["num_tokens"], strict=True):
        record = records[shard, number]
        sizes = list(zip(record["widths"], record["heights"], strict=True))
        example = encode([Turn.from_row(turn) for turn in record["turns"]], sizes)[part]
        if len(example.input_ids) != num_tokens:
            raise AssertionError(f"{record['id']}: {len(example.input_ids)} tokens, the plan says {num_tokens}")
        examples.append(example)
        ids.append(record["id"])
        images += [record["images"][i] for i in example.images if "images" in record]
        shown += [sizes[i] for i in example.images]
        places += [location_key(shard, number, i) for i in example.images]
    common = {name: row[name] for name in ("step", "rank", "num_supervised", "num_micro_batches", "num_tokens")}
    return common | {
        "ids": ids,
        "input_ids": np.concatenate([e.input_ids for e in examples]) if examples else [],
        "labels": np.concatenate([e.labels for e in examples]) if examples else [],
        "images": images,
        "image_sizes": shown,
        "places": places,
    }


def add_images(table: pa.Table, settings: StreamSettings) -> pa.Table:
    """Replace each row's images by the model's input: pixels, or features from a cache."""
    return load_features(table, settings) if settings.features else decode_block_images(table, settings)


def load_features(table: pa.Table, settings: StreamSettings) -> pa.Table:
    """Replace each row's images by their features from the cache: bytes of (n, p, v) in the tower's dtype."""
    assert settings.features is not None
    places = table["places"].to_pylist()
    parts = iter(fetch_features(settings.features, [place for row in places for place in row]))
    cells = [b"".join(next(parts) for _ in row) for row in places]
    position = table.column_names.index("images")
    return table.set_column(position, "features", pa.array(cells, pa.large_binary()))


def decode_block_images(table: pa.Table, settings: StreamSettings) -> pa.Table:
    """Replace each row's encoded images by pixels: bytes of uint8 (n, 3, h, w), views before normalisation."""
    columns = (table[name].to_pylist() for name in ("ids", "images", "image_sizes"))
    pixels = [
        b"".join(
            _decode_views(image, size, ", ".join(ids), settings) for image, size in zip(images, sizes, strict=True)
        )
        for ids, images, sizes in zip(*columns, strict=True)
    ]
    position = table.column_names.index("images")
    return table.set_column(position, "pixels", pa.array(pixels, pa.large_binary()))


def _decode_views(image: bytes, size: Sequence[int], name: str, settings: StreamSettings) -> bytes:
    """Return one image's pixels; its views were planned for ``size``."""
    opened = open_image(image, name, max_pixels=settings.data.max_image_pixels)
    if opened.size != tuple(size):
        raise DataError(
            f"{name}: an image decodes to {opened.size} pixels, but was prepared as {tuple(size)}; another version of "
            f"Pillow wrote {settings.prepared_path}: delete the folder and prepare again"
        )
    return crop_views(opened, settings.image_spec).tobytes()

"""Computation of a feature-cache entry with Ray Data: tasks read and decode, actors run the tower and write."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data import ActorPoolStrategy

from llava_ray.data.feature_cache import (
    MANIFEST,
    block_name,
    cache_root,
    estimate_bytes,
    feature_key,
    format_gb,
    is_complete,
    location_key,
    make_room,
    mark_used,
    write_index,
)
from llava_ray.data.features import FeatureActor
from llava_ray.data.settings import StreamSettings
from llava_ray.data.shards import ROWS_PER_GROUP, PreparedData, read_shard_rows
from llava_ray.data.stages import decode_views
from llava_ray.data.storage import list_sizes, write_stored
from llava_ray.model.assembly import find_tower
from llava_ray.model.formats.manifest import fingerprint_weights
from llava_ray.placement import in_pool

if TYPE_CHECKING:
    from llava_ray.model.blueprint import Blueprint


_BLOCK = ("block", "shard", "first", "end")  # name; shard, its first row, and the one after the last


def cache_features(prepared: PreparedData, blueprint: "Blueprint", settings: StreamSettings) -> str:
    """Return the cache entry with the features of all of ``prepared``, computing it if needed.

    An interrupted entry resumes with the missing blocks. Needs a connected Ray. Raises ConfigError where the features
    exceed the budget, DataError, ModelError.
    """
    tower = fingerprint_weights(find_tower(settings.model).tower_source.folder)
    key = feature_key(prepared, blueprint, tower=tower, bf16=settings.bf16)
    root = cache_root(settings.data)
    entry = f"{root}/{key.name}"
    if is_complete(entry):
        mark_used(entry)
        return entry
    width = settings.mm_hidden_size * (2 if settings.bf16 else 4)
    needed = estimate_bytes(prepared, settings.image_tokens, width)
    dropped = make_room(root, key.name, needed, int(settings.data.feature_cache_gb * 1e9))
    print(  # noqa: T201 - for the user who started the run
        f"Features: up to {format_gb(needed)} into {entry}"
        + (f", after evicting {', '.join(dropped)}" if dropped else ""),
        flush=True,
    )
    mark_used(entry)
    # Renewed before the work, so that no other run evicts the entry while it is being written.
    blocks = [
        (block_name(number, first), number, first, min(first + ROWS_PER_GROUP, shard.num_rows))
        for number, shard in enumerate(prepared.shards)
        for first in range(0, shard.num_rows, ROWS_PER_GROUP)
    ]
    existing = list_sizes(entry)
    _write_blocks([block for block in blocks if f"{block[0]}.json" not in existing], entry, settings)
    num_images = write_index(entry, [name for name, *_ in blocks])
    summary = vars(key) | {"num_images": num_images, "num_bytes": sum(list_sizes(entry).values())}
    write_stored(f"{entry}/{MANIFEST}", json.dumps(summary, indent=1).encode())
    return entry


def _write_blocks(blocks: list[tuple[str, int, int, int]], entry: str, settings: StreamSettings) -> None:
    """Compute and write the blocks, given as tuples of ``_BLOCK``."""
    if not blocks:
        return
    dataset = ray.data.from_arrow([pa.Table.from_pylist([dict(zip(_BLOCK, block, strict=True))]) for block in blocks])
    dataset.context.target_max_block_size = None  # a block becomes one file: never split it
    dataset.context.enable_progress_bars = False
    dataset = dataset.map_batches(
        _decode_block,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"settings": settings},
        num_cpus=settings.data.num_decode_cpus,
        **in_pool("decode"),
    ).map_batches(
        FeatureWriter,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_kwargs={"settings": settings, "entry": entry},
        compute=ActorPoolStrategy(size=min(len(blocks), settings.data.num_vision_actors)),
        num_cpus=settings.data.num_decode_cpus,
        num_gpus=settings.vision_gpus,
        **in_pool("vision"),
    )
    for _ in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        pass


def _decode_block(table: pa.Table, settings: StreamSettings) -> pa.Table:
    """Return one row: the block's name, the pixels of its distinct images, and the records' images that use each."""
    block, shard, first, end = (table[key][0].as_py() for key in _BLOCK)
    name, rows = settings.shard_names[shard], list(range(first, end))
    columns = ["id", "images", "widths", "heights"]
    pixels: dict[bytes, bytes] = {}
    users: list[tuple[int, bytes]] = []
    for row, record in zip(rows, read_shard_rows(settings.prepared_path, name, rows, columns).to_pylist(), strict=True):
        sizes = zip(record["widths"], record["heights"], strict=True)
        for number, (image, size) in enumerate(zip(record["images"], sizes, strict=True)):
            digest = hashlib.sha256(image).digest()
            if digest not in pixels:
                pixels[digest] = decode_views(image, size, record["id"], settings)
            users.append((location_key(shard, row, number), digest))
    order = {digest: position for position, digest in enumerate(pixels)}
    view = 3 * settings.image_spec.height * settings.image_spec.width
    return pa.table(
        {
            "block": [block],
            "places": pa.array([[place for place, _ in users]], pa.list_(pa.int64())),
            "image": pa.array([[order[digest] for _, digest in users]], pa.list_(pa.int32())),
            "views": pa.array([[len(cell) // view for cell in pixels.values()]], pa.list_(pa.int32())),
            "pixels": pa.array([b"".join(pixels.values())], pa.large_binary()),
        }
    )


class FeatureWriter(FeatureActor):
    """An actor that turns a block's pixels into features and writes them."""

    def __init__(self, settings: StreamSettings, entry: str) -> None:
        """Load the tower, once per actor."""
        torch.set_num_threads(settings.vision_threads)
        super().__init__(settings)
        self.entry = entry
        self.view_bytes = settings.image_tokens.num_features * settings.mm_hidden_size * (2 if settings.bf16 else 4)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Write the features, then each image's offset, which completes the block; return the block's name."""
        for row in self.replace_pixels(table).to_pylist():
            lengths = np.asarray(row["views"], np.int64) * self.view_bytes
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            assert int(offsets[-1]) == len(row["features"])
            locations: list[list[Any]] = [
                [place, int(offsets[image]), int(lengths[image])]
                for place, image in zip(row["places"], row["image"], strict=True)
            ]
            # The offsets last: a block without its .json file is computed again after an interruption.
            write_stored(f"{self.entry}/{row['block']}.bin", row["features"])
            write_stored(f"{self.entry}/{row['block']}.json", json.dumps(locations).encode())
        return table.select(["block"])

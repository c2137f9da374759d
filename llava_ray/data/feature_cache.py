"""The cache of frozen-tower features: computed once per (data, tower, layer, image geometry), read by any run.

An entry is a folder named by a hash of everything that decides its content. ``SSSSS-RRRRRR.bin`` holds the features of
a block of rows of shard S from row R on, image after image, equal images of a block once; the ``.json`` beside it holds
their offsets. ``index.parquet`` combines these, so that a reader fetches exactly the bytes that it needs from any
filesystem; ``features.json``, written last, makes the entry complete. ``used`` holds the time of the last use.

Several of Ray's own processes import this module to unpickle tasks, so it imports neither torch nor transformers.
"""

import hashlib
import io
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llava_ray.config.geometry import FEATURE_NAMES
from llava_ray.data.shards import PreparedData, read_shard_rows
from llava_ray.data.storage import absolute_path, file_size, list_sizes, read_stored, write_stored
from llava_ray.errors import ConfigError, DataError
from llava_ray.images.reading import open_filesystem
from llava_ray.images.tokens import ImageTokens

if TYPE_CHECKING:
    from llava_ray.config.data import DataConfig
    from llava_ray.model.blueprint import Blueprint

_FORMAT_VERSION = 1
MANIFEST, _INDEX, _USED = "features.json", "index.parquet", "used"
# An entry used within a day is never evicted: a run that started since may still be reading it. The lease is the time
# in the file ``used``, because readers on many nodes and object stores share no locks.
_SECONDS_IN_USE = 86400.0
_NUM_FETCHING = 16

_INDEX_SCHEMA = pa.schema({"place": pa.int64(), "file": pa.int32(), "offset": pa.int64(), "length": pa.int64()})


@dataclass(frozen=True)
class FeatureKey:
    """Everything that decides the content of an entry."""

    data_hash: str
    tower: str
    """Fingerprint of the tower's weights."""
    select: str
    """Layers, kind of features, scales."""
    geometry: str
    """How images are cut into views."""
    dtype: str

    @property
    def name(self) -> str:
        """Return the name of the entry's folder."""
        text = "\0".join([str(_FORMAT_VERSION), *vars(self).values()])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def feature_key(prepared: PreparedData, blueprint: "Blueprint", *, tower: str, bf16: bool) -> FeatureKey:
    """Describe the features that a model of this blueprint takes of some data; ``tower`` is a fingerprint."""
    return FeatureKey(
        data_hash=prepared.data_hash,
        tower=tower,
        select=repr(tuple(getattr(blueprint.geometry, name) for name in FEATURE_NAMES)),
        geometry=repr(blueprint.image_spec),
        dtype="bfloat16" if bf16 else "float32",
    )


def cache_root(data: "DataConfig") -> str:
    """Return the folder of all entries."""
    return f"{absolute_path(data.cache_dir)}/features"


def is_complete(entry: str) -> bool:
    """Return whether an entry has all its files."""
    return file_size(f"{entry}/{MANIFEST}") is not None


def mark_used(entry: str) -> None:
    """Renew an entry's lease: record that it is used now."""
    write_stored(f"{entry}/{_USED}", f"{time.time():.0f}".encode())


def estimate_bytes(prepared: PreparedData, tokens: ImageTokens, bytes_per_feature: int) -> int:
    """Estimate the bytes of the features of all images; an upper bound, as equal images of a block are stored once.

    Only the images' sizes are read.
    """
    views = 0
    for shard in prepared.shards:
        sizes = read_shard_rows(prepared.path, shard.name, None, columns=["widths", "heights"]).to_pylist()
        views += sum(
            tokens.num_views(width, height)
            for row in sizes
            for width, height in zip(row["widths"], row["heights"], strict=True)
        )
    return views * tokens.num_features * bytes_per_feature


def make_room(root: str, name: str, needed: int, budget: int) -> list[str]:
    """Evict the least recently used entries until ``needed`` more bytes fit; return their names.

    Raises ConfigError, before anything is deleted, where eviction cannot free enough.
    """
    if needed > budget:
        raise ConfigError(
            f"the features would take up to {format_gb(needed)}, over data.feature_cache_gb = {budget / 1e9:g}: raise "
            f"it if {root} has room, or set data.vision_features = 'streamed', which stores nothing"
        )
    sizes = {entry: _entry_bytes(f"{root}/{entry}") for entry in list_entries(root) if entry != name}
    used = {entry: _last_use(f"{root}/{entry}") for entry in sizes}
    old = sorted((entry for entry in sizes if time.time() - used[entry] > _SECONDS_IN_USE), key=used.__getitem__)
    # First choose the entries, then delete them: nothing is lost where eviction would not suffice.
    dropped: list[str] = []
    while sum(sizes.values()) + needed > budget:
        if len(dropped) == len(old):
            raise ConfigError(
                f"the features would take up to {format_gb(needed)}, and {root} holds {format_gb(sum(sizes.values()))} "
                f"that runs of the last day may be reading, over data.feature_cache_gb = {budget / 1e9:g}: raise it, "
                "or delete the entries that no run needs any more"
            )
        dropped.append(old[len(dropped)])
        sizes.pop(dropped[-1])
    for entry in dropped:
        filesystem, place = open_filesystem(f"{root}/{entry}")
        filesystem.rm(place, recursive=True)
    return dropped


def list_entries(root: str) -> list[str]:
    """Return the names of all entries, complete or not."""
    filesystem, place = open_filesystem(root)
    filesystem.invalidate_cache()
    try:
        found = filesystem.ls(place, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(row["name"].rstrip("/").rpartition("/")[2] for row in found if row["type"] == "directory")


def _entry_bytes(entry: str) -> int:
    """Return the total size of an entry's files."""
    return sum(list_sizes(entry).values())


def _last_use(entry: str) -> float:
    """Return the time of an entry's last use in seconds since 1970; 0 where none is recorded."""
    try:
        return float(read_stored(f"{entry}/{_USED}"))
    except (FileNotFoundError, ValueError):
        return 0.0


def location_key(shard: int, row: int, number: int) -> int:
    """Encode an image's shard, row and number within the row as one integer."""
    # Sorted integers let a reader find images by binary search in one column; a record has at most 65,535 images.
    return shard << 48 | row << 16 | number


def split_location(place: int) -> tuple[int, int, int]:
    """Return the shard, row and number that ``location_key`` encoded."""
    return place >> 48, place >> 16 & (1 << 32) - 1, place & (1 << 16) - 1


def block_name(shard: int, first_row: int) -> str:
    """Return the name, without an ending, of the files of a block."""
    return f"{shard:05d}-{first_row:06d}"


def write_index(entry: str, blocks: Sequence[str]) -> int:
    """Combine the offsets of all blocks into the index; return the number of images in it."""

    def read(name: str) -> list[list[int]]:
        return list(json.loads(read_stored(f"{entry}/{name}.json")))

    with ThreadPoolExecutor(_NUM_FETCHING) as pool:
        rows = [[place, file, *rest] for file, some in enumerate(pool.map(read, blocks)) for place, *rest in some]
    rows.sort()
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in _INDEX_SCHEMA]
    table = pa.table(columns, schema=_INDEX_SCHEMA.with_metadata({"files": json.dumps(list(blocks))}))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    write_stored(f"{entry}/{_INDEX}", sink.getvalue())
    return len(rows)


@dataclass(frozen=True)
class FeatureIndex:
    """The location of each image's features; n images, sorted by ``places``."""

    places: np.ndarray
    files: tuple[str, ...]
    file: np.ndarray
    offset: np.ndarray
    length: np.ndarray


@lru_cache(maxsize=32)  # of a mixture, one a source
def read_index(entry: str) -> FeatureIndex:
    """Load an entry's index, once per process. Raises DataError where the entry has been deleted."""
    try:
        table = pq.read_table(io.BytesIO(read_stored(f"{entry}/{_INDEX}")))
    except FileNotFoundError as error:
        raise DataError(
            f"the cached features in {entry} are gone: start the run again, which recomputes them, and raise "
            "data.feature_cache_gb if they were evicted to make room"
        ) from error
    columns = [table.column(name).to_numpy() for name in ("place", "file", "offset", "length")]
    return FeatureIndex(columns[0], tuple(json.loads(table.schema.metadata[b"files"])), *columns[1:])


def fetch_features(entry: str, places: Sequence[int]) -> list[bytes]:
    """Return the features of each image, bytes of (views, p, v), reading only the ranges needed.

    Raises DataError for an image that the entry does not have.
    """
    if not places:
        return []
    index = read_index(entry)
    wanted = np.asarray(places, np.int64)
    found = np.searchsorted(index.places, wanted)
    if (found == len(index.places)).any() or (index.places[found] != wanted).any():
        raise DataError(f"{entry} lacks features of this data: delete the folder, and start the run again")
    # One batch of byte ranges: on object stores the filesystem fetches them concurrently.
    filesystem, place = open_filesystem(entry)
    paths = [f"{place}/{index.files[file]}.bin" for file in index.file[found]]
    starts, ends = index.offset[found], index.offset[found] + index.length[found]
    try:
        parts = filesystem.cat_ranges(paths, starts.tolist(), ends.tolist(), on_error="raise")
    except OSError as error:
        raise DataError(f"the cached features in {entry} cannot be read ({error}): start the run again") from error
    return [bytes(part) for part in parts]


def format_gb(num_bytes: float) -> str:
    """Format a size in GB."""
    return f"{num_bytes / 1e9:.3g} GB"

"""Frozen-tower features kept on storage: computed once per (data, tower, layer, images' geometry), read by any run.

An entry is a folder named by all that decides its content. ``SSSSS-RRRRRR.bin`` holds the features of some rows of
shard S from row R on, image after image, the same image of a block once; ``.json`` beside it says where each lies.
``index.parquet`` gathers these, so that a reader fetches exactly the bytes that it needs, from any filesystem;
``features.json``, written last, makes the entry complete. ``used`` holds the time of the last use.

Several of Ray's own processes import this module to pass it on, so it imports neither torch nor transformers.
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
from llava_ray.data.storage import absolute, file_size, list_sizes, read_stored, write_stored
from llava_ray.errors import ConfigError, DataError
from llava_ray.images.reading import open_filesystem
from llava_ray.images.tokens import ImageTokens

if TYPE_CHECKING:
    from llava_ray.config.sections import DataConfig
    from llava_ray.model.blueprint import Blueprint

_FORMAT_VERSION = 1
MANIFEST, _INDEX, _USED = "features.json", "index.parquet", "used"
_SECONDS_IN_USE = 86400.0  # a run that started within a day may be reading still: what it reads never makes room
_NUM_FETCHING = 16

_INDEX_SCHEMA = pa.schema({"place": pa.int64(), "file": pa.int32(), "offset": pa.int64(), "length": pa.int64()})


@dataclass(frozen=True)
class FeatureKey:
    """All that decides what an entry holds."""

    data_hash: str
    tower: str
    """Fingerprint of its weights."""
    select: str
    """Layers, kind of features, scales."""
    geometry: str
    """How images become views."""
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
    return f"{absolute(data.cache_dir)}/features"


def is_complete(entry: str) -> bool:
    """Tell whether an entry has all its files."""
    return file_size(f"{entry}/{MANIFEST}") is not None


def mark_used(entry: str) -> None:
    """Note that an entry is used now."""
    write_stored(f"{entry}/{_USED}", f"{time.time():.0f}".encode())


def estimate_bytes(prepared: PreparedData, tokens: ImageTokens, bytes_per_feature: int) -> int:
    """Return what the features of all images take at most; equal images of a block are kept once.

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
    """Delete the entries used longest ago until ``needed`` more bytes fit; return their names.

    Raises ConfigError, before anything is deleted, where that cannot be enough.
    """
    if needed > budget:
        raise ConfigError(
            f"the features would take up to {in_gb(needed)}, over data.feature_cache_gb = {budget / 1e9:g}: raise it "
            f"if {root} has room, or set data.vision_features = 'streamed', which keeps nothing"
        )
    sizes = {entry: _entry_bytes(f"{root}/{entry}") for entry in list_entries(root) if entry != name}
    used = {entry: _last_use(f"{root}/{entry}") for entry in sizes}
    old = sorted((entry for entry in sizes if time.time() - used[entry] > _SECONDS_IN_USE), key=used.__getitem__)
    dropped: list[str] = []
    while sum(sizes.values()) + needed > budget:
        if len(dropped) == len(old):
            raise ConfigError(
                f"the features would take up to {in_gb(needed)}, and {root} holds {in_gb(sum(sizes.values()))} that "
                f"runs of the last day may be reading, over data.feature_cache_gb = {budget / 1e9:g}: raise it, or "
                "delete the entries that no run needs any more"
            )
        dropped.append(old[len(dropped)])
        sizes.pop(dropped[-1])
    for entry in dropped:
        filesystem, place = open_filesystem(f"{root}/{entry}")
        filesystem.rm(place, recursive=True)
    return dropped


def list_entries(root: str) -> list[str]:
    """Return the names of all entries, finished or not."""
    filesystem, place = open_filesystem(root)
    filesystem.invalidate_cache()
    try:
        found = filesystem.ls(place, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(row["name"].rstrip("/").rpartition("/")[2] for row in found if row["type"] == "directory")


def _entry_bytes(entry: str) -> int:
    """Add up an entry's files."""
    return sum(list_sizes(entry).values())


def _last_use(entry: str) -> float:
    """Return when an entry was used last, in seconds since 1970; 0 for one that never was."""
    try:
        return float(read_stored(f"{entry}/{_USED}"))
    except (FileNotFoundError, ValueError):
        return 0.0


def place_of(shard: int, row: int, number: int) -> int:
    """Return one number for an image: which shard, which row of it, which of the row's images."""
    return shard << 48 | row << 16 | number


def block_name(shard: int, first_row: int) -> str:
    """Return the name, without an ending, of the files of a block."""
    return f"{shard:05d}-{first_row:06d}"


def write_index(entry: str, blocks: Sequence[str]) -> int:
    """Gather what the blocks say of themselves; return the number of images that can be found."""

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
    """Where each image's features lie; n images, in the order of their places."""

    places: np.ndarray
    files: tuple[str, ...]
    file: np.ndarray
    offset: np.ndarray
    length: np.ndarray


@lru_cache(maxsize=4)
def read_index(entry: str) -> FeatureIndex:
    """Read an entry's index once a process. Raises DataError where the entry is gone."""
    try:
        table = pq.read_table(io.BytesIO(read_stored(f"{entry}/{_INDEX}")))
    except FileNotFoundError as error:
        raise DataError(
            f"the cached features in {entry} are gone: start the run again, which computes them anew, and raise "
            "data.feature_cache_gb if they were dropped to make room"
        ) from error
    columns = [table.column(name).to_numpy() for name in ("place", "file", "offset", "length")]
    return FeatureIndex(columns[0], tuple(json.loads(table.schema.metadata[b"files"])), *columns[1:])


def fetch_features(entry: str, places: Sequence[int]) -> list[bytes]:
    """Return the features of each image, bytes of (views, p, v), reading what is asked for and nothing else.

    Raises DataError for an image that the entry does not have.
    """
    if not places:
        return []
    index = read_index(entry)
    wanted = np.asarray(places, np.int64)
    found = np.searchsorted(index.places, wanted)
    if (found == len(index.places)).any() or (index.places[found] != wanted).any():
        raise DataError(f"{entry} lacks features of this data: delete the folder, and start the run again")
    filesystem, place = open_filesystem(entry)
    paths = [f"{place}/{index.files[file]}.bin" for file in index.file[found]]
    starts, ends = index.offset[found], index.offset[found] + index.length[found]
    try:
        parts = filesystem.cat_ranges(paths, starts.tolist(), ends.tolist(), on_error="raise")
    except OSError as error:
        raise DataError(f"the cached features in {entry} cannot be read ({error}): start the run again") from error
    return [bytes(part) for part in parts]


def in_gb(num_bytes: float) -> str:
    """Write a size as people do."""
    return f"{num_bytes / 1e9:.3g} GB"

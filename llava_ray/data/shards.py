"""Prepared data: Parquet shards of checked samples, and the manifest that makes a folder complete.

A shard holds encoded images: as JPEG or PNG they are some ten to fifty times smaller than pixels, in storage and on the
network, so they are decoded as late as possible. Row groups are small, so that single rows can be read. The manifest
``prepared.json`` is written last: a folder without it is incomplete.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llava_ray.data.storage import absolute_path, file_size, list_sizes, read_stored, write_stored
from llava_ray.data.validation import Sample
from llava_ray.errors import DataError
from llava_ray.images.reading import open_filesystem
from llava_ray.invocation import command

SHARDS_VERSION = 1
INSTRUCTION, PREFERENCES = "instruction", "preferences"
_MANIFEST = "prepared.json"
REJECTED = "rejected.jsonl"
ROWS_PER_GROUP = 128

_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "turns": pa.list_(pa.struct({"role": pa.string(), "value": pa.string()})),
        "images": pa.list_(pa.large_binary()),
        "widths": pa.list_(pa.int32()),
        "heights": pa.list_(pa.int32()),
        "source": pa.string(),
    }
)

# A preference's rejected answer stands beside the turns, which end with the chosen one.
_PAIR_SCHEMA = _SCHEMA.append(pa.field("rejected", _SCHEMA.field("turns").type))

# Images are compressed already; a dictionary or statistics over them would cost time and gain nothing.
_COMPRESSION = {
    "id": "zstd",
    "turns.list.element.role": "zstd",
    "turns.list.element.value": "zstd",
    "images.list.element": "none",
    "widths.list.element": "zstd",
    "heights.list.element": "zstd",
    "source": "zstd",
    "rejected.list.element.role": "zstd",
    "rejected.list.element.value": "zstd",
}


@dataclass(frozen=True)
class ShardInfo:
    """One shard of a prepared folder."""

    name: str
    num_rows: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class PreparedData:
    """A complete prepared folder."""

    path: str
    shards: tuple[ShardInfo, ...]
    data_hash: str
    """sha256 over the shards' own hashes: the identity of the data, wherever the folder is."""
    num_samples: int
    num_rejected: int
    rejected_reasons: dict[str, int]
    ignored_keys: dict[str, int] = field(default_factory=dict)
    """Ignored keys of records, turns and parts, with the number of samples that have them."""
    kind: str = INSTRUCTION
    """What the records are: instructions or preferences (``data.kind``)."""
    reused: bool = field(default=False, compare=False)
    """Whether the folder existed already, rather than being written now."""
    sources: tuple["PreparedData", ...] = ()
    """Of a mixture: the folder of each source in order. ``path`` is then empty, all else is of them together."""

    @property
    def num_bytes(self) -> int:
        """Return the total size of the shards."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def rejected_path(self) -> str:
        """Return the path of the list of rejected records."""
        return f"{self.path}/{REJECTED}"


class ShardWriter:
    """A writer of shards named ``<prefix>-00.parquet``, ``-01`` ..., each bounded in rows and bytes."""

    def __init__(self, folder: str, prefix: str, *, max_rows: int, max_bytes: int) -> None:
        """Prepare an empty writer; no shard is written before the first sample."""
        self.folder, self.prefix, self.max_rows, self.max_bytes = folder, prefix, max_rows, max_bytes
        self.shards: list[ShardInfo] = []
        self._rows: list[dict[str, Any]] = []
        self._num_bytes = 0

    def append(self, sample: Sample) -> None:
        """Add a sample, first writing the current shard if it would grow too large."""
        num_bytes = sum(len(image) for image in sample.record.images)
        if self._rows and (len(self._rows) == self.max_rows or self._num_bytes + num_bytes > self.max_bytes):
            self.flush()
        self._rows.append(to_row(sample))
        self._num_bytes += num_bytes

    def flush(self) -> list[ShardInfo]:
        """Write the buffered samples; return all shards written so far."""
        if self._rows:
            name = f"{self.prefix}-{len(self.shards):02d}.parquet"
            content = encode_shard(self._rows)
            write_stored(f"{self.folder}/{name}", content)
            digest = hashlib.sha256(content).hexdigest()
            self.shards.append(ShardInfo(name, len(self._rows), len(content), digest))
            self._rows, self._num_bytes = [], 0
        return self.shards


def encode_shard(rows: Sequence[Mapping[str, Any]]) -> memoryview:
    """Encode rows as a Parquet file; equal rows give equal bytes, which the data hash relies on."""
    sink = pa.BufferOutputStream()
    schema = _PAIR_SCHEMA if rows and "rejected" in rows[0] else _SCHEMA
    with pq.ParquetWriter(
        sink, schema, compression=_COMPRESSION, use_dictionary=False, write_statistics=False
    ) as writer:
        for start in range(0, len(rows), ROWS_PER_GROUP):
            group = pa.Table.from_pylist(list(rows[start : start + ROWS_PER_GROUP]), schema)
            writer.write_table(group, row_group_size=ROWS_PER_GROUP)
    return memoryview(sink.getvalue())


def to_row(sample: Sample) -> dict[str, Any]:
    """Convert a sample to a row of the shard schema."""
    record = sample.record
    rejected = {"rejected": [turn.to_row() for turn in record.rejected]} if record.rejected else {}
    return rejected | {
        "id": record.id,
        "turns": [turn.to_row() for turn in record.turns],
        "images": list(record.images),
        "widths": [width for width, _ in sample.sizes],
        "heights": [height for _, height in sample.sizes],
        "source": record.source,
    }


def write_shards_manifest(
    path: str,
    shards: Sequence[ShardInfo],
    rejected_reasons: Mapping[str, int],
    settings: Mapping[str, Any],
    ignored_keys: Mapping[str, int] | None = None,
) -> PreparedData:
    """Write the manifest that makes a folder complete; ``settings`` are those it was prepared with."""
    ordered = tuple(sorted(shards, key=lambda shard: shard.name))
    prepared = PreparedData(
        path=absolute_path(path),
        shards=ordered,
        data_hash=_hash_shards(ordered),
        num_samples=sum(shard.num_rows for shard in ordered),
        num_rejected=sum(rejected_reasons.values()),
        rejected_reasons=dict(sorted(rejected_reasons.items())),
        ignored_keys=dict(ignored_keys or {}),
        kind=settings.get("kind", INSTRUCTION),
    )
    values = {
        "format_version": SHARDS_VERSION,
        "data_hash": prepared.data_hash,
        "num_records": prepared.num_samples + prepared.num_rejected,
        "num_samples": prepared.num_samples,
        "num_rejected": prepared.num_rejected,
        "rejected_reasons": prepared.rejected_reasons,
        "ignored_keys": prepared.ignored_keys,
        "settings": dict(settings),
        "shards": [asdict(shard) for shard in ordered],
    }
    write_stored(f"{prepared.path}/{_MANIFEST}", json.dumps(values, indent=1).encode())
    return prepared


def _hash_shards(shards: Sequence[ShardInfo]) -> str:
    """Return one sha256 over those of all shards, in order."""
    return hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()


def is_prepared(path: str) -> bool:
    """Return whether a folder has a manifest of prepared data."""
    return file_size(f"{absolute_path(path)}/{_MANIFEST}") is not None


def open_prepared(path: str) -> PreparedData:
    """Load a folder's manifest and check that all shards exist with their size.

    Raises DataError where the folder is not prepared, of another format version, or incomplete.
    """
    path = absolute_path(path)
    values = _read_manifest(path)
    prepared = PreparedData(
        path=path,
        shards=tuple(ShardInfo(**shard) for shard in values["shards"]),
        data_hash=values["data_hash"],
        num_samples=values["num_samples"],
        num_rejected=values["num_rejected"],
        rejected_reasons=values["rejected_reasons"],
        ignored_keys=values.get("ignored_keys", {}),
        kind=values["settings"].get("kind", INSTRUCTION),
        reused=True,
    )
    sizes = list_sizes(path)
    wrong = [shard.name for shard in prepared.shards if sizes.get(shard.name) != shard.num_bytes]
    if wrong:
        raise DataError(
            f"{path}: {len(wrong)} of {len(prepared.shards)} shards are missing or cut off, first {wrong[0]!r} "
            f"({sizes.get(wrong[0], 'no')} bytes found); copy the folder completely, or delete it and prepare again. "
            "If several nodes have just written it, data.cache_dir is not on storage that they share"
        )
    return prepared


def _read_manifest(path: str) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(read_stored(f"{path}/{_MANIFEST}"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"{path!r} is not a prepared folder: there is no {_MANIFEST} in it; give data.data_path the raw "
            f"records, or run {command('prepare')} to the end"
        ) from error
    except ValueError as error:
        raise DataError(f"{path}/{_MANIFEST} is damaged ({error}); delete the folder and prepare again") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != SHARDS_VERSION:
        raise DataError(
            f"{path}/{_MANIFEST} has format version {version!r}, this llava_ray reads {SHARDS_VERSION}; prepare the "
            f"data again with {command('prepare')}"
        )
    return values


def read_shard_rows(
    prepared_path: str, shard_name: str, rows: Sequence[int] | np.ndarray | None, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read rows of one shard in the order requested (None for all), from only the row groups that hold them.

    Raises DataError where the shard is missing, damaged or has fewer rows.
    """
    path = f"{prepared_path}/{shard_name}"
    filesystem, place = open_filesystem(path)
    names = None if columns is None else list(columns)
    try:
        with pq.ParquetFile(place, filesystem=filesystem) as file:
            return file.read(names, use_threads=False) if rows is None else _take_rows(file, rows, names)
    except FileNotFoundError as error:
        raise DataError(f"shard {path} is gone; copy it back, or delete the folder and prepare again") from error
    except (pa.ArrowInvalid, IndexError, OSError) as error:
        raise DataError(f"shard {path} cannot be read ({error}); delete the folder and prepare again") from error


def _take_rows(file: pq.ParquetFile, rows: Sequence[int] | np.ndarray, columns: list[str] | None) -> pa.Table:
    wanted = np.asarray(rows, np.int64)
    counts = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    first = np.cumsum([0, *counts])  # the first row of each group, then the number of rows
    if wanted.size and (wanted.min() < 0 or wanted.max() >= first[-1]):
        raise IndexError(f"rows up to {wanted.max()} requested, it has {first[-1]}")
    groups = np.unique(np.searchsorted(first, wanted, side="right") - 1)
    held = np.concatenate([wanted[:0], *(np.arange(first[i], first[i + 1]) for i in groups)])
    table = file.read_row_groups(groups.tolist(), columns, use_threads=False)
    return table.take(np.searchsorted(held, wanted))

"""The Ray task of a preparation: check one chunk's records and write the good ones as shards."""

import json
import pickle
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import pyarrow as pa

from llava_ray.data.chunks import RecordChunk
from llava_ray.data.records import RawRecord, Record
from llava_ray.data.shards import ShardInfo, ShardWriter
from llava_ray.data.storage import file_size, read_stored, write_stored
from llava_ray.data.validation import check_images, fetch_images, read_record
from llava_ray.errors import DataError, RecordError

MAX_KEYS = 1000  # ignored keys that are counted by name

# Records whose images are fetched ahead of the one being checked: hides the latency of remote storage.
_NUM_FETCHING = 16
_NUM_AHEAD = 64


@dataclass(frozen=True)
class Rules:
    """The settings of a task besides its records."""

    folder: str
    image_folder: str
    max_pixels: int
    samples_per_shard: int
    shard_bytes: int
    pairs: bool = False
    """Whether the records are preferences."""


@dataclass(frozen=True)
class ChunkResult:
    """The result of one chunk: its shards and rejected records."""

    shards: tuple[ShardInfo, ...]
    rejected: tuple[dict[str, str], ...]
    """id, source, reason and message of each rejected record."""
    ignored_keys: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        """Convert to text for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "ChunkResult":
        """Build a result from the text of `to_json`."""
        values = json.loads(text)
        shards = tuple(ShardInfo(**shard) for shard in values["shards"])
        return cls(shards, tuple(values["rejected"]), values["ignored_keys"])


def write_chunk(batch: pa.Table, rules: Rules) -> pa.Table:
    """Check one chunk's records and write the good ones; runs in a Ray task.

    A chunk that was written before without rejections is reused; one with rejections is read again, in case the data
    was fixed. A storage failure is returned as text, because Ray would wrap the exception in its own.
    """
    index, packed = batch["index"][0].as_py(), batch["chunk"][0].as_py()
    note = f"{rules.folder}/chunks/{index:05d}.json"
    result, failure = None, None
    try:
        result = _read_note(note, rules.folder)
        if result is None:
            result = _check_and_write(pickle.loads(packed), f"shard-{index:05d}", rules)
            write_stored(note, result.to_json().encode())
    except DataError as error:
        failure = str(error)
    result_text = pa.array([result.to_json() if result else None], pa.large_string())
    return pa.table({"index": [index], "result": result_text, "error": pa.array([failure], pa.string())})


def _read_note(path: str, folder: str) -> ChunkResult | None:
    if file_size(path) is None:
        return None
    result = ChunkResult.from_json(read_stored(path))
    whole = all(file_size(f"{folder}/{shard.name}") == shard.num_bytes for shard in result.shards)
    return result if whole and not result.rejected else None


def _check_and_write(chunk: RecordChunk, prefix: str, rules: Rules) -> ChunkResult:
    writer = ShardWriter(rules.folder, prefix, max_rows=rules.samples_per_shard, max_bytes=rules.shard_bytes)
    rejected, ignored = [], Counter[str]()
    for raw, pending in _fetch_ahead(chunk.read(), rules):
        try:
            sample = check_images(*pending.result(), max_pixels=rules.max_pixels)
            writer.append(sample)
            ignored.update(sample.record.ignored)
        except RecordError as error:
            rejected.append({"id": raw.id, "source": raw.source, "reason": error.reason, "message": str(error)})
    return ChunkResult(tuple(writer.flush()), tuple(rejected), dict(ignored.most_common(MAX_KEYS)))


_Fetched = Future[tuple[Record, tuple[bytes, ...]]]


def _fetch_ahead(records: Iterator[RawRecord], rules: Rules) -> Iterator[tuple[RawRecord, _Fetched]]:
    """Yield records in order while the images of the next ones are being fetched."""
    waiting: deque[tuple[RawRecord, _Fetched]] = deque()
    with ThreadPoolExecutor(_NUM_FETCHING) as pool:
        for raw in records:
            waiting.append((raw, pool.submit(_fetch, raw, rules)))
            if len(waiting) == _NUM_AHEAD:
                yield waiting.popleft()
        yield from waiting


def _fetch(raw: RawRecord, rules: Rules) -> tuple[Record, tuple[bytes, ...]]:
    record = read_record(raw, rules.image_folder, pairs=rules.pairs)
    return record, fetch_images(record, rules.image_folder)

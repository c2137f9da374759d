"""Estimates for a dry run on data that is not prepared yet: the number of samples and the length of the first.

It uses training's own readers, so it counts what training accepts, and rejected records do not end a dry run.
"""

from contextlib import suppress
from pathlib import Path

from llava_ray.data.chunks import TEXT_READERS
from llava_ray.data.ordered_records import read_records
from llava_ray.data.preference_records import is_preference
from llava_ray.data.records import RawRecord
from llava_ray.data.shards import is_prepared, open_prepared, read_shard_rows
from llava_ray.data.validation import parse_values, read_record
from llava_ray.errors import DataError, RecordError

_MAX_COUNTED_BYTES = 128 * 2**20  # of raw JSON that is read merely to count records
_NUM_LOOKED_AT = 200  # samples whose lengths stand for those of all
_KINDS = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl"}


def count_samples(data_path: str) -> int | None:
    """Count the records of a prepared folder or of a small raw file, damaged ones included.

    Returns None where that would take long or is impossible.
    """
    if "://" not in data_path and is_prepared(data_path):
        return open_prepared(data_path).num_samples
    if (kind := _small_kind(data_path)) is None:
        return None
    try:
        return sum(1 for _ in TEXT_READERS[kind](data_path))
    except DataError:  # reported when the data is prepared
        return None


def measure_first_samples(data_path: str) -> list[tuple[int, int]]:
    """Count characters and images of the first samples of a prepared folder or a small raw file.

    Records that training would reject are left out.
    """
    if "://" not in data_path and is_prepared(data_path):
        return _first_prepared(data_path)
    found: list[tuple[int, int]] = []
    if _small_kind(data_path) is None:
        return found
    with suppress(DataError):  # the rest of the file is unreadable
        for raw in read_records(data_path, _NUM_LOOKED_AT):
            assert isinstance(raw, RawRecord)
            with suppress(RecordError):
                record = read_record(raw, "", unnamed_images=True, pairs=is_preference(parse_values(raw)))
                texts = [*record.turns, *record.rejected]
                found.append((sum(len(turn.value) for turn in texts), len(record.images)))
    return found


def _first_prepared(path: str) -> list[tuple[int, int]]:
    prepared = open_prepared(path)
    rows = list(range(min(_NUM_LOOKED_AT, prepared.shards[0].num_rows))) if prepared.shards else []
    if not rows:
        return []
    table = read_shard_rows(prepared.path, prepared.shards[0].name, rows, ["turns", "widths"])
    return [(sum(len(turn["value"]) for turn in row["turns"]), len(row["widths"] or ())) for row in table.to_pylist()]


def _small_kind(data_path: str) -> str | None:
    """Return the format of a local file, None for a remote or large one."""
    if "://" in data_path:
        return None
    path = Path(data_path).expanduser()
    small = path.is_file() and path.stat().st_size <= _MAX_COUNTED_BYTES
    return _KINDS.get(path.suffix.lower()) if small else None

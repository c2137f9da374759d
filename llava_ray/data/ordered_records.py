"""Records read one after the other in the order of their files, without shuffling or preparation."""

from collections.abc import Iterator
from itertools import islice
from pathlib import PurePath

from llava_ray.chat.conversation import Turn
from llava_ray.data.chunks import TEXT_READERS, make_chunks, make_unique_id
from llava_ray.data.records import RawRecord, Record, find_files
from llava_ray.data.shards import is_prepared, open_prepared, read_shard_rows
from llava_ray.data.storage import absolute_path

_RECORDS_PER_CHUNK = 256


def read_records(data_path: str, max_samples: int | None = None) -> Iterator[RawRecord | Record]:
    """Yield the records of any data that training accepts, in the order of its files. Raises DataError."""
    if is_prepared(data_path):
        yield from islice(_prepared_records(data_path), max_samples)
        return
    kind, files = find_files(absolute_path(data_path))
    if kind in TEXT_READERS:
        yield from islice(_text_records(kind, files), max_samples)
        return
    for chunk in make_chunks(kind, files, _RECORDS_PER_CHUNK, max_samples):
        yield from chunk.read()


def _text_records(kind: str, files: list[str]) -> Iterator[RawRecord]:
    # Unlike preparation, which shuffles the records of text files.
    taken: dict[str, int] = {}
    rows = ((PurePath(path).name, *row) for path in files for row in TEXT_READERS[kind](path))
    for index, (name, row, text, own_id) in enumerate(rows):
        yield RawRecord(make_unique_id(str(index) if own_id is None else own_id, taken), f"{name}:{row}", text)


def _prepared_records(path: str) -> Iterator[Record]:
    prepared = open_prepared(path)
    for shard in prepared.shards:
        for row in read_shard_rows(prepared.path, shard.name, None).to_pylist():
            turns, rejected = (
                tuple(Turn.from_row(turn) for turn in row.get(name, ())) for name in ("turns", "rejected")
            )
            yield Record(row["id"], turns, tuple(row["images"]), row["source"], rejected=rejected)

"""Raw records split into chunks, one for each task of a preparation, with their ids and their order."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

import numpy as np

from llava_ray.data.json_files import clean_id, read_json_records, read_jsonl
from llava_ray.data.parquet_files import parquet_layout, read_parquet_records
from llava_ray.data.records import RawRecord
from llava_ray.data.tar_files import read_tar
from llava_ray.images.reading import open_filesystem

TEXT_READERS = {"json": read_json_records, "jsonl": read_jsonl}

# LLaVA's mix is sorted by source, and training shuffles only within windows of shards: shuffle all records once here.
_SHUFFLE_SEED = 0


@dataclass(frozen=True)
class TextChunk:
    """Records of JSON files, as their raw text."""

    ids: tuple[str, ...]
    sources: tuple[str, ...]
    texts: tuple[bytes, ...]

    def read(self) -> Iterator[RawRecord]:
        """Yield the records."""
        yield from map(RawRecord, self.ids, self.sources, self.texts)


@dataclass(frozen=True)
class ParquetChunk:
    """Adjacent row groups of one Parquet file, up to ``len(ids)`` rows."""

    path: str
    name: str
    row_groups: tuple[int, ...]
    first_row: int
    ids: tuple[str, ...]

    def read(self) -> Iterator[RawRecord]:
        """Yield the records, read from the file."""
        rows = islice(read_parquet_records(self.path, self.row_groups), len(self.ids))
        for row, (own_id, (values, unread)) in enumerate(zip(self.ids, rows, strict=True), start=self.first_row):
            yield RawRecord(own_id, f"{self.name}:{row}", values, ignored=unread)


@dataclass(frozen=True)
class TarChunk:
    """One WebDataset tar, up to ``num_samples`` of it. Ids are ``<tar's name>/<key>``, as keys repeat between tars."""

    path: str
    name: str
    num_samples: int | None = None

    def read(self) -> Iterator[RawRecord]:
        """Yield the records, read from the tar."""
        taken: dict[str, int] = {}
        for sample in islice(read_tar(self.path), self.num_samples):
            key = clean_id(sample.key)
            name = make_unique_id(f"{self.name.partition('.')[0]}/{key}", taken)
            yield RawRecord(name, f"{self.name}:{key}", sample.text, sample.images, sample.ignored)


RecordChunk = TextChunk | ParquetChunk | TarChunk


def make_chunks(
    kind: str, files: Sequence[str], chunk_size: int, max_samples: int | None, *, mixed: bool = True
) -> Iterator[RecordChunk]:
    """Split records into chunks of about ``chunk_size``: JSON exactly and, if ``mixed``, shuffled; tables in order.

    Only the first ``max_samples`` records are taken.
    """
    if kind in TEXT_READERS:
        yield from _text_chunks(kind, files, chunk_size, max_samples, mixed=mixed)
    elif kind == "parquet":
        yield from _parquet_chunks(files, chunk_size, max_samples)
    else:
        yield from _tar_chunks(files, max_samples)


def _text_chunks(
    kind: str, files: Sequence[str], chunk_size: int, max_samples: int | None, *, mixed: bool
) -> Iterator[RecordChunk]:
    rows = ((name, *row) for path, name in _with_names(files) for row in TEXT_READERS[kind](path))
    taken: dict[str, int] = {}
    ids, places, texts = [], [], []
    for index, (name, row, text, own_id) in enumerate(islice(rows, max_samples)):
        ids.append(make_unique_id(str(index) if own_id is None else own_id, taken))
        places.append((name, row))
        texts.append(text)
    # A fixed seed, not the run's: the folder of prepared data is shared by runs of all seeds.
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(len(ids)) if mixed else np.arange(len(ids))
    for start in range(0, len(order), chunk_size):
        chosen = order[start : start + chunk_size].tolist()
        yield TextChunk(
            ids=tuple(ids[i] for i in chosen),
            sources=tuple(f"{places[i][0]}:{places[i][1]}" for i in chosen),
            texts=tuple(texts[i] for i in chosen),
        )


def _parquet_chunks(files: Sequence[str], chunk_size: int, max_samples: int | None) -> Iterator[RecordChunk]:
    taken: dict[str, int] = {}
    total = 0
    for path, name in _with_names(files):
        counts, own_ids = parquet_layout(path)
        ids = [make_unique_id(str(total + row) if own is None else own, taken) for row, own in enumerate(own_ids)]
        ids = ids[: None if max_samples is None else max(0, max_samples - total)]
        total += len(ids)
        first_row = 0
        for groups in _gather(counts, chunk_size):
            end = first_row + sum(counts[group] for group in groups)
            if first_row < len(ids):
                yield ParquetChunk(path, name, tuple(groups), first_row, tuple(ids[first_row:end]))
            first_row = end


def _gather(counts: Sequence[int], limit: int) -> list[list[int]]:
    """Group adjacent row groups whose counts add up to at most ``limit``; a larger one is a group by itself."""
    groups: list[list[int]] = []
    size = limit + 1
    for index, count in enumerate(counts):
        if size + count > limit:
            groups.append([])
            size = 0
        groups[-1].append(index)
        size += count
    return groups


def _tar_chunks(files: Sequence[str], max_samples: int | None) -> Iterator[RecordChunk]:
    left = max_samples
    for path, name in _with_names(files):
        if left is None:
            yield TarChunk(path, name)
            continue
        num_samples = sum(1 for _ in islice(read_tar(path), left))
        left -= num_samples
        if num_samples:
            yield TarChunk(path, name, num_samples)


def _with_names(files: Sequence[str]) -> list[tuple[str, str]]:
    """Return each path with its name below the common folder: shards must not depend on where the data is stored."""
    folders = [path.split("/")[:-1] for path in files]
    shared = takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False))
    depth = len(list(shared))
    return [(path, "/".join(path.split("/")[depth:])) for path in files]


def make_unique_id(name: str, taken: dict[str, int]) -> str:
    """Return ``name``, or ``name#2``, ``name#3`` ... if it is already used: LLaVA's own mix repeats ids."""
    number = taken.get(name, 0) + 1
    while number > 1 and f"{name}#{number}" in taken:
        number += 1
    taken[name] = number
    if number == 1:
        return name
    taken[f"{name}#{number}"] = 1
    return f"{name}#{number}"


def fingerprint_data(kind: str, files: Sequence[str]) -> str:
    """Return a hash of the files: of every byte of JSON; of name, size and time of the larger Parquet and tar files."""
    digest = hashlib.sha256()
    for path in files:
        filesystem, place = open_filesystem(path)
        if kind in TEXT_READERS:
            with filesystem.open(place, "rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
        else:
            digest.update(f"{path} {filesystem.ukey(place)}".encode())
    return digest.hexdigest()

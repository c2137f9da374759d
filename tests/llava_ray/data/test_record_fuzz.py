"""Record files made from numbers go the way of preparation and preview: read, rejected one by one, or refused whole."""

import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from fuzzing import NUM_INPUTS, Target, fuzz, fuzz_at_length
from record_mutations import PNG, make_file

from llava_ray.data.chunks import make_chunks
from llava_ray.data.ordered_records import read_records
from llava_ray.data.records import RawRecord, find_files
from llava_ray.data.shards import encode_shard, to_row
from llava_ray.data.validation import validate
from llava_ray.errors import DataError, RecordError


def make_target() -> Target:
    folder = Path(tempfile.mkdtemp())
    (folder / "a.png").write_bytes(PNG)

    def read(seed: int) -> str:
        suffix, content, num_records, damaged = make_file(seed)
        path = folder / f"data{suffix}"
        path.write_bytes(content)
        try:
            return read_all(path, folder, num_records, damaged)
        finally:
            path.unlink()

    return read


def read_all(path: Path, folder: Path, num_records: int, damaged: bool) -> str:
    """Read a file as preparation does; say how far that came."""
    counts, rows = Counter[str](), []
    try:
        kind, files = find_files(str(path))
        raws = [raw for chunk in make_chunks(kind, files, 2, None) for raw in chunk.read()]
        shown = list(read_records(str(path)))
    except DataError as error:
        assert not isinstance(error, RecordError), "one record's fault ended the job"
        assert path.name in str(error)
        assert len(str(error)) < 2000
        return f"{kind} refused, {'damaged' if damaged else 'whole'}"
    assert sorted(raw.id for raw in raws) == sorted(raw.id for raw in shown)
    if not damaged:
        assert len(raws) == num_records or kind == "tar"
    for raw in raws:
        try:
            sample = check(raw, folder)
        except RecordError as error:
            assert raw.source in str(error)
            assert len(str(error)) < 3000
            json.dumps({"id": raw.id, "message": str(error)}).encode()
            str(error).encode()
            counts[error.reason] += 1
            continue
        counts["read"] += 1
        rows.append(to_row(sample))
    encode_shard(rows)
    rejected = sum(counts.values()) - counts["read"]
    return f"{kind} {'read' if not rejected else 'partly' if counts['read'] else 'rejected'}"


def check(raw: RawRecord, folder: Path):
    return validate(raw, str(folder), max_pixels=10_000)


@pytest.mark.slow
def test_damaged_records_are_read_or_rejected() -> None:
    report = fuzz("records", make_target, NUM_INPUTS)
    assert not report.faults
    assert sum(count for word, count in report.outcomes.items() if word.endswith(("read", "partly"))) > NUM_INPUTS / 3


@pytest.mark.verify
@pytest.mark.timeout(7200)
def test_twenty_thousand_damaged_records_are_read_or_rejected() -> None:
    report = fuzz_at_length("records", make_target)
    assert not report.faults

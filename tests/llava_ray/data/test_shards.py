"""Shards: written whole, read by row, on any filesystem; folders that are not what they seem are refused."""

import hashlib
import json
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from llava_ray.chat.conversation import Turn
from llava_ray.data.records import Record
from llava_ray.data.shards import (
    PreparedData,
    ShardWriter,
    is_prepared,
    open_prepared,
    read_shard_rows,
    write_shards_manifest,
)
from llava_ray.data.validation import Sample
from llava_ray.errors import DataError

NUM_SAMPLES = 300


def sample(index: int, num_bytes: int = 10) -> Sample:
    turns = (Turn("human", f"<image>\nQuestion {index}?"), Turn("gpt", f"Answer {index}"))
    image = bytes([index % 256]) * num_bytes
    return Sample(Record(f"id-{index}", turns, (image,), f"data.json:{index}"), ((640, 480 + index),))


def write_folder(path: str, num_samples: int = NUM_SAMPLES) -> PreparedData:
    writer = ShardWriter(path, "shard-00000", max_rows=200, max_bytes=1 << 20)
    for index in range(num_samples):
        writer.append(sample(index))
    return write_shards_manifest(path, writer.flush(), {"image_missing": 2}, {"data_path": "data.json"})


@pytest.fixture(params=["{}/prepared", "file://{}/prepared", "memory://prepared-{}"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.param.format(tmp_path))


def test_folder_opens_as_it_was_written(folder: str) -> None:
    written = write_folder(folder)
    opened = open_prepared(folder)
    assert opened == written
    assert (opened.reused, written.reused) == (True, False)
    assert [shard.num_rows for shard in opened.shards] == [200, 100]
    assert (opened.num_samples, opened.num_rejected, opened.rejected_reasons) == (300, 2, {"image_missing": 2})


def test_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    prepared = write_folder(str(tmp_path))
    hashes = [hashlib.sha256((tmp_path / shard.name).read_bytes()).hexdigest() for shard in prepared.shards]
    assert [shard.sha256 for shard in prepared.shards] == hashes
    assert prepared.data_hash == hashlib.sha256("".join(hashes).encode()).hexdigest()
    assert prepared.num_bytes == sum((tmp_path / shard.name).stat().st_size for shard in prepared.shards)


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    assert write_folder(str(tmp_path / "a")).data_hash == write_folder(str(tmp_path / "b")).data_hash


def test_rows_come_in_the_order_asked(folder: str) -> None:
    prepared = write_folder(folder)
    table = read_shard_rows(prepared.path, prepared.shards[0].name, [150, 3, 199, 3, 0])
    assert table["id"].to_pylist() == ["id-150", "id-3", "id-199", "id-3", "id-0"]
    row = table.to_pylist()[0]
    assert row["turns"] == [
        {"role": "human", "value": "<image>\nQuestion 150?"},
        {"role": "gpt", "value": "Answer 150"},
    ]
    assert row["images"] == [bytes([150]) * 10]
    assert (row["widths"], row["heights"], row["source"]) == ([640], [630], "data.json:150")


def test_all_rows_and_some_columns(folder: str) -> None:
    prepared = write_folder(folder)
    table = read_shard_rows(prepared.path, prepared.shards[1].name, None, columns=["id", "widths"])
    assert table.column_names == ["id", "widths"]
    assert table["id"].to_pylist() == [f"id-{index}" for index in range(200, 300)]
    assert read_shard_rows(prepared.path, prepared.shards[1].name, []).num_rows == 0


def test_only_the_row_groups_asked_for_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = write_folder(str(tmp_path))
    read: list[list[int]] = []
    read_row_groups = pq.ParquetFile.read_row_groups

    def watched(file: pq.ParquetFile, groups: list[int], *arguments: object, **options: object) -> object:
        read.append(groups)
        return read_row_groups(file, groups, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", watched)
    read_shard_rows(prepared.path, prepared.shards[0].name, [130, 199])
    assert read == [[1]]


def test_shards_are_bounded_in_bytes(tmp_path: Path) -> None:
    writer = ShardWriter(str(tmp_path), "shard", max_rows=100, max_bytes=1000)
    for index, num_bytes in enumerate([400, 400, 400, 5000, 10, 10]):
        writer.append(sample(index, num_bytes))
    assert [shard.num_rows for shard in writer.flush()] == [2, 1, 1, 2]


def test_no_samples_make_no_shard(tmp_path: Path) -> None:
    assert ShardWriter(str(tmp_path), "shard", max_rows=1, max_bytes=1).flush() == []
    assert not list(tmp_path.iterdir())


def test_text_only_samples_have_empty_lists(tmp_path: Path) -> None:
    writer = ShardWriter(str(tmp_path), "shard", max_rows=9, max_bytes=9)
    writer.append(Sample(Record("a", (Turn("human", "Hi"), Turn("gpt", "Hello \N{GRINNING FACE}")), (), "x:0"), ()))
    row = read_shard_rows(str(tmp_path), writer.flush()[0].name, [0]).to_pylist()[0]
    assert (row["images"], row["widths"], row["turns"][1]["value"]) == ([], [], "Hello \N{GRINNING FACE}")


def test_row_beyond_the_end_is_refused(tmp_path: Path) -> None:
    prepared = write_folder(str(tmp_path))
    with pytest.raises(DataError, match=r"shard-00000-01\.parquet.*it has 100"):
        read_shard_rows(prepared.path, prepared.shards[1].name, [100])


def test_folder_without_manifest_is_refused(folder: str) -> None:
    assert not is_prepared(folder)
    with pytest.raises(DataError, match=r"not a prepared folder.*run llava-ray prepare"):
        open_prepared(folder)


def test_missing_and_cut_shards_are_refused(tmp_path: Path) -> None:
    prepared = write_folder(str(tmp_path))
    shard = tmp_path / prepared.shards[1].name
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(DataError, match=r"1 of 2 shards.*shard-00000-01\.parquet' \(100 bytes"):
        open_prepared(str(tmp_path))
    with pytest.raises(DataError, match=r"shard-00000-01\.parquet cannot be read"):
        read_shard_rows(prepared.path, shard.name, [0])
    shard.unlink()
    with pytest.raises(DataError, match=r"no bytes found.*prepare again"):
        open_prepared(str(tmp_path))
    with pytest.raises(DataError, match=r"shard-00000-01\.parquet is gone"):
        read_shard_rows(prepared.path, shard.name, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "damaged"), (json.dumps({"format_version": 99}), "format version 99"), ("[]", "format version None")],
)
def test_unreadable_manifest_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "prepared.json").write_text(text)
    with pytest.raises(DataError, match=f"{message}.*prepare"):
        open_prepared(str(tmp_path))


def test_unwritable_output_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot write '.*/file/prepared/shard-00000-00\.parquet'"):
        write_folder(str(tmp_path / "file" / "prepared"), num_samples=1)


class FullFileSystem(type(fsspec.filesystem("memory"))):  # type: ignore[misc]  # fsspec is untyped
    """A disk that breaks off in the middle of a file."""

    protocol = "full"
    store: dict[str, object] = {}  # noqa: RUF012 - fsspec's own way to share the files

    def pipe_file(self, path: str, value: bytes, **options: object) -> None:
        super().pipe_file(path, bytes(value)[: len(value) // 2], **options)
        raise OSError(28, "No space left on device")


def test_storage_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("full", FullFileSystem, clobber=True)

    def refuse(self: FullFileSystem, path: str, **options: object) -> None:
        raise PermissionError("403 Forbidden")

    monkeypatch.setattr(FullFileSystem, "info", refuse)
    with pytest.raises(DataError, match=r"full://disk/prepared\.json': 403 Forbidden; check the address"):
        is_prepared("full://disk")


def test_full_disk_leaves_nothing_behind() -> None:
    fsspec.register_implementation("full", FullFileSystem, clobber=True)
    with pytest.raises(DataError, match=r"cannot write 'full://disk/shard.*No space left.*make room"):
        write_folder("full://disk", num_samples=1)
    assert not FullFileSystem.store

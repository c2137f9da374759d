"""Records read from every layout people keep them in, and files that are not what they should be."""

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llava_ray.data import json_files
from llava_ray.data.chunks import ParquetChunk, TarChunk, TextChunk, fingerprint_data, make_chunks, make_unique_id
from llava_ray.data.json_files import read_json_records, read_jsonl, split_json
from llava_ray.data.records import RawRecord, find_files
from llava_ray.errors import DataError

TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]


def entry(own_id: object, **values: object) -> dict[str, object]:
    return {"id": own_id, "conversations": TURNS, **values}


def write_tar(path: Path, files: Mapping[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], row_group_size: int = 100) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=row_group_size)


def raw_records(data_path: str, chunk_size: int = 100, max_samples: int | None = None) -> list[RawRecord]:
    kind, files = find_files(data_path)
    return [raw for chunk in make_chunks(kind, files, chunk_size, max_samples) for raw in chunk.read()]


@pytest.fixture(params=[7, 50, 1 << 24])
def window(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Window sizes that cut records anywhere, and one that holds all."""
    monkeypatch.setattr(json_files, "JSON_WINDOW", request.param)
    return request.param


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.usefixtures("window")
def test_json_list_is_split_at_its_records(indent: int | None, tmp_path: Path) -> None:
    entries = [entry(i, image=f'{i}], "\\', note="é \N{GRINNING FACE} {}[]") for i in range(20)]
    for ensure_ascii in (True, False):
        text = json.dumps(entries, indent=indent, ensure_ascii=ensure_ascii)
        (tmp_path / "a.json").write_text(f"\ufeff \n{text}\n", encoding="utf-8")
        read = list(read_json_records(str(tmp_path / "a.json")))
        assert [row for row, _, _ in read] == list(range(20))
        assert [json.loads(text) for _, text, _ in read] == entries
        assert [own for _, _, own in read] == [str(i) for i in range(20)]


@pytest.mark.usefixtures("window")
def test_json_file_of_lines_is_read_as_well() -> None:
    stream = io.StringIO('{"id": 1}\n{"id": 2}\n\n{"id": 3}\n')
    assert [value["id"] for _, value in split_json(stream, "x.json")] == [1, 2, 3]


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize("text", ['[{"id": 1}, {"id": 2', '[{"id": 1}, {"id": tru}]', "[", '[{"id": 1}', '{"id": 1}]'])
def test_broken_json_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(DataError, match=r"x\.json: not JSON at character \d+.*copied completely"):
        list(split_json(io.StringIO(text), "x.json"))


@pytest.mark.usefixtures("window")
def test_place_of_the_fault_counts_from_the_start_of_the_file() -> None:
    good = '[{"id": 1}, ' * 1 + '{"id": 2}, '
    with pytest.raises(DataError, match=f"character {len(good) + 1:,} "):
        list(split_json(io.StringIO(good + "{oops}]"), "x.json"))


@pytest.mark.usefixtures("window")
def test_empty_lists_and_files_hold_nothing() -> None:
    assert list(split_json(io.StringIO(" [ ] "), "x.json")) == []
    assert list(split_json(io.StringIO(""), "x.json")) == []


def test_json_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(DataError, match=r"a\.json: not UTF-8"):
        list(read_json_records(str(tmp_path / "a.json")))


def test_json_lines_are_numbered_as_in_an_editor(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(entry('x'))}\n\n{{broken\n{json.dumps(entry(None))}")
    read = list(read_jsonl(str(tmp_path / "a.jsonl")))
    assert [(line, own) for line, _, own in read] == [(1, "x"), (3, None), (4, None)]
    assert read[1][1] == b"{broken"


def test_json_records_are_mixed_once_and_always_alike(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([entry(f"s{i}") for i in range(100)]))
    first, second = raw_records(str(tmp_path / "a.json"), 30), raw_records(str(tmp_path / "a.json"), 30)
    assert first == second
    assert sorted(raw.id for raw in first) == sorted(f"s{i}" for i in range(100))
    assert [raw.id for raw in first] != [f"s{i}" for i in range(100)]
    assert all(raw.source == f"a.json:{raw.id[1:]}" for raw in first)


def test_chunks_hold_at_most_their_size(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([entry(i) for i in range(10)]))
    sizes = [len(chunk.ids) for chunk in make_chunks("json", [str(tmp_path / "a.json")], 4, None)]
    assert sizes == [4, 4, 2]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_max_samples_takes_the_first(suffix: str, tmp_path: Path) -> None:
    entries = [entry(str(i)) for i in range(50)]
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        write_parquet(path, entries, row_group_size=8)
    else:
        path.write_text(json.dumps(entries) if suffix == "json" else "\n".join(map(json.dumps, entries)))
    assert {raw.id for raw in raw_records(str(path), 16, max_samples=20)} == {str(i) for i in range(20)}


def test_repeated_and_missing_ids_are_told_apart(tmp_path: Path) -> None:
    ids = ["a", "b", "a", None, "a#2", "a", 5]
    (tmp_path / "a.json").write_text(json.dumps([entry(own) for own in ids]))
    by_source = {raw.source: raw.id for raw in raw_records(str(tmp_path / "a.json"))}
    assert [by_source[f"a.json:{i}"] for i in range(7)] == ["a", "b", "a#2", "3", "a#2#2", "a#3", "5"]


def test_unused_names_never_collide() -> None:
    taken: dict[str, int] = {}
    names = [make_unique_id(name, taken) for name in ["a#2", "a", "a", "a#2", "a", "a#3"]]
    assert len(set(names)) == 6


def test_parquet_rows_keep_order_and_source(tmp_path: Path) -> None:
    rows = [entry(f"p{i}", image={"bytes": bytes([i]), "path": "x.png"}, unread=i) for i in range(25)]
    write_parquet(tmp_path / "a.parquet", rows, row_group_size=10)
    raws = raw_records(str(tmp_path / "a.parquet"), chunk_size=20)
    assert [raw.id for raw in raws] == [f"p{i}" for i in range(25)]
    assert raws[21].source == "a.parquet:21"
    assert raws[21].values["image"] == {"bytes": b"\x15", "path": "x.png"}
    assert "unread" not in raws[21].values


def test_parquet_row_groups_make_chunks(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [entry(i) for i in range(35)], row_group_size=10)
    chunks = list(make_chunks("parquet", [str(tmp_path / "a.parquet")], 20, None))
    assert [(chunk.row_groups, chunk.first_row, len(chunk.ids)) for chunk in chunks] == [
        ((0, 1), 0, 20),
        ((2, 3), 20, 15),
    ]
    alone = make_chunks("parquet", [str(tmp_path / "a.parquet")], 3, None)
    assert [chunk.row_groups for chunk in alone] == [(0,), (1,), (2,), (3,)]


def test_parquet_without_conversations_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'conversations' or 'messages'; found text"):
        raw_records(str(tmp_path / "a.parquet"))


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"a\.parquet: not a whole Parquet file"):
        raw_records(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tgz"])
def test_tar_files_with_one_base_name_are_one_sample(suffix: str, tmp_path: Path) -> None:
    text = json.dumps({"conversations": TURNS}).encode()
    files = {"d/00.json": text, "d/00.1.jpg": b"one", "d/00.2.PNG": b"two", "d/01.txt": b"?", "d/01.json": text}
    write_tar(tmp_path / f"a.{suffix}", files, "w" if suffix == "tar" else "w:gz")
    assert raw_records(str(tmp_path / f"a.{suffix}")) == [
        RawRecord("a/d/00", f"a.{suffix}:d/00", text, (b"one", b"two")),
        RawRecord("a/d/01", f"a.{suffix}:d/01", text, (), ("*.txt",)),
    ]


def test_tars_repeat_keys_without_harm(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", {"0.json": b"{}", "1.json": b"{}"})
    assert [raw.id for raw in raw_records(str(tmp_path))] == ["a/0", "a/1", "b/0", "b/1"]
    assert [raw.id for raw in raw_records(str(tmp_path), max_samples=3)] == ["a/0", "a/1", "b/0"]


@pytest.mark.parametrize(("suffix", "mode"), [("tar", "w"), ("tar.gz", "w:gz")])
def test_damaged_tar_is_refused(suffix: str, mode: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(97, 101, 50_000, np.uint8).tobytes()  # compresses, but not to nothing
    write_tar(path, {"0.json": b"{}", "0.jpg": noise}, mode)
    whole = path.read_bytes()
    # A plain tar has no checksum of its contents; a compressed one cannot be unpacked beyond the damage.
    path.write_bytes(whole[:3000] if mode == "w" else whole[:3000] + bytes(200) + whole[3200:])
    with pytest.raises(DataError, match=r"a\.tar.*: the tar is damaged after '0'"):
        raw_records(str(path))


def test_urls_are_read_like_paths() -> None:
    with fsspec.open("memory://records/a.jsonl", "w") as file:
        file.write(json.dumps(entry("m")))
    assert find_files("memory://records/a.jsonl") == ("jsonl", ["memory:///records/a.jsonl"])
    assert [raw.id for raw in raw_records("memory://records/*.jsonl")] == ["m"]


def test_folders_and_patterns_name_files_below_their_common_folder(tmp_path: Path) -> None:
    for name in ("x/a.jsonl", "y/a.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(entry("i")))
    raws = raw_records(f"{tmp_path}/*/a.jsonl")
    assert sorted((raw.id, raw.source) for raw in raws) == [("i", "x/a.jsonl:1"), ("i#2", "y/a.jsonl:1")]


@pytest.mark.parametrize(
    ("names", "data_path", "message"),
    [
        ([], "gone.json", "does not exist"),
        (["a.csv"], "a.csv", r"'a\.csv' is of no known format; expected files ending in \.json"),
        (["a.csv"], "", "no known format"),
        (["a.json", "b.parquet"], "", "mixes json and parquet"),
        ([], "*.json", "does not exist"),
    ],
)
def test_what_cannot_be_records_is_refused(names: list[str], data_path: str, message: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=message):
        find_files(f"{tmp_path}/{data_path}")


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    prints = []
    for text in ("[]", "[1]", "[]"):
        path.write_text(text)
        prints.append(fingerprint_data("json", [str(path)]))
    assert prints[0] == prints[2] != prints[1]
    write_parquet(tmp_path / "a.parquet", [entry(1)])
    before = fingerprint_data("parquet", [str(tmp_path / "a.parquet")])
    write_parquet(tmp_path / "a.parquet", [entry(1), entry(2)])
    assert fingerprint_data("parquet", [str(tmp_path / "a.parquet")]) != before


def test_chunks_are_of_their_kind(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([entry(1)]))
    write_parquet(tmp_path / "a.parquet", [entry(1)])
    write_tar(tmp_path / "a.tar", {"0.json": b"{}"})
    kinds = {"json": TextChunk, "parquet": ParquetChunk, "tar": TarChunk}
    for suffix, kind in kinds.items():
        assert all(isinstance(c, kind) for c in make_chunks(suffix, [str(tmp_path / f"a.{suffix}")], 9, None))

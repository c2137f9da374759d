"""Files as people have them, whole and damaged: read, refused in one line, or read but for one record."""

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_record_keys import PNG

from llava_ray.data import json_files
from llava_ray.data.chunks import make_chunks
from llava_ray.data.ordered_records import read_records
from llava_ray.data.parquet_files import parquet_layout
from llava_ray.data.records import Fault, RawRecord, find_files
from llava_ray.data.validation import validate
from llava_ray.errors import DataError, RecordError

ATTACK = Path(__file__).parents[2] / "attack"
TURNS = [{"from": "human", "value": "<image>\nwhat colour?"}, {"from": "gpt", "value": "red"}]
RECORD = {"id": "1", "image": "plain.png", "conversations": TURNS}
LINE = json.dumps(RECORD)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "plain.png").write_bytes(PNG)
    return tmp_path


def raws_of(path: Path) -> list[RawRecord]:
    kind, files = find_files(str(path))
    raws = [raw for chunk in make_chunks(kind, files, 100, None, mixed=False) for raw in chunk.read()]
    assert [(raw.id, raw.source) for raw in read_records(str(path))] == [(raw.id, raw.source) for raw in raws]
    return raws


def outcomes_of(path: Path) -> list[str]:
    outcomes = []
    for raw in raws_of(path):
        try:
            validate(raw, str(path.parent), max_pixels=10_000)
        except RecordError as error:
            str(error).encode()
            outcomes.append(error.reason)
        else:
            outcomes.append("read")
    return outcomes


READ = {
    "bom.json": b"\xef\xbb\xbf" + json.dumps([RECORD]).encode(),
    "utf16.json": json.dumps([RECORD]).encode("utf-16"),
    "utf16.jsonl": (LINE + "\n" + LINE).encode("utf-16"),
    "utf32.json": json.dumps([RECORD]).encode("utf-32"),
    "crlf.jsonl": f"{LINE}\r\n{LINE}\r\n".encode(),
    "lines.json": f"{LINE}\n{LINE}\n".encode(),
    "pretty.json": json.dumps(RECORD, indent=2).encode(),
    "trailing.json": f"[{LINE},]".encode(),
    "z.jsonl.gz": gzip.compress(LINE.encode()),
    "z.json.gz": gzip.compress(f"[{LINE}]".encode()),
    "gzip_in_secret.json": gzip.compress(f"[{LINE}]".encode()),
}


@pytest.mark.parametrize("name", READ)
def test_files_of_other_encodings_are_read(name: str, folder: Path) -> None:
    (folder / name).write_bytes(READ[name])
    assert set(outcomes_of(folder / name)) == {"read"}


REFUSED = {
    "pretty.jsonl": (json.dumps(RECORD, indent=2).encode(), "written over several lines.*Name the file .json"),
    "long.jsonl": (json.dumps({**RECORD, "note": list(range(500))}, indent=2).encode(), "over several lines"),
    "list.jsonl": (f"[{LINE}]".encode(), "begins with a JSON list"),
    "array.jsonl": (f"[\n{LINE},\n{LINE}\n]\n".encode(), "begins with a JSON list"),
    "one.jsonl": (f"[\n{LINE}\n]\n".encode(), "begins with a JSON list"),
    "many.jsonl": (("[\n" + f"{LINE},\n" * 300).encode(), "begins with a JSON list"),
    "empty.jsonl": (b"[]\n\n", "begins with a JSON list"),
    "concat.json": (f"[{LINE}][{LINE}]".encode(), "more text follows the end of its list"),
    "single.json": (str([RECORD]).encode(), "not JSON at character 2"),
    "utf16_bare.json": (f"[{LINE}]".encode("utf-16-le"), "not UTF-8 at character 1"),
    "cut.json.gz": (gzip.compress(f"[{LINE}]".encode())[:-9], "the gzip file is damaged"),
    "broken.jsonl.gz": (gzip.compress(LINE.encode())[:20] + b"\xff" * 40, "the gzip file is damaged"),
    "t.csv": (b"id,image\n1,a.png\n", "no known format"),
    "data.arrow": (b"ARROW1", "to_parquet"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_something_else_are_refused_in_one_line(name: str, folder: Path) -> None:
    content, words = REFUSED[name]
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        raws_of(folder / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "names", [("data-00000-of-00001.arrow", "dataset_info.json", "state.json"), ("dataset_dict.json", "train")]
)
def test_a_folder_of_save_to_disk_says_how_to_write_parquet(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=r"save_to_disk.*to_parquet"):
        find_files(str(tmp_path))


def test_what_programs_leave_beside_data_is_passed_over(folder: Path) -> None:
    (folder / "a.json").write_text(f"[{LINE}]")
    (folder / "._a.json").write_bytes(b"\0\5\x16\7Mac OS X")
    (folder / "dataset_info.json").write_text("{}")
    assert find_files(str(folder)) == ("json", [str(folder / "a.json")])


def odd(**values: Any) -> str:
    return json.dumps({**RECORD, **values})


DEEP = '{"id": ' + "[" * 3000 + "]" * 3000 + "}"
ODD_LINES: dict[str, tuple[bytes, str]] = {
    "deep": (DEEP.encode(), "malformed"),
    "deep with brackets in strings": (DEEP.replace('"id"', '"]}[{\\\\\\""').encode(), "malformed"),
    "digits": (b'{"id": ' + b"9" * 5000 + b"}", "malformed"),
    "bytes": (b'{"id": "\xe9", "conversations": []}', "malformed"),
    "half a pair": (odd(id="\ud800").encode(), "read"),
    "half a pair in the text": (
        odd(image=None, conversations=[{"from": "human", "value": "a\ud800"}, TURNS[1]]).encode(),
        "malformed",
    ),
    "half a pair in a name": (odd(image="\ud800.png").encode(), "image_missing"),
    "NUL in a name": (odd(image="a\0.png").encode(), "image_missing"),
    "long name": (odd(image="x" * 5000).encode(), "image_missing"),
    "nobody's scheme": (odd(image="nosuch://a/b.png").encode(), "image_unreadable"),
    "device": (odd(image="/dev/zero").encode(), "image_missing"),
    "long id": (odd(id="i" * 10_000).encode(), "read"),
    "id of lists": (odd(id=[[1], {"a": 2}]).encode(), "read"),
    "null": (b"null", "malformed"),
    "number": (b"17", "malformed"),
    "string": (b'"a"', "malformed"),
}


@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize("window", [64, 1 << 24])
def test_one_odd_record_leaves_the_others(
    kind: str, window: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "JSON_WINDOW", window)
    lines = [line for name in ODD_LINES for line in (LINE.encode(), ODD_LINES[name][0])]
    separator = b"\n" if kind == "jsonl" else b",\n"
    content = separator.join(lines)
    path = folder / f"data.{kind}"
    path.write_bytes(content if kind == "jsonl" else b"[" + content + b"]")
    assert outcomes_of(path) == [word for name in ODD_LINES for word in ("read", ODD_LINES[name][1])]


@pytest.mark.parametrize("first", ["[]", "[1, 2]", f"[{LINE}]", "[broken", "[[", "\n[]"])
def test_a_first_line_that_is_a_list_is_one_record(first: str, folder: Path) -> None:
    (folder / "a.jsonl").write_text(f"{first}\n{LINE}\n\n{LINE}\n")
    assert outcomes_of(folder / "a.jsonl") == ["malformed", "read", "read"]


def test_a_damaged_first_line_is_one_record(folder: Path) -> None:
    (folder / "a.jsonl").write_text(f"{{broken\n{LINE}\n")
    assert outcomes_of(folder / "a.jsonl") == ["malformed", "read"]


@pytest.mark.parametrize("half", ["\ud800", "\udc80"])
def test_half_a_pair_in_utf_16_is_one_record(half: str, folder: Path) -> None:
    text = f'[{LINE}, {{"id": "{half}"}}, {LINE}]'
    (folder / "a.json").write_bytes(text.encode("utf-16", "surrogatepass"))
    assert outcomes_of(folder / "a.json") == ["read", "malformed", "read"]


def test_a_record_that_never_ends_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "JSON_WINDOW", 64)
    monkeypatch.setattr(json_files, "MAX_RECORD", 5000)
    (folder / "a.json").write_text("[" + '{"id": "' + "x" * 20_000)
    with pytest.raises(DataError, match="5,000 characters long"):
        raws_of(folder / "a.json")
    (folder / "a.jsonl").write_text(f"{LINE}\n" + "x" * 20_000)
    with pytest.raises(DataError, match="line 2 has more than 5,000"):
        raws_of(folder / "a.jsonl")


def write_groups(path: Path, num_groups: int = 3) -> bytes:
    rows = [{"id": f"r{n}", "image": {"bytes": PNG, "path": None}, "conversations": TURNS, "note": n} for n in range(6)]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=2, compression="snappy", use_dictionary=False)
    assert pq.ParquetFile(io.BytesIO(sink.getvalue())).metadata.num_row_groups == num_groups
    path.write_bytes(sink.getvalue())
    return sink.getvalue()


def test_a_damaged_row_group_is_rejected_row_by_row(folder: Path) -> None:
    path = folder / "a.parquet"
    whole = write_groups(path)
    assert outcomes_of(path) == ["read"] * 6
    assert raws_of(path)[0].ignored == ("note",)
    column = pq.ParquetFile(io.BytesIO(whole)).metadata.row_group(1).column(1)  # image.bytes
    start = column.data_page_offset
    path.write_bytes(
        whole[:start] + b"\xff" * column.total_compressed_size + whole[start + column.total_compressed_size :]
    )
    assert outcomes_of(path) == ["read", "read", "unreadable", "unreadable", "read", "read"]
    assert [raw.id for raw in raws_of(path)] == [f"r{number}" for number in range(6)]


def test_a_damaged_column_of_ids_costs_only_names(folder: Path) -> None:
    path = folder / "a.parquet"
    whole = write_groups(path)
    column = pq.ParquetFile(io.BytesIO(whole)).metadata.row_group(0).column(0)
    start = column.data_page_offset
    path.write_bytes(
        whole[:start] + b"\xff" * column.total_compressed_size + whole[start + column.total_compressed_size :]
    )
    assert [raw.id for raw in raws_of(path)] == ["0", "1", "r2", "r3", "r4", "r5"]
    assert outcomes_of(path)[2:] == ["read"] * 4


@pytest.mark.parametrize("column", ["video", "audio", "tools", "jpg", "clip"])
def test_a_column_of_media_is_not_passed_over(column: str, folder: Path) -> None:
    cell = "x" if column == "tools" else {"bytes": b"\0\1", "path": "clip.mp4"} if column == "clip" else b"\0\1"
    turns = [{"from": "human", "value": "what?"}, TURNS[1]]
    rows = [{"conversations": turns, column: cell}, {"conversations": turns, column: None}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    assert outcomes_of(folder / "a.parquet") == ["unsupported", "read"]


def test_more_rows_than_a_file_can_hold_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_groups(folder / "a.parquet")
    monkeypatch.setattr("llava_ray.data.parquet_files.FREE_ROWS", 1)
    monkeypatch.setattr("llava_ray.data.parquet_files.ROWS_PER_BYTE", 0)
    with pytest.raises(DataError, match=r"6 rows in [\d,]+ bytes; the file is damaged"):
        parquet_layout(str(folder / "a.parquet"))


def write_tar(path: Path, files: list[tuple[str, bytes]], **header: Any) -> bytearray:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    path.write_bytes(sink.getvalue())
    return bytearray(sink.getvalue())


TEXT = json.dumps({"conversations": TURNS}).encode()
FILES = [(f"{number}.{suffix}", content) for number in range(3) for suffix, content in (("json", TEXT), ("png", PNG))]


@pytest.mark.parametrize("damage", [b"\xff" * 512, b"\0" * 512, b"\xff" * 4])
def test_a_damaged_header_is_told_and_the_rest_is_read(damage: bytes, folder: Path) -> None:
    path = folder / "a.tar"
    content = write_tar(path, FILES)
    assert outcomes_of(path) == ["read"] * 3
    start = content.index(b"1.json\0")
    content[start : start + len(damage)] = damage
    path.write_bytes(content)
    outcomes = outcomes_of(path)
    assert outcomes[0] == outcomes[-1] == "read"
    assert outcomes.count("read") == 2
    assert "unreadable" in outcomes
    assert any(
        "damaged block(s) after '0'" in raw.values.message for raw in raws_of(path) if isinstance(raw.values, Fault)
    )


def test_a_tar_behind_another_is_read_too(folder: Path) -> None:
    first, second = write_tar(folder / "a.tar", FILES[:2]), write_tar(folder / "a.tar", FILES[2:])
    (folder / "a.tar").write_bytes(first + second + b"\0" * 100)
    assert outcomes_of(folder / "a.tar") == ["read"] * 3


@pytest.mark.parametrize(
    ("files", "outcome", "words"),
    [
        ([*FILES[:2], ("0.mp4", b"x")], "unsupported", ".mp4 beside the record"),
        ([*FILES[:2], ("0.wav", b"x")], "unsupported", ".wav beside"),
        ([FILES[1]], "unreadable", "0 .json files"),
        ([*FILES[:2], FILES[0]], "unreadable", "2 .json files"),
    ],
)
def test_samples_of_tars_that_would_lose_something_are_refused(files, outcome, words, folder: Path) -> None:
    write_tar(folder / "a.tar", files)
    assert outcomes_of(folder / "a.tar") == [outcome]
    [raw] = raws_of(folder / "a.tar")
    assert isinstance(raw.values, Fault)
    assert words in raw.values.message


@pytest.mark.parametrize("path", sorted(ATTACK.glob("rec_*")), ids=lambda path: path.name)
def test_attacks_are_read_or_refused(path: Path) -> None:
    try:
        outcomes = outcomes_of(path)
    except DataError as error:
        assert path.name in str(error)
        assert len(str(error)) < 500
    else:
        assert outcomes


def test_attacks_are_there() -> None:
    assert len(list(ATTACK.glob("rec_*"))) == 7

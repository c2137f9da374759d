"""Raw records to a prepared folder on a real Ray: counted, reused, mended, interrupted and made twice at once."""

import io
import json
import os
import shutil
import signal
import tarfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llava_ray.config.data import DataConfig
from llava_ray.data.preparation import prepare_data
from llava_ray.data.shards import PreparedData, read_shard_rows
from llava_ray.errors import ConfigError, DataError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

NUM_RECORDS = 40


def jpeg(index: int) -> bytes:
    buffer = io.BytesIO()
    values = np.random.default_rng(index).integers(0, 256, (24, 32, 3), np.uint8)
    Image.fromarray(values).save(buffer, "JPEG")
    return buffer.getvalue()


def record(index: int, **changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\nNumber {index}?"}, {"from": "gpt", "value": f"It is {index}."}]
    return {"id": f"r{index}", "image": f"{index}.jpg", "conversations": turns, **changes}


def write_json(folder: Path, records: Sequence[dict[str, Any]]) -> DataConfig:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for index in range(len(records)):
        (folder / "images" / f"{index}.jpg").write_bytes(jpeg(index))
    (folder / "data.json").write_text(json.dumps(records))
    return DataConfig(
        data_path=str(folder / "data.json"),
        image_folder=str(folder / "images"),
        cache_dir=str(folder / "cache"),
        samples_per_shard=8,
    )


def rows_of(prepared: PreparedData) -> list[dict[str, Any]]:
    return [row for shard in prepared.shards for row in read_shard_rows(prepared.path, shard.name, None).to_pylist()]


def rejected_of(prepared: PreparedData) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(prepared.rejected_path).read_text().splitlines()]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return write_json(tmp_path, [record(index) for index in range(NUM_RECORDS)])


def test_every_record_arrives_once_with_its_image(config: DataConfig) -> None:
    prepared = prepare_data(config, show_progress=False)
    assert (prepared.num_samples, prepared.num_rejected, prepared.reused) == (NUM_RECORDS, 0, False)
    assert [shard.num_rows for shard in prepared.shards] == [8] * 5
    by_id = {row["id"]: row for row in rows_of(prepared)}
    assert len(by_id) == NUM_RECORDS
    for index in range(NUM_RECORDS):
        row = by_id[f"r{index}"]
        assert row["images"] == [jpeg(index)]
        assert (row["widths"], row["heights"], row["source"]) == ([32], [24], f"data.json:{index}")
        assert row["turns"][1] == {"role": "gpt", "value": f"It is {index}."}
    assert rejected_of(prepared) == []


def test_second_time_it_is_reused_and_says_so(config: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    first = prepare_data(config, show_progress=False)
    second = prepare_data(config)
    assert second == first and second.reused
    assert f"reused: {NUM_RECORDS} samples in {first.path}" in capsys.readouterr().out
    assert prepare_data(config.replaced({"samples_per_shard": 9}), show_progress=False).path != first.path


def test_data_hash_does_not_depend_on_the_place(tmp_path: Path) -> None:
    records = [record(index) for index in range(10)]
    hashes = {prepare_data(write_json(tmp_path / name, records), show_progress=False).data_hash for name in ("a", "b")}
    assert len(hashes) == 1


def test_changed_records_are_prepared_anew(config: DataConfig) -> None:
    first = prepare_data(config, show_progress=False)
    Path(config.data_path).write_text(json.dumps([record(1)]))
    second = prepare_data(config, show_progress=False)
    assert second.path != first.path and second.num_samples == 1


def test_parquet_and_tars_give_the_same_samples(tmp_path: Path) -> None:
    records = [record(index) for index in range(10)]
    rows = [{**entry, "image": {"bytes": jpeg(i), "path": None}} for i, entry in enumerate(records)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet", row_group_size=4)
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        for index, entry in enumerate(records):
            for name, content in [(f"{index}.json", json.dumps(entry).encode()), (f"{index}.jpg", jpeg(index))]:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    for name in ("data.parquet", "data.tar"):
        config = DataConfig(
            data_path=f"file://{tmp_path}/{name}", cache_dir=f"file://{tmp_path}/cache", samples_per_shard=4
        )
        prepared = prepare_data(config, show_progress=False)
        images = [(row["turns"][1]["value"], row["images"]) for row in rows_of(prepared)]
        assert images == [(f"It is {index}.", [jpeg(index)]) for index in range(10)]


def test_relative_paths_hold_for_workers_too_and_in_a_copied_project(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Path(config.data_path).parent
    monkeypatch.chdir(project)
    relative = config.replaced({"data_path": "data.json", "image_folder": "images", "cache_dir": "cache"})
    first = prepare_data(relative, show_progress=False)
    assert first.path.startswith(f"{project}/cache/prepared-")
    assert str(project) not in Path(first.path, "prepared.json").read_text()
    copied = shutil.copytree(project, tmp_path / "copied")
    monkeypatch.chdir(copied)
    for moved in (
        relative,
        config.replaced({"image_folder": str(copied / "images"), "cache_dir": str(copied / "cache")}),
    ):
        again = prepare_data(moved, show_progress=False)
        assert again.reused
        assert again.path == first.path.replace(str(project), str(copied))
    shutil.copytree(project / "images", copied / "other")
    assert not prepare_data(relative.replaced({"image_folder": "other"}), show_progress=False).reused


def test_images_lie_beside_the_records_by_default(config: DataConfig) -> None:
    folder = Path(config.data_path).parent
    (folder / "images" / "data.json").write_text(json.dumps([record(3)]))
    beside = config.replaced({"data_path": str(folder / "images" / "data.json"), "image_folder": None})
    assert prepare_data(beside, show_progress=False).num_samples == 1


def test_bad_rows_are_counted_and_listed(tmp_path: Path) -> None:
    records = [record(index) for index in range(NUM_RECORDS)]
    records[31]["image"] = "gone.jpg"
    records[4]["conversations"] = [{"from": "human", "value": "<image>"}] * 2
    records[17]["conversations"][1]["value"] = ""
    config = write_json(tmp_path, records).replaced({"max_rejected": 0.1})
    cut = tmp_path / "images" / "9.jpg"
    cut.write_bytes(cut.read_bytes()[:400])
    prepared = prepare_data(config, show_progress=False)
    assert prepared.num_samples == NUM_RECORDS - 4
    assert prepared.rejected_reasons == {"alternation": 1, "empty_answer": 1, "image_missing": 1, "image_truncated": 1}
    listed = rejected_of(prepared)
    assert [(row["id"], row["source"], row["reason"]) for row in listed] == [
        ("r4", "data.json:4", "alternation"),
        ("r9", "data.json:9", "image_truncated"),
        ("r17", "data.json:17", "empty_answer"),
        ("r31", "data.json:31", "image_missing"),
    ]
    assert all(row["message"].startswith(f"record {row['id']!r} ({row['source']}): ") for row in listed)


def test_too_many_bad_rows_stop_but_lose_nothing(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "images" / "3.jpg").unlink()
    with pytest.raises(DataError) as caught:
        prepare_data(config, show_progress=False)
    message = str(caught.value)
    assert "1 of 40 records are rejected, more than data.max_rejected = 0.01" in message
    assert "1 image_missing" in message and "record 'r3' (data.json:3)" in message
    (folder,) = (tmp_path / "cache").iterdir()
    assert f"{folder}/rejected.jsonl" in message
    assert not (folder / "prepared.json").exists()
    written = {shard.name: shard.stat().st_mtime_ns for shard in folder.glob("shard-*")}
    assert len(written) == 5

    (tmp_path / "images" / "3.jpg").write_bytes(jpeg(3))
    prepared = prepare_data(config, show_progress=False)
    assert prepared.num_samples == NUM_RECORDS
    again = [shard.name for shard in folder.glob("shard-*") if shard.stat().st_mtime_ns != written[shard.name]]
    assert len(again) == 1  # only the chunk with the missing image


def test_limit_is_judged_again_when_reused(tmp_path: Path) -> None:
    config = write_json(tmp_path, [record(0), record(1, image="gone.jpg")])
    lenient = prepare_data(config.replaced({"max_rejected": 0.5}), show_progress=False)
    with pytest.raises(DataError, match=r"1 of 2 records.*image_missing.*gone\.jpg"):
        prepare_data(config, show_progress=False)
    with pytest.raises(DataError, match="1 of 2 records"):
        prepare_data(config.replaced({"data_path": lenient.path}), show_progress=False)


ASK = {"from": "human", "value": "a"}
ODD = {
    "dead link": ({"image": "{base}/status/403"}, "image_unreadable", "answered 403"),
    "gone": ({"image": "{base}/status/410"}, "image_missing", "answered 410"),
    "page": ({"image": "{base}/page"}, "image_unreadable", "<html>"),
    "missing": ({"image": "gone.jpg"}, "image_missing", "gone.jpg"),
    "base64": ({"image": "iVBORw0KGgo" + "A" * 5000}, "image_unreadable", "base64"),
    "NUL": ({"image": "a\0.jpg"}, "image_missing", "not a valid file name"),
    "video": ({"video": "a.mp4"}, "unsupported", "`video`"),
    "tools": ({"tools": [{"type": "function"}]}, "unsupported", "`tools`"),
    "part": ({"conversations": None, "messages": [{"role": "user", "content": ["?"]}]}, "malformed", "part 1 is str"),
    "tool turn": ({"conversations": [ASK, {"from": "tool", "value": "b"}]}, "alternation", "'tool'"),
    "half a pair": ({"conversations": [ASK, {"from": "gpt", "value": "\ud800"}]}, "malformed", "surrogate"),
}  # fmt: skip
ODD_TEXTS = {
    "bytes": (b'{"id": "\xe9"}', "malformed", "not UTF-8"),
    "deep": (b'{"id": ' + b"[" * 3000 + b"]" * 3000 + b"}", "malformed", "too many nested lists"),
    "digits": (b'{"id": ' + b"9" * 5000 + b"}", "malformed", "5,000 digits"),
}


class Links(BaseHTTPRequestHandler):
    """/status/N answers N, /page a page, anything else image 0."""

    def do_GET(self) -> None:
        status = int(self.path.split("/")[2]) if self.path.startswith("/status/") else 200
        body = b"<html>no</html>" if self.path == "/page" or status >= 400 else jpeg(0)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


def test_each_fault_costs_one_record_of_a_thousand(tmp_path: Path) -> None:
    config = write_json(tmp_path, [record(0)]).replaced({"max_rejected": 0.05, "samples_per_shard": 500})
    with ThreadingHTTPServer(("127.0.0.1", 0), Links) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_address[1]}"
        texts = [json.dumps({"id": name, **record_of(changes, base)}).encode() for name, (changes, *_) in ODD.items()]
        texts += [text for text, *_ in ODD_TEXTS.values()]
        good = [json.dumps(record(0, id=f"r{number}", image="0.jpg")).encode() for number in range(1000 - len(texts))]
        good[7] = json.dumps(record(0, id="r7", image=f"{base}/image", source="web", foo=1)).encode()
        for place, text in enumerate(texts):
            good.insert(50 * place, text)
        Path(config.data_path).write_bytes(b"[" + b",\n".join(good) + b"]")
        prepared = prepare_data(config, show_progress=False)
        server.shutdown()
    expected = {**ODD, **ODD_TEXTS}
    assert (prepared.num_samples, prepared.num_rejected) == (1000 - len(expected), len(expected))
    assert prepared.ignored_keys == {"source": 1, "foo": 1}
    rows = rejected_of(prepared)
    assert [row["source"] for row in rows] == [f"data.json:{50 * place}" for place in range(len(expected))]
    for row, (_, reason, words) in zip(rows, expected.values(), strict=True):
        assert row["reason"] == reason
        assert words in row["message"]
        assert len(row["message"]) < 600
    assert {row["id"] for row in rows_of(prepared)} == {f"r{number}" for number in range(1000 - len(expected))}


def record_of(changes: dict[str, Any], base: str) -> dict[str, Any]:
    """Return a record with its faults."""
    values = {**record(0), **changes}
    if not isinstance(changes.get("image"), str):
        values.pop("image")
        values["conversations"] = changes.get(
            "conversations", [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
        )
    else:
        values["image"] = values["image"].replace("{base}", base)
    return {name: value for name, value in values.items() if name != "id"}


def test_prepared_folder_is_opened_as_it_is(config: DataConfig) -> None:
    prepared = prepare_data(config, show_progress=False)
    opened = prepare_data(config.replaced({"data_path": prepared.path}), show_progress=False)
    assert opened == prepared and opened.reused
    with pytest.raises(ConfigError, match=r"max_samples = 3 cuts raw records.*prepared already, with 40"):
        prepare_data(config.replaced({"data_path": prepared.path, "max_samples": 3}), show_progress=False)


def test_lost_shard_is_made_again(config: DataConfig) -> None:
    prepared = prepare_data(config, show_progress=False)
    (Path(prepared.path) / prepared.shards[2].name).unlink()
    again = prepare_data(config, show_progress=False)
    assert again == prepared and not again.reused


@pytest.mark.parametrize("records", [[], [record(0, image="gone.jpg")]])
def test_nothing_left_is_an_error_at_any_limit(records: list[dict[str, Any]], tmp_path: Path) -> None:
    config = write_json(tmp_path, records).replaced({"max_rejected": 1.0})
    with pytest.raises(DataError, match=r"the data has no records|1 of 1 records are rejected"):
        prepare_data(config, show_progress=False)


def test_unwritable_cache_is_named(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "in_the_way").touch()
    with pytest.raises(DataError, match=r"cannot write '.*/in_the_way/cache/prepared-.*data\.cache_dir"):
        prepare_data(config.replaced({"cache_dir": str(tmp_path / "in_the_way" / "cache")}), show_progress=False)


def test_two_at_once_make_one_whole_folder(config: DataConfig) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: prepare_data(config, show_progress=False), range(2))
    assert first == second
    assert len(rows_of(first)) == NUM_RECORDS
    assert not list(Path(first.path).rglob("*.tmp"))


def reader_of(pipe: Path, *, but: int | None = None) -> int:
    """Wait for another process to read ``pipe``; return its id."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for entry in Path("/proc").glob("[0-9]*/fd/*"):
            process = int(entry.parts[2])
            try:
                if process not in (os.getpid(), but) and entry.readlink() == pipe:
                    return process
            except OSError:
                continue
        time.sleep(0.1)
    raise AssertionError(f"nobody read {pipe}")


def test_killed_worker_costs_nothing(config: DataConfig, tmp_path: Path) -> None:
    whole = prepare_data(config.replaced({"cache_dir": str(tmp_path / "undisturbed")}), show_progress=False)
    pipe = tmp_path / "images" / "5.jpg"
    pipe.unlink()
    os.mkfifo(pipe)  # holds the task that reads it until it is fed
    results: list[PreparedData] = []
    preparing = threading.Thread(target=lambda: results.append(prepare_data(config, show_progress=False)))
    feed = os.open(pipe, os.O_RDWR)
    preparing.start()
    killed = reader_of(pipe)
    os.kill(killed, signal.SIGKILL)
    reader_of(pipe, but=killed)
    os.write(feed, jpeg(5))
    os.close(feed)
    preparing.join(timeout=120)
    assert results and results[0].data_hash == whole.data_hash

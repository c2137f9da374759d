"""Dry runs count and measure what training takes, and no file ends them."""

import json
from pathlib import Path
from typing import Any

import pytest

from llava_ray.data.first_look import count_samples, measure_first_samples

IMAGE_RECORD = {
    "image": "a.jpg",
    "conversations": [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Yo"}],
}
RECORD = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}
LINE = json.dumps(RECORD)
LENGTH = (8, 0)
ODD: list[dict[str, Any]] = [{"image": 5}, {"conversations": 5}, {"conversations": [5]}]
SEPARATORS = {"conversations": [{"from": "human", "value": "a\u2028b\u2029c\x85"}, {"from": "gpt", "value": "d"}]}

FILES: dict[str, tuple[bytes, int | None, list[tuple[int, int]]]] = {
    "plain.json": (json.dumps([RECORD, IMAGE_RECORD]).encode(), 2, [LENGTH, (12, 1)]),
    "plain.jsonl": (f"{LINE}\n\n{LINE}\n".encode(), 2, [LENGTH] * 2),
    "upper.JSONL": (f"{LINE}\n".encode(), 1, [LENGTH]),
    "a.ndjson": (f"{LINE}\n".encode(), 1, [LENGTH]),
    "bom.json": (b"\xef\xbb\xbf" + json.dumps([RECORD]).encode(), 1, [LENGTH]),
    "bom.jsonl": (b"\xef\xbb\xbf" + LINE.encode(), 1, [LENGTH]),
    "utf16.json": (json.dumps([RECORD]).encode("utf-16"), 1, [LENGTH]),
    "utf16.jsonl": (f"{LINE}\n{LINE}".encode("utf-16"), 2, [LENGTH] * 2),
    "latin.jsonl": (f'{LINE}\n{{"id": "é"}}\n{LINE}'.encode("latin-1"), 3, [LENGTH] * 2),
    "latin.json": (f'[{LINE}, {{"id": "é"}}]'.encode("latin-1"), 2, [LENGTH]),
    "damaged.jsonl": (f"{LINE}\n{{broken\n{LINE}".encode(), 3, [LENGTH] * 2),
    "empty.jsonl": (b"", 0, []),
    "empty.json": (b"[]", 0, []),
    "nothing.json": (b"", 0, []),
    "object.json": (LINE.encode(), 1, [LENGTH]),
    "number.json": (b"[5, null]", 2, []),
    "cut.json": (f"[{LINE}, {{".encode(), None, [LENGTH]),
    "list.jsonl": (f"[{LINE}]".encode(), None, []),
    "odd.jsonl": ("\n".join(json.dumps(RECORD | odd) for odd in ODD).encode(), 3, []),
    "separators.jsonl": (json.dumps(SEPARATORS, ensure_ascii=False).encode(), 1, [(7, 0)]),
    "bytes.jsonl": (json.dumps({**IMAGE_RECORD, "image": {"bytes": "QUJD", "path": "a"}}).encode(), 1, [(12, 1)]),
    "messages.jsonl": (
        json.dumps({"messages": [
            {"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": "Yo"},
        ]}).encode(), 1, [(12, 1)],
    ),
    "table.parquet": (b"PAR1", None, []),
    "noise.json": (bytes(range(256)), None, []),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_are_counted_and_measured_as_training_reads_them(name: str, tmp_path: Path) -> None:
    content, count, lengths = FILES[name]
    (tmp_path / name).write_bytes(content)
    assert count_samples(str(tmp_path / name)) == count
    assert measure_first_samples(str(tmp_path / name)) == lengths


@pytest.mark.parametrize("path", ["s3://bucket/data.json", "/no/such.json", "."])
def test_what_is_not_here_is_not_looked_at(path: str) -> None:
    assert count_samples(path) is None
    assert measure_first_samples(path) == []


def test_both_dry_runs_say_the_same_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from samples import small_run

    from llava_ray.errors import DataError
    from llava_ray.train.planning.dry_run import count_of_run, steps_of_run, tell_data

    (tmp_path / "a.jsonl").write_text(f"{LINE}\n" * 10)
    (tmp_path / "none.jsonl").write_text("")

    def told(**changed: Any) -> tuple[int | None, str]:
        base = {"data.data_path": str(tmp_path / "a.jsonl"), "train.global_batch_size": 4}
        config = small_run(tmp_path, num_samples=4).replaced(base | changed)
        return steps_of_run(config, count_of_run(config)), " ".join(tell_data(config))

    assert told()[0] == 3
    assert "10 samples Steps 3 of 4" in told()[1]
    assert told(**{"data.max_samples": 5, "train.num_train_epochs": 2})[0] == 4
    assert told(**{"train.max_steps": 2})[0] == 2
    assert "Steps at most 7 of 4" in told(**{"data.data_path": "s3://b/a.json", "train.max_steps": 7})[1]
    with pytest.raises(DataError, match="holds no record"):
        told(**{"data.data_path": str(tmp_path / "none.jsonl")})

"""Flags that are false, media beside a record's images, and parts that name theirs: rejected or obeyed."""

import base64
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llava_ray.data.chunks import make_chunks
from llava_ray.data.records import RawRecord, Record
from llava_ray.data.validation import read_record
from llava_ray.errors import RecordError

ASK, SAY = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}
IMAGE_ASK = {"from": "human", "value": "<image>\nWhat?"}
JPEG = b"\xff\xd8\xff\xe0" + bytes(200)
TEXT = base64.b64encode(JPEG).decode()


def read(values: Any) -> Record:
    return read_record(RawRecord("s7", "data.json:7", values), "/images")


def reason_of(values: Any) -> str | None:
    try:
        read(values)
    except RecordError as error:
        return error.reason
    return None


NOT_LEARNT: list[tuple[str, Any]] = [
    ("trainable", False), ("loss_mask", False), ("LOSS", False), ("training", False), ("learn", False),
    ("calculate_loss", False), ("masked", True), ("masked", 1), ("training", 0), ("supervised", "false"),
    ("is_trainable", False), ("Train", False), ("mask", False), ("learn", 0.5), ("training_detail", [{"train": False}]),
    ("skip", True), ("ignore", "yes"), ("no_train", True), ("kto_tag", False), ("label", False), ("preferred", False),
    ("is_rejected", True), ("desirable", False), ("exclude_from_training", True), ("compute_loss", False),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), NOT_LEARNT)
def test_what_is_not_to_be_learnt_is_refused_wherever_it_says_so(key: str, value: Any) -> None:
    assert reason_of({"conversations": [ASK, SAY], key: value}) == "unsupported"
    assert reason_of({"conversations": [ASK, {**SAY, key: value}]}) == "unsupported"
    part = {"type": "text", "text": "Hi", key: value}
    assert reason_of({"conversations": [{"from": "human", "value": [part]}, SAY]}) == "unsupported"


@pytest.mark.parametrize(("key", "value"), [("weight", False), ("loss", False), ("train", False), ("weight", 0)])
def test_weights_of_whole_records_are_refused_unless_they_say_what_is_done(key: str, value: Any) -> None:
    assert reason_of({"conversations": [ASK, SAY], key: value}) == "unsupported"
    assert reason_of({"conversations": [ASK, SAY], key: not value}) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("masked", False), ("training", True), ("learn", 1), ("supervised", "true"), ("train_on_input", False),
        ("exclude_from_training", False), ("skip", False), ("rejected", False), ("video", False), ("tools", False),
        ("training_stage", 2), ("is_train", True), ("loss_mask", None), ("mask", []), ("loss", [None]),
        ("training", [[]]), ("label", "cat"), ("label", 0),
        ("is_preferred", True), ("has_image", False), ("training_time", 0), ("train_on_prompt", False), ("score", 0),
    ],
)  # fmt: skip
def test_flags_that_say_what_is_done_anyway_change_nothing(key: str, value: Any) -> None:
    assert read({"conversations": [ASK, SAY], key: value}).turns == read({"conversations": [ASK, SAY]}).turns


OTHERS: list[tuple[str, Any]] = [
    ("image2", "b.jpg"), ("image_2", "0001"), ("Images", ["a.jpg", "b.jpg"]), ("IMAGE", "b.jpg"),
    ("img", {"path": "b"}), ("source_video", "a.mp4"), ("source_image", "b.jpg"), ("media", ["b.jpg"]),
    ("media", [{"url": "https://x/b.png"}]),
    ("clip", "a.mp4"), ("pic", "b.jpg"), ("left_image_path", "b.jpg"), ("image_path", ["a.jpg", "b.jpg"]),
    ("image2_path", "b.jpg"), ("path_3", "b.jpg"), ("media", "data:image/png;base64,AA"), ("photo", JPEG),
    ("extra", JPEG), ("extra", TEXT), ("extra", {"image": "b.jpg"}), ("media", [["b.jpg"]]),
    ("second", {"bytes": JPEG}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), OTHERS)
def test_another_medium_beside_the_image_is_refused(key: str, value: Any) -> None:
    assert reason_of({"image": "a.jpg", "conversations": [IMAGE_ASK, SAY], key: value}) == "unsupported"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("media", ["a.jpg"]), ("Images", ["a.jpg"]), ("media", {"path": "train2017/a.jpg"}), ("image_url", "https://x/1.jpg"),
        ("file_name", "000.jpg"), ("coco_url", "http://x/7.jpg"), ("image_base64", TEXT), ("original_image", "z.jpg"),
        ("thumbnail", JPEG), ("hashes", bytes(100)), ("features", bytes(4000)), ("source", "web.jpg"), ("key", "1.jpg"),
        ("img_tokens", [1, 2, 3]), ("question", "what?"), ("dataset", "b.jpg"), ("image_bytes", JPEG), ("pixels", 7),
        ("image_description", "a cat"), ("metadata", {"image": "b.jpg"}),
    ],
)  # fmt: skip
def test_the_same_image_in_another_form_and_where_it_came_from_are_harmless(key: str, value: Any) -> None:
    record = read({"image": "a.jpg", "conversations": [IMAGE_ASK, SAY], key: value})
    assert record.images == ("/images/a.jpg",)
    assert record.ignored == (key,)


ALONE: list[tuple[str, Any]] = [
    ("file_name", "a.jpg"), ("media", {"path": "a.jpg"}), ("clip", "a.mp4"), ("source_image", "a.jpg"),
    ("pic", "a.jpg"), ("media", ["a.jpg"]), ("media", ["data:image/png;base64,AA"]), ("media", [{"path": "a.jpg"}]),
    ("nested", {"url": "https://x/a.png"}), ("media", [JPEG.decode("latin-1") + ".jpg"]), ("file_base64", TEXT),
    ("clips", [[{"path": "a.mp4"}]]),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [*ALONE, *[(key, value) for key, value in NOT_LEARNT if value is not False]])
def test_a_table_refuses_what_json_refuses(key: str, value: Any, tmp_path: Path) -> None:
    values = {"conversations": [ASK, SAY], key: value}
    assert reason_of(values) == "unsupported"
    pq.write_table(pa.Table.from_pylist([values]), tmp_path / "a.parquet")
    [chunk] = make_chunks("parquet", [str(tmp_path / "a.parquet")], 10, None)
    [raw] = chunk.read()
    with pytest.raises(RecordError, match="is not supported, and would be lost") as caught:
        read_record(raw, "/images")
    assert caught.value.reason == "unsupported"


@pytest.mark.parametrize("key", [key for key, value in NOT_LEARNT if value is False])
def test_a_tables_columns_of_flags_are_read(key: str, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"conversations": [ASK, SAY], key: False}]), tmp_path / "a.parquet")
    [chunk] = make_chunks("parquet", [str(tmp_path / "a.parquet")], 10, None)
    with pytest.raises(RecordError, match="is not supported"):
        read_record(next(iter(chunk.read())), "/images")


def with_part(part: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}, SAY], **others}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "path": "a.jpg"}, {"type": "image", "url": "a.jpg"}, {"type": "image_url", "url": "a.jpg"},
        {"type": "image", "path": "a.jpg", "image": "a.jpg", "url": None}, {"type": "image", "url": {"url": "a.jpg"}},
        {"type": "image", "path": "a.jpg", "max_pixels": 50176, "cache_control": {}},
    ],
)  # fmt: skip
def test_an_image_part_may_name_its_image_by_path_or_url(part: dict[str, Any]) -> None:
    assert read(with_part(part)).images == ("/images/a.jpg",)
    assert read(with_part(part, images=["a.jpg"])).images == ("/images/a.jpg",)
    assert reason_of(with_part(part, images=["b.jpg"])) == "malformed"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "base64": TEXT}, {"type": "image", "source": {"type": "base64", "data": TEXT}},
        {"type": "image", "data": TEXT}, {"type": "image", "bytes": TEXT}, {"type": "image", "file_id": "f1"},
        {"type": "image", "blob": "b.jpg"}, {"type": "image", "image_data": "x"}, {"type": "image", "where": "b.jpg"},
        {"type": "text", "text": "Hi", "path": "b.jpg"}, {"type": "image", "other": ["b.jpg"]},
    ],
)  # fmt: skip
def test_a_part_that_holds_its_image_elsewhere_is_refused_by_name(part: dict[str, Any]) -> None:
    assert reason_of(with_part(part, images=["a.jpg"])) == "unsupported"
    assert reason_of(with_part(part)) == "unsupported"


def test_a_part_of_two_images_is_refused() -> None:
    assert reason_of(with_part({"type": "image", "image": "a.jpg", "path": "b.jpg"})) == "malformed"


def test_media_of_a_turn_are_refused() -> None:
    assert reason_of({"image": "a.jpg", "conversations": [{**IMAGE_ASK, "media": ["b.jpg"]}, SAY]}) == "unsupported"

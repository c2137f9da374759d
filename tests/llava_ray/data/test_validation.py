"""What a record may be rejected for, and what the message says."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_images import gif_comment
from PIL import Image

from llava_ray.chat.conversation import Turn
from llava_ray.data.records import RawRecord
from llava_ray.data.validation import Sample, validate
from llava_ray.errors import RecordError

ASK = {"from": "human", "value": "<image>\nWhat is it?"}
SAY = {"from": "gpt", "value": "A cat."}
TEXT = {"from": "human", "value": "Hi"}


def jpeg(width: int = 40, height: int = 30) -> bytes:
    buffer = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(values).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "cat.jpg").write_bytes(jpeg())
    (tmp_path / "cut.jpg").write_bytes(jpeg()[:500])
    (tmp_path / "page.jpg").write_text("<html>")
    (tmp_path / "large.jpg").write_bytes(jpeg(200, 200))
    return str(tmp_path)


def check(values: Any, folder: str = "/nowhere", **others: Any) -> Sample:
    return validate(RawRecord("s7", "data.json:7", values, **others), folder, max_pixels=10_000)


def test_record_with_an_image(folder: str) -> None:
    sample = check({"image": "cat.jpg", "conversations": [ASK, SAY]}, folder)
    assert sample.record.turns == (Turn("human", "<image>\nWhat is it?"), Turn("gpt", "A cat."))
    assert sample.record.images == (jpeg(),)
    assert sample.sizes == ((40, 30),)
    assert (sample.record.id, sample.record.source) == ("s7", "data.json:7")


@pytest.mark.parametrize(
    "image",
    [
        "{}/cat.jpg",
        "file://{}/cat.jpg",
        ["cat.jpg"],
        jpeg(),
        {"bytes": jpeg(), "path": "unused.jpg"},
        {"bytes": None, "path": "cat.jpg"},
    ],
)
@pytest.mark.parametrize("key", ["image", "images"])
def test_images_may_be_given_in_many_ways(key: str, image: Any, folder: str) -> None:
    given = image.format(folder) if isinstance(image, str) else image
    assert check({key: given, "conversations": [ASK, SAY]}, folder).record.images == (jpeg(),)


def test_images_beside_the_record_come_first() -> None:
    values = json.dumps({"image": "elsewhere.jpg", "conversations": [ASK, SAY]}).encode()
    assert check(values, images=(jpeg(),)).record.images == (jpeg(),)


@pytest.mark.parametrize("absent", [{}, {"image": None}, {"image": ""}, {"images": []}])
def test_record_of_text_only(absent: dict[str, Any]) -> None:
    sample = check({"conversations": [TEXT, SAY], **absent})
    assert (sample.record.images, sample.sizes) == ((), ())


def test_several_images_keep_their_order(folder: str) -> None:
    question = {"from": "human", "value": "<image> or <image>?"}
    sample = check({"images": ["cat.jpg", jpeg(16, 8)], "conversations": [question, SAY]}, folder)
    assert sample.sizes == ((40, 30), (16, 8))


def test_messages_in_openais_words(folder: str) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]
    sample = check({"messages": messages, "images": ["cat.jpg"]}, folder)
    assert sample.record.turns == (Turn("human", "<image>\nWhat is it?"), Turn("gpt", "A cat."))


def test_turns_as_json_text() -> None:
    assert len(check({"conversations": json.dumps([TEXT, SAY])}).record.turns) == 2


def test_orientation_decides_width_and_height() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "JPEG", exif=exif)
    assert check({"image": buffer.getvalue(), "conversations": [ASK, SAY]}).sizes == ((30, 40),)


FAULTS = {
    # reason, what the record is, what the message must say besides the record's id and place
    "missing": ("image_missing", {"image": "gone.jpg", "conversations": [ASK, SAY]}, "gone.jpg.*data.image_folder"),
    "cut": ("image_truncated", {"image": "cut.jpg", "conversations": [ASK, SAY]}, "'.*cut.jpg'.*cut off.*fetch"),
    "page": ("image_unreadable", {"image": "page.jpg", "conversations": [ASK, SAY]}, "page.jpg.*<html>.*JPEG"),
    "large": ("image_too_large", {"image": "large.jpg", "conversations": [ASK, SAY]}, "200 x 200.*10,000.*Scale"),
    "cut bytes": ("image_truncated", {"image": jpeg()[:500], "conversations": [ASK, SAY]}, "image 1 of 1"),
    "costly": ("image_too_costly", {"image": gif_comment(), "conversations": [ASK, SAY]}, "image 1 of 1: more than"),
    "no image": ("image_count", {"conversations": [ASK, SAY]}, "1 <image> marker.* 0 image.*Add or remove"),
    "no marker": ("image_count", {"image": "cat.jpg", "conversations": [TEXT, SAY]}, "0 <image> marker.* 1 image"),
    "two for one": ("image_count", {"image": ["cat.jpg", "cat.jpg"], "conversations": [ASK, SAY]}, "1 .* 2 image"),
    "two humans": ("alternation", {"conversations": [TEXT, TEXT, SAY]}, "turn 2 of 3.*expected 'gpt'"),
    "empty answer": ("empty_answer", {"conversations": [TEXT, {"from": "gpt", "value": " "}]}, "empty answer.*Remove"),
    "stranger": ("roles", {"conversations": [{"from": "bob", "value": "Hi"}, SAY]}, "'bob'.*human, user, gpt"),
    "nobody": ("no_turns", {"conversations": []}, "no turn"),
    "no turns": ("no_turns", {"image": "cat.jpg", "text": "A cat."}, "keys are image, text.*expected"),
    "turns of text": ("malformed", {"conversations": "Hi there"}, "not JSON.*list of turns"),
    "turns of dict": ("malformed", {"conversations": {"from": "human"}}, "`conversations` is dict"),
    "number": ("malformed", {"image": 17, "conversations": [ASK, SAY]}, "int.*17.*expected a path"),
    "empty struct": ("malformed", {"image": {"bytes": None, "path": None}, "conversations": [ASK, SAY]}, "NoneType"),
    "no json": ("malformed", b'{"id": 1, oops', "not JSON.*expected one object"),
    "list": ("malformed", b"[1, 2]", "found list; expected an object"),
    "no text": ("malformed", b"", "not JSON"),
    "half a pair": ("malformed", {"conversations": [TEXT, {"from": "gpt", "value": "a\ud83d"}]}, "turn 2.*surrogate"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named_with_its_record(fault: str, folder: str) -> None:
    reason, values, pattern = FAULTS[fault]
    with pytest.raises(RecordError) as caught:
        check(values, folder)
    message = str(caught.value)
    assert caught.value.reason == reason
    assert message.startswith("record 's7' (data.json:7): ")
    assert re.search(pattern, message), message


def test_images_stay_closed_when_the_turns_are_wrong() -> None:
    with pytest.raises(RecordError) as caught:
        check({"image": "gone.jpg", "conversations": [ASK, ASK]})
    assert caught.value.reason == "alternation"

"""What a record may say: obeyed, read past and counted, or refused by name; never left out in silence."""

import base64
import copy
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from fakes import make_tokenizer
from PIL import Image

from llava_ray.chat.conversation import Turn
from llava_ray.chat.templates import find_template
from llava_ray.chat.tokenizer import load_tokenizer
from llava_ray.chat.tokens import tokenize_prompt
from llava_ray.data.examples import Encoder
from llava_ray.data.record_examples import encode_record
from llava_ray.data.record_keys import describe_ignored
from llava_ray.data.records import RawRecord, Record
from llava_ray.data.validation import read_record
from llava_ray.errors import RecordError
from llava_ray.images.tokens import ImageTokens

ASK, SAY = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}
USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
IMAGE_ASK = {"from": "human", "value": "<image>\nWhat?"}


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()
TEXT = base64.b64encode(PNG).decode()


def read(values: Any, **others: Any) -> Record:
    return read_record(RawRecord("s7", "data.json:7", values, **others), "/images")


def refused(values: Any) -> RecordError:
    with pytest.raises(RecordError) as caught:
        read(values)
    assert str(caught.value).startswith("record 's7' (data.json:7): ")
    return caught.value


REFUSED = {
    "video": "clip.mp4", "videos": ["clip.mp4"], "video_path": "clip.mp4", "frames": ["a.jpg"], "audio": "a.wav",
    "audios": ["a.wav"], "speech": "a.wav", "tools": [{"type": "function"}],
    "functions": [{"name": "f"}],
    "tool_calls": [{"id": 1}],
    "function_call": {"name": "f"}, "reasoning": "because",
    "reasoning_content": "because", "thinking": "hm", "cot": "hm",
    "chosen": ASSISTANT, "rejected": ASSISTANT, "rejected_response": "no", "prompt": "Hi", "completion": "x",
    "instruction": "Be", "history": [["a", "b"]], 
    "mask": [0, 1], "loss_mask": [0, 0], "weight": 0.5, "loss": 0,
    "bbox": [1, 2, 3, 4], "objects": {"ref": []}, "prefix": "x", "label": True, "system_message": "Be brief.",
    "documents": ["d"], "pdf": "a.pdf", "attachments": ["x"], "chat_template": "{{ x }}", "image_path": "a.png",
    "jpg": "aGk=", "picture": "a.png", "url": "https://x/cat.jpg", "file_name": "0001.png",
    "note": "data:image/png;base64,AA",
    "toolCalls": [{"name": "f"}], "Video": "clip.mp4",
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_keys_that_would_be_lost_are_refused_by_name(key: str) -> None:
    error = refused({key: REFUSED[key], "conversations": [ASK, SAY]})
    assert error.reason == "unsupported"
    assert f"`{key}` is not supported" in str(error)


@pytest.mark.parametrize("absent", [None, "", [], {}, False, "[]", "null", [None], {"bytes": None, "path": None}])
def test_keys_that_tables_fill_are_absent(absent: Any) -> None:
    record = read({"video": absent, "tools": absent, "image": None, "source": None, "conversations": [ASK, SAY]})
    assert record.ignored == ()


HARMLESS = {
    "source": "web.jpg", "category": "a", "dataset": "d", "license": "CC", "score": 0.5, "width": 3, "height": 4,
    "language": "en", "model": "m", "image_id": 3, "video_id": 4, "metadata": {"video": 1}, "foo": 1, "prompt_id": "a",
    "num_tools": 2, "weight": 1, "label": "cat", "data_source": "x", "image_size": [1, 2],
}  # fmt: skip


def test_other_keys_are_read_past_and_told() -> None:
    record = read({**HARMLESS, "id": 1, "conversations": [{**ASK, "timestamp": 1}, {**SAY, "name": "Bob"}]})
    assert set(record.ignored) == {*HARMLESS, "turns.timestamp", "turns.name"}
    assert describe_ignored({"a": 3, "b": 1200}).endswith("b (1,200), a (3)")
    assert "and 5 others" in describe_ignored({str(number): 1 for number in range(25)})


def test_where_an_image_came_from_is_harmless_beside_it() -> None:
    values = {"image": "a.png", "image_path": "b.png", "url": "https://x/a.png", "conversations": [IMAGE_ASK, SAY]}
    assert read(values).images == ("/images/a.png",)
    assert read(values).ignored == ("image_path", "url")


TURN_KEYS = {
    "tool_calls": [{"id": "1"}], "function_call": {"name": "f"}, "reasoning_content": "hm", "thinking": "hm",
    "prefix": True,
    "refusal": "No.", "audio": {"id": "1"}, "image": "a.png", "images": ["a.png"], "video": "v.mp4", "weight": 0.5,
    "loss": "no", "train": 2, "text": "more", "chosen": "x", "bbox": [1],
}  # fmt: skip


@pytest.mark.parametrize("key", TURN_KEYS)
@pytest.mark.parametrize("turn", [SAY, ASSISTANT])
def test_keys_of_turns_that_would_be_lost_are_refused_by_name(key: str, turn: dict[str, str]) -> None:
    turns = [ASK if turn is SAY else USER, {**turn, key: TURN_KEYS[key]}]
    error = refused({"messages": turns})
    assert error.reason == "unsupported"
    assert f"turn 2: `{key}`" in str(error)


@pytest.mark.parametrize(
    ("values", "reason", "words"),
    [
        (
            {"conversations": [ASK, SAY], "messages": [USER, {**ASSISTANT, "content": "No."}]},
            "malformed",
            "hold different turns",
        ),
        (
            {"image": "a.png", "images": ["b.png"], "conversations": [IMAGE_ASK, SAY]},
            "malformed",
            "`image` and `images`",
        ),
        ({"system": "a", "system_prompt": "b", "conversations": [ASK, SAY]}, "malformed", "two system prompts"),
        ({"system": ["a"], "conversations": [ASK, SAY]}, "malformed", "`system` is list"),
        ({"messages": [{**ASK, "content": "Ho"}, SAY]}, "malformed", "both `content` and `value`"),
        ({"messages": [{**USER, "weight": 1}, ASSISTANT]}, "unsupported", "only answers are supervised"),
        ({"messages": [{"role": "tool", "content": "4"}, ASSISTANT]}, "alternation", "turn 1 of 2 is from 'tool'"),
        ({"conversations": [ASK, {"from": "function_call", "value": "{}"}]}, "unsupported", "no function with a name"),
        ({"conversations": [ASK, {"from": "system", "value": "Be"}, SAY]}, "roles", "turn 2 of 3 is a system turn"),
        (b'{"conversations": [], "conversations": []}', "malformed", "'conversations' occurs twice"),
        (b'{"id": ' + b"9" * 5000 + b"}", "malformed", "a number of 5,000 digits"),
        (b'{"id": ' + b"[" * 5000 + b"]" * 5000 + b"}", "malformed", "too many nested lists"),
        (b'{"id": "\xe9"}', "malformed", "not UTF-8"),
        ({"data": [{"conversations": []}]}, "no_turns", "seem to be under 'data'"),
    ],
)
def test_what_contradicts_itself_is_refused(values: Any, reason: str, words: str) -> None:
    error = refused(values)
    assert error.reason == reason
    assert re.search(words, str(error)), str(error)


PART = {"type": "text", "text": "What?"}
PARTS = {
    "string": (["what?"], "malformed"),
    "null": ([None], "malformed"),
    "number": ([{"type": "text", "text": 5}], "malformed"),
    "list": ([{"type": "text", "text": ["hi"]}], "malformed"),
    "no text": ([{"type": "text"}], "malformed"),
    "nothing": ([{}], "malformed"),
    "video": ([{"type": "video", "video": "v.mp4"}, PART], "unsupported"),
    "video_url": ([{"type": "video_url", "video_url": {"url": "v"}}, PART], "unsupported"),
    "audio": ([{"type": "input_audio", "input_audio": {"data": ""}}, PART], "unsupported"),
    "file": ([{"type": "file", "file": {}}], "unsupported"),
    "tool": ([{"type": "tool_use", "name": "f"}], "unsupported"),
    "refusal": ([{"type": "refusal", "refusal": "No."}], "unsupported"),
    "thinking": ([{"type": "thinking", "thinking": "hm"}, PART], "unsupported"),
    "beside": ([{**PART, "video": "v.mp4"}], "unsupported"),
    "both": ([{**PART, "image_url": {"url": "a.png"}}], "unsupported"),
    "type of a list": ([{"type": ["text"], "text": "a"}], "unsupported"),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_that_would_be_lost_are_refused(case: str) -> None:
    parts, reason = PARTS[case]
    error = refused({"messages": [{"role": "user", "content": parts}, ASSISTANT]})
    assert error.reason == reason
    assert "turn 1, part 1" in str(error)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image", "image": "a.png"},
        {"type": "input_image", "image_url": "a.png", "text": None},
        {"image": "a.png"},
        {"type": "image", "image": {"path": "a.png", "bytes": None}},
    ],
)
def test_images_named_in_parts_are_the_records(part: dict[str, Any]) -> None:
    messages = [{"role": "User", "content": [part, {**PART, "image_url": None, "cache_control": {}}]}, ASSISTANT]
    record = read({"messages": messages, "images": None})
    assert record.images == ("/images/a.png",)
    assert record.turns[0].value == "<image>\nWhat?"


def test_images_named_twice_must_agree() -> None:
    content = [{"type": "image", "image": "a.png"}, PART]
    assert (
        refused({"messages": [{"role": "user", "content": content}, ASSISTANT], "images": ["b.png"]}).reason
        == "malformed"
    )
    one = [{"type": "image", "image": "a.png"}, {"type": "image"}, PART]
    assert refused({"messages": [{"role": "user", "content": one}, ASSISTANT]}).reason == "malformed"


BASE64 = [
    TEXT,
    TEXT[:76] + "\n" + TEXT[76:],
    TEXT.replace("+", "-").replace("/", "_").rstrip("="),
    f"data:image/png;base64,{TEXT}",
    {"bytes": TEXT},
    {"bytes": f" data:;base64,{TEXT}"},
    {"bytes": PNG},
]


@pytest.mark.parametrize("image", BASE64)
def test_images_as_base64_are_decoded(image: Any) -> None:
    assert read({"image": image, "conversations": [IMAGE_ASK, SAY]}).images == (PNG,)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ({"bytes": "%%no"}, "not valid base64"),
        ({"bytes": [137, 80]}, "expected a path"),
        ("data:image/png,abc", "expected data:image/png;base64"),
        ("data:image/png;base64,@@@", "not valid base64"),
        ("iVBORw0KGgo" + "A" * 4002, "not valid base64"),
        (7, "expected a path"),
    ],
)
def test_images_that_are_no_image_are_said_in_a_few_words(image: Any, words: str) -> None:
    error = refused({"image": image, "conversations": [IMAGE_ASK, SAY]})
    assert words in str(error)
    assert len(str(error)) < 500


@pytest.mark.parametrize("role", ["USER", "Human", " user ", "human"])
@pytest.mark.parametrize("answerer", ["Assistant", "GPT", "chatgpt", "model"])
def test_roles_are_read_in_any_case(role: str, answerer: str) -> None:
    turns = [{"from": role, "value": "Hi"}, {"from": answerer, "value": "Hello."}]
    assert read({"conversations": turns}).turns == (Turn("human", "Hi"), Turn("gpt", "Hello."))
    nulls = [{"from": role, "value": "Hi", "role": None, "content": None}, {"role": answerer, "content": "Hello."}]
    assert read({"messages": nulls}).turns == (Turn("human", "Hi"), Turn("gpt", "Hello."))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return load_tokenizer(make_tokenizer(Path(tmp_path_factory.mktemp("tokenizer"))))


def encoder(tokenizer: Any, version: str = "v1", limit: int = 1000, **others: Any) -> Encoder:
    return Encoder(tokenizer, find_template(version), ImageTokens(1, 1), limit, **others)


SPOKEN = {"conversations": [ASK, SAY]}
SYSTEMS = [
    {**SPOKEN, "system": "Be brief."},
    {**SPOKEN, "system_prompt": "Be brief."},
    {**SPOKEN, "system": "Be brief.", "system_prompt": "Be brief."},
    {"conversations": [{"from": "System", "value": "Be brief."}, ASK, SAY]},
    {"messages": [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}, USER, ASSISTANT]},
]


@pytest.mark.parametrize("version", ["v1", "llava_llama_2", "mpt"])
@pytest.mark.parametrize("values", SYSTEMS)
def test_a_system_text_takes_the_place_of_the_templates_as_in_serving(tokenizer, values, version) -> None:
    turns = read(values).turns
    [example] = encoder(tokenizer, version).encode(turns, [])
    served = tokenize_prompt([Turn("human", "Hi")], find_template(version).with_system("Be brief."), tokenizer)
    assert example.input_ids.tolist()[: len(served)] == served
    assert set(example.labels[: len(served)].tolist()) == {-100}
    assert example.num_supervised > 0


def test_a_system_text_stays_when_a_long_sample_is_split(tokenizer) -> None:
    turns = [Turn("system", "Be brief."), *[Turn("human", "Hi " * 20), Turn("gpt", "Hello.")] * 4]
    parts = encoder(tokenizer, limit=120, on_too_long="split").encode(turns, [])
    prefix = tokenize_prompt([Turn("human", "Hi")], find_template("v1").with_system("Be brief."), tokenizer)[:12]
    assert len(parts) > 1
    assert all(part.input_ids.tolist()[:12] == prefix for part in parts)


def test_a_template_without_a_place_for_it_rejects_the_record(tokenizer) -> None:
    with pytest.raises(RecordError) as caught:
        encode_record(
            encoder(tokenizer, "mistral_instruct"), [Turn("system", "Be"), Turn("human", "a"), Turn("gpt", "b")], []
        )
    assert caught.value.reason == "system_prompt"


@pytest.mark.parametrize("version", ["v1", "llava_llama_2", "mpt"])
@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}])
def test_an_answer_of_no_weight_is_read_and_not_learnt(tokenizer, mark, version) -> None:
    turns = [ASK, {**SAY, **mark}, {**ASK, **mark}, {**SAY, "weight": 1}]
    record = read({"conversations": turns})
    assert [turn.supervised for turn in record.turns] == [True, False, False, True]
    assert tuple(Turn.from_row(turn.to_row()) for turn in record.turns) == record.turns
    [example] = encoder(tokenizer, version).encode(record.turns, [])
    [whole] = encoder(tokenizer, version).encode(read({"conversations": [ASK, SAY] * 2}).turns, [])
    assert example.input_ids.tolist() == whole.input_ids.tolist()
    learnt, all_learnt = (example.labels != -100).tolist(), (whole.labels != -100).tolist()
    half = all_learnt.index(True) + sum(all_learnt) // 2
    assert sum(learnt) * 2 == sum(all_learnt)
    assert not any(learnt[:half])


def test_a_tokenizers_own_template_obeys_both(tokenizer) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = find_template("chat_template", tokenizer)
    turns = read({"system": "Be brief.", "conversations": [ASK, {**SAY, "weight": 0}, ASK, SAY]}).turns
    [example] = Encoder(tokenizer, template, ImageTokens(1, 1), 1000).encode(turns, [])
    served = tokenize_prompt(turns[1:4], template.with_system("Be brief."), tokenizer)
    assert example.input_ids.tolist()[: len(served)] == served
    assert set(example.labels[: len(served)].tolist()) == {-100}
    assert example.num_supervised == len([label for label in example.labels[len(served) :] if label != -100]) > 0


@pytest.mark.parametrize(
    ("turns", "words"), [([ASK], "the record has no answer"), ([ASK, {**SAY, "weight": 0}], "none of its 1 answer")]
)
def test_a_record_without_an_answer_is_told_that(tokenizer, turns, words) -> None:
    with pytest.raises(RecordError, match=words) as caught:
        encoder(tokenizer).encode(read({"conversations": turns}).turns, [])
    assert caught.value.reason == "nothing_to_learn"
    assert "model_max_length" not in str(caught.value)


def test_rows_of_ordinary_turns_are_what_they_were() -> None:
    assert Turn("gpt", "a").to_row() == {"role": "gpt", "value": "a"}
    assert json.dumps(Turn("human", "a").to_row()) == '{"role": "human", "value": "a"}'

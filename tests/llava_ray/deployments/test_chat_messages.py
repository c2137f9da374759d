"""From messages to turns: one rule for parts in training and serving, no image but those that were sent."""

import json
import random

import pytest

from llava_ray.chat.conversation import IMAGE_TOKEN
from llava_ray.data.records import RawRecord
from llava_ray.data.validation import read_record
from llava_ray.deployments.http.schema import ChatMessage, ChatRequest, CompletionRequest
from llava_ray.deployments.messages import Task, as_turn, chat_task, completion_task
from llava_ray.deployments.refusal import RefusalError
from llava_ray.deployments.settings import ServeSettings

SETTINGS = ServeSettings.parsed({"model": "m", "max_images": 64})
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def chat(*messages: dict[str, object]) -> Task:
    return chat_task(ChatRequest.model_validate({"model": "m", "messages": messages}), "id", SETTINGS)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([IMAGE, text("What?")], "<image>\nWhat?"),
        ([text("What?"), IMAGE], "What?\n<image>"),
        ([IMAGE, IMAGE, text("Which?")], "<image>\n<image>\nWhich?"),
        ([text("This"), IMAGE, text("or"), IMAGE, text("?")], "This\n<image>\nor\n<image>\n?"),
        ([text("First."), text("Second.")], "First.\nSecond."),
        ([IMAGE], "<image>"),
        ([text("<ima"), text("ge>")], "<ima\nge>"),
        ([text("a <image>"), IMAGE], "a < image >\n<image>"),
    ],
)
def test_each_part_stands_on_a_line_of_its_own(parts: list[dict[str, object]], expected: str) -> None:
    assert as_turn(ChatMessage.model_validate({"role": "user", "content": parts})).value == expected


def test_a_record_and_a_request_with_the_same_parts_are_the_same_text() -> None:
    draw = random.Random(0)
    words = [
        IMAGE,
        text("What?"),
        text(""),
        text("a\n"),
        text("\nb"),
        text(" "),
        text("<ima"),
        text("ge>"),
        text("</s>"),
    ]
    for _ in range(300):
        parts = draw.choices(words, k=draw.randint(1, 6))
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": [text("A"), text("cat.")]}]
        images = tuple(b"x" for part in parts if part is IMAGE)
        record = read_record(RawRecord("r", "r:0", json.dumps({"messages": messages}).encode(), images), "")
        asked = chat(*messages, {"role": "user", "content": "And?"})
        assert asked.turns[:2] == record.turns
        assert sum(turn.value.count(IMAGE_TOKEN) for turn in asked.turns) == len(asked.media) == len(images)


def test_what_looks_like_an_image_is_none_whoever_writes_it() -> None:
    task = chat(
        {"role": "system", "content": "an <image>"},
        {"role": "developer", "content": [text("<ima"), text("ge>")]},
        {"role": "user", "content": [text("see <image>"), IMAGE, text("<<image>image>")]},
        {"role": "assistant", "content": "It is <image>."},
        {"role": "user", "content": "<image>"},
    )
    assert [turn.value.count(IMAGE_TOKEN) for turn in task.turns] == [1, 0, 0]
    assert task.system == "an < image >\n<ima\nge>"


def test_a_prompt_without_a_template_may_write_control_tokens_but_no_image() -> None:
    request = CompletionRequest(model="m", prompt="USER: Hi ASSISTANT: Hello.</s>USER:")
    assert completion_task(request, "id", SETTINGS).prompt == request.prompt
    with pytest.raises(RefusalError, match="images are asked about in"):
        completion_task(CompletionRequest(model="m", prompt="<image>"), "id", SETTINGS)

"""The page's chat and log without a browser."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from pictures import picture

from llava_ray.deployments.chat_page.answers import iterate_until
from llava_ray.deployments.chat_page.chat import (
    AnswerMetrics,
    Parameters,
    chat_request,
    export,
    last_question,
    openai_messages,
    to_user_messages,
)
from llava_ray.deployments.chat_page.log import ConversationLog
from llava_ray.deployments.chat_page.uploads import Uploads
from llava_ray.deployments.http.schema import ChatRequest
from llava_ray.deployments.refusal import RefusalError
from llava_ray.generate.engine import GenerationChunk

PARAMETERS = Parameters("llava", 0.2, 0.7, 64)
DAY = 86_400


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    return Uploads(tmp_path, max_files=4, max_bytes=100_000)


@pytest.fixture
def red(tmp_path: Path) -> str:
    (tmp_path / "red.png").write_bytes(picture())
    return str(tmp_path / "red.png")


def test_a_box_with_images_becomes_one_question(red: str, uploads: Uploads) -> None:
    history = [
        *to_user_messages({"text": " what? ", "files": [red, red]}),
        {"role": "assistant", "content": "a square"},
    ]
    history += to_user_messages({"text": "sure?", "files": []})
    asked, answered, again = openai_messages(history, uploads)
    assert [part["type"] for part in asked["content"]] == ["image_url", "image_url", "text"]
    assert answered == {"role": "assistant", "content": [{"type": "text", "text": "a square"}]}
    request = chat_request(history, PARAMETERS, uploads)
    assert (request.model, request.max_tokens, request.stream, len(request.messages)) == ("llava", 64, True, 3)
    assert again["content"][0]["text"] == "sure?"


def test_what_gradio_normalised_reads_the_same(red: str, uploads: Uploads) -> None:
    plain = to_user_messages({"text": "what?", "files": [red]})
    normal = [
        {"role": "user", "content": [{"type": "file", "file": {"path": red}}]},
        {"role": "user", "content": [{"type": "text", "text": "what?"}]},
    ]
    assert openai_messages(plain, uploads) == openai_messages(normal, uploads)


def test_a_question_that_the_api_would_refuse_is_refused_in_the_same_words(uploads: Uploads) -> None:
    with pytest.raises(RefusalError, match="temperature: Input should be less than or equal to 2"):
        chat_request(to_user_messages({"text": "what?"}), Parameters("llava", 3.0), uploads)


def test_an_image_that_was_deleted_is_asked_for_again(tmp_path: Path, uploads: Uploads) -> None:
    with pytest.raises(RefusalError, match="attach it again"):
        chat_request(to_user_messages({"text": "what?", "files": [str(tmp_path / "gone.png")]}), PARAMETERS, uploads)


def test_an_export_is_a_request_that_can_be_sent(red: str, uploads: Uploads) -> None:
    history = to_user_messages({"text": "what?", "files": [red]})
    assert ChatRequest.model_validate_json(export(history, PARAMETERS, uploads)) == chat_request(
        history, PARAMETERS, uploads
    ).model_copy(update={"stream": False})


@pytest.mark.parametrize(
    ("roles", "begin"), [("", 0), ("u", 0), ("ua", 0), ("uaua", 2), ("uauua", 2), ("uau", 2), ("uuaa", 0)]
)
def test_where_the_last_question_begins(roles: str, begin: int) -> None:
    history = [{"role": {"u": "user", "a": "assistant"}[role], "content": "x"} for role in roles]
    assert last_question(history) == begin


def test_figures_are_said_in_one_line() -> None:
    figures = AnswerMetrics(started=10.0)
    assert str(figures) == ""
    figures.add(
        [
            (0, GenerationChunk("a b", (1, 2), num_prompt_tokens=20)),
            (0, GenerationChunk("c", (3,), finish_reason="length")),
        ]
    )
    figures.first, figures.last = 10.5, 11.5
    assert str(figures) == "20 tokens read, 3 written (max tokens reached) · first after 0.50 s, 2 tokens/s"


def test_a_log_names_images_by_hash_and_keeps_each_once(tmp_path: Path, red: str, uploads: Uploads) -> None:
    log = ConversationLog(tmp_path / "log", days=30, now=lambda: 0.0)
    history = [*to_user_messages({"text": "what?", "files": [red]}), {"role": "assistant", "content": "a square"}]
    log.write("chat", history, PARAMETERS, uploads, "3 tokens")
    log.write("upvote", history, PARAMETERS, uploads)
    lines = (tmp_path / "log" / "1970-01-01-conv.jsonl").read_text().splitlines()
    chat, vote = map(json.loads, lines)
    assert (chat["type"], vote["type"], chat["figures"]) == ("chat", "upvote", "3 tokens")
    [image] = (tmp_path / "log" / "images").iterdir()
    assert chat["messages"][0]["content"] == [{"image": image.name}]
    assert image.read_bytes() == picture()


def test_old_logs_go_and_their_images_with_them(tmp_path: Path, red: str, uploads: Uploads) -> None:
    now = [0.0]
    log = ConversationLog(tmp_path / "log", days=2, now=lambda: now[0])
    log.write("chat", to_user_messages({"text": "old", "files": [red]}), PARAMETERS, uploads)
    (tmp_path / "blue.png").write_bytes(picture(colour="blue"))
    now[0] = 2.0 * DAY
    log.write("chat", to_user_messages({"text": "new", "files": [str(tmp_path / "blue.png")]}), PARAMETERS, uploads)
    assert len(list((tmp_path / "log").glob("*.jsonl"))) == 2
    now[0] = 3.0 * DAY
    log.write("chat", to_user_messages({"text": "newer"}), PARAMETERS, uploads)
    assert sorted(path.name for path in (tmp_path / "log").glob("*.jsonl")) == [
        "1970-01-03-conv.jsonl",
        "1970-01-04-conv.jsonl",
    ]
    assert [path.read_bytes() for path in (tmp_path / "log" / "images").iterdir()] == [picture(colour="blue")]


def test_a_stream_that_is_stopped_is_closed_while_it_waits() -> None:
    closed: list[bool] = []

    async def endless() -> AsyncGenerator[int, None]:
        try:
            yield 1
            await asyncio.sleep(60)
        finally:
            closed.append(True)

    async def run() -> list[int]:
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(0.05, stop.set)
        return [item async for item in iterate_until(endless(), stop)]

    assert (asyncio.run(run()), closed) == ([1], [True])

"""``/v1/responses``: events and conversions by themselves, then over HTTP with OpenAI's own client."""

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pydantic
import pytest
from pictures import picture
from serving import EchoEngine, data_uri, served
from tool_service import PARAMETERS, Service, service

from llava_ray.chat.tool_formats import CallDelta
from llava_ray.deployments.front import build_front
from llava_ray.deployments.gateway import LocalGateway
from llava_ray.deployments.http.responses_api.answer import ResponsesAnswer
from llava_ray.deployments.http.responses_api.conversion import as_chat, rename_fields
from llava_ray.deployments.http.responses_api.events import ResponseWriter
from llava_ray.deployments.http.responses_api.fields import ResponsesRequest
from llava_ray.deployments.http.routes import Front
from llava_ray.deployments.http.schema import read_request
from llava_ray.deployments.refusal import RefusalError, Refused
from llava_ray.deployments.replica import AnswerPiece, Replica
from llava_ray.deployments.settings import ServeSettings
from llava_ray.errors import ModelError
from llava_ray.generate.engine import GenerationChunk, TokenLogprob

TOOL = {"type": "function", "name": "get_weather", "description": "Tell it.", "parameters": PARAMETERS}
IMAGE = {"type": "input_image", "image_url": data_uri(picture(9, 8))}
TEXT_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


def asked(**fields: Any) -> ResponsesRequest:
    return read_request(ResponsesRequest, json.dumps({"model": "echo", "input": "a", **fields}).encode())


def write(*chunks: GenerationChunk, **fields: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All events of an answer, and the last response."""
    writer = ResponseWriter("resp_1", asked(**fields))
    events = writer.begin() + [event for chunk in chunks for event in writer.add(chunk)] + writer.end()
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    json.dumps(events)
    return events, events[-1]["response"]


def test_the_events_of_a_text() -> None:
    events, response = write(
        GenerationChunk("one", (1,), num_prompt_tokens=7, num_cached_tokens=4),
        GenerationChunk(" two", (2,), finish_reason="stop", num_prompt_tokens=7, num_cached_tokens=4),
    )
    assert [event["type"] for event in events] == [*TEXT_EVENTS, "response.completed"]
    [item] = response["output"]
    assert (item["status"], item["content"][0]["text"]) == ("completed", "one two")
    assert response["status"] == "completed"
    assert response["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 9,
    }
    assert events[0]["response"]["output"] == []  # events keep what was true when they were sent
    assert events[2]["item"] == {**item, "status": "in_progress", "content": []}
    assert {event["item_id"] for event in events if "item_id" in event} == {item["id"]}


def test_an_answer_that_is_cut_off_is_incomplete() -> None:
    events, response = write(GenerationChunk("one", (1,), finish_reason="length"))
    assert events[-1]["type"] == "response.incomplete"
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert response["output"][0]["status"] == "incomplete"


def test_an_empty_answer_has_a_message() -> None:
    _, response = write(GenerationChunk("", (), finish_reason="stop"))
    assert response["output"][0]["content"][0]["text"] == ""


def test_text_and_calls_are_items_in_their_order() -> None:
    chunks = [
        GenerationChunk("see: ", (1,)),
        GenerationChunk("", (2,), calls=(CallDelta(0, "f", ""),)),
        GenerationChunk("", (3,), calls=(CallDelta(0, "", '{"a"'), CallDelta(0, "", ": 1}"), CallDelta(1, "g", "{}"))),
        GenerationChunk("done", (4,), finish_reason="tool_calls"),
    ]
    events, response = write(*chunks)
    assert [item["type"] for item in response["output"]] == ["message", "function_call", "function_call", "message"]
    assert [(item["name"], item["arguments"]) for item in response["output"][1:3]] == [("f", '{"a": 1}'), ("g", "{}")]
    assert len({item["call_id"] for item in response["output"][1:3]}) == 2
    assert all(item["status"] == "completed" for item in response["output"])
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds.count("output_item.added") == kinds.count("output_item.done") == 4
    assert kinds.count("function_call_arguments.delta") == 3
    assert kinds.count("function_call_arguments.done") == 2
    open_items = 0
    for kind in kinds:
        open_items += {"output_item.added": 1, "output_item.done": -1}.get(kind, 0)
        assert open_items in (0, 1)


def test_a_whole_response_is_that_of_the_stream() -> None:
    chunks = [GenerationChunk("a", (1,)), GenerationChunk("", (2,), calls=(CallDelta(0, "f", "{}"),))]
    chunks.append(GenerationChunk("b", (3,), finish_reason="tool_calls"))

    async def pieces() -> AsyncGenerator[list[AnswerPiece], None]:
        for chunk in chunks:
            yield [(0, chunk)]

    async def read() -> Any:
        return (await ResponsesAnswer(pieces(), ResponseWriter("resp_1", asked()), lambda status: None).read()).body

    _, streamed = write(*chunks)
    whole = json.loads(asyncio.run(read()))
    assert [item["type"] for item in whole["output"]] == [item["type"] for item in streamed["output"]]
    assert whole.keys() == streamed.keys()


def test_log_probabilities_wait_for_their_text() -> None:
    token = TokenLogprob(1, "x", -0.5, ((1, "x", -0.5),))
    chunks = [GenerationChunk("", (1,), (token,)), GenerationChunk("é", (2,), (token,))]
    chunks.append(GenerationChunk("", (3,), (token,), "stop"))
    events, response = write(*chunks, include=["message.output_text.logprobs"], top_logprobs=1)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [len(event["logprobs"]) for event in deltas] == [2]
    assert len(response["output"][0]["content"][0]["logprobs"]) == 3
    _, plain = write(*chunks)
    assert plain["output"][0]["content"][0]["logprobs"] == []


def test_a_failure_ends_what_is_open() -> None:
    writer = ResponseWriter("resp_1", asked())
    events = [*writer.begin(), *writer.add(GenerationChunk("one", (1,))), *writer.fail(Refused(503, "lost", "lost"))]
    assert [event["type"] for event in events[-4:]] == [*TEXT_EVENTS[-3:], "response.failed"]
    assert events[-1]["response"]["error"] == {"code": "server_error", "message": "lost"}
    assert events[-1]["response"]["status"] == "failed"


def test_items_become_the_messages_of_a_chat() -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}", "id": "fc_1"}
    chat = as_chat(
        asked(
            instructions="Be brief.",
            input=[
                {"role": "user", "content": [IMAGE, {"type": "input_text", "text": "this?"}]},
                {
                    "type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
                    "content": [{"type": "output_text", "text": "see", "annotations": [], "logprobs": []}],
                },
                call,
                {**call, "call_id": "c2"},
                {"type": "function_call_output", "call_id": "c2", "output": "2"},
                {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "1"}]},
                {**call, "call_id": "c3"},
                {"type": "function_call_output", "call_id": "c3", "output": "3"},
            ],
            max_output_tokens=5,
            tools=[TOOL],
            tool_choice={"type": "function", "name": "get_weather"},
            store=False,
            metadata={"a": "b"},
        )
    )  # fmt: skip
    assert [message.role for message in chat.messages] == [
        "system", "user", "assistant", "tool", "tool", "assistant", "tool"
    ]  # fmt: skip
    assert [call.id for call in chat.messages[2].tool_calls] == ["c1", "c2"]
    assert chat.max_completion_tokens == 5
    assert chat.choice.name == "get_weather"
    assert json.loads(chat.offered_tools)[0]["function"]["parameters"] == PARAMETERS


@pytest.mark.parametrize(
    ("param", "message", "expected"),
    [
        ("messages", "x", ("input", "x")),
        ("messages.3.content", "messages.3.content: x", ("input", "input: x")),
        ("max_tokens", "max_tokens is 1", ("max_output_tokens", "max_output_tokens is 1")),
        ("response_format.json_schema.schema.a", "response_format.json_schema.schema.a: x",
         ("text.format.schema.a", "text.format.schema.a: x")),
        ("response_format", "x", ("text.format", "x")),
        ("tools.0.function.parameters.not", "x", ("tools.0.parameters.not", "x")),
        ("tool_choice", "x", ("tool_choice", "x")),
        ("model", "x", ("model", "x")),
    ],
)  # fmt: skip
def test_refusals_name_the_fields_of_a_response(param: str, message: str, expected: tuple[str, str]) -> None:
    renamed = rename_fields(Refused(400, message, "c", param))
    assert (renamed.param, renamed.message) == expected


USER = {"role": "user", "content": "a"}
CALLED = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": 3}, "input"),
    ({"input": ["a"]}, "input.0"),
    ({"input": [{"content": "a"}]}, "input.0.role"),
    ({"input": [{"role": "robot", "content": "a"}]}, "input.0.role"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input.0.type"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
    ({"input": [{"type": ["message"], "role": "user"}]}, "input.0.type"),
    ({"input": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "input.0.content.0.type"),
    ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}, "input.0.content.0.type"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}, "input.0.content.0.file_id"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.image_url"),
    ({"input": [{"role": "user", "content": [{**IMAGE, "detail": "huge"}]}]}, "input.0.content.0.detail"),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 3}]}]}, "input.0.content.0.text"),
    ({"input": [USER, USER]}, "input"),
    ({"input": [{"role": "assistant", "content": "a"}]}, "input"),
    ({"input": [USER, CALLED]}, "input"),
    ({"input": [USER, {**CALLED, "arguments": "["}]}, "input.1.arguments"),
    ({"input": [USER, {**CALLED, "name": "a b"}]}, "input.1.name"),
    ({"input": [USER, {"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input"),
    ({"input": [USER, CALLED, {"type": "function_call_output", "output": "x"}]}, "input.2.call_id"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": {"id": "c"}}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"background": True}, "background"),
    ({"store": True}, "store"),
    ({"truncation": "auto"}, "truncation"),
    ({"reasoning": {"effort": "high"}}, "reasoning"),
    ({"include": ["file_search_call.results"]}, "include.0"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": "four"}, "max_output_tokens"),
    ({"max_tokens": 4}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"temperature": 3}, "temperature"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format.name"),
    ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}}, "text.format.name"),
    ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema"),
    ({"text": {"verbosity": "high"}}, "text.verbosity"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.function"),
    ({"tools": [{"type": "function"}]}, "tools.0.name"),
    ({"tools": [TOOL, TOOL]}, "tools.1.name"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "file_search"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "text": {"format": {"type": "json_object"}}}, "text.format"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"instructions": ["a"]}, "instructions"),
    ({"frob": 1}, "frob"),
]


@pytest.fixture(scope="module")
def echo() -> Iterator[Service]:
    with echoing(EchoEngine()) as running:
        yield running


@contextlib.contextmanager
def echoing(engine: EchoEngine, **settings: Any) -> Iterator[Service]:
    made = ServeSettings.parsed({"model": "echo@somewhere", "max_num_seqs": 4, **settings})
    [source] = made.sources
    with served(build_front(Front(LocalGateway({source: Replica(engine, source, made)}), made, ()))) as address:
        yield Service(address)


@pytest.mark.slow
@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda value: str(value)[:70])
def test_bad_requests_are_refused_by_name(echo: Service, fields: dict[str, Any], param: str) -> None:
    response = echo.http.post("/v1/responses", json={"model": "echo", "input": "a", **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param, error


@pytest.mark.slow
def test_the_official_client_asks_about_text_and_images(echo: Service) -> None:
    ask = echo.openai.responses.create
    plain = ask(model="echo", input="hello you", instructions="Be brief.")
    assert (plain.output_text, plain.status, plain.usage.output_tokens) == ("hello you", "completed", 2)
    assert plain.instructions == "Be brief."
    turns: list[Any] = [{"role": "user", "content": [IMAGE, {"type": "input_text", "text": "one two"}]}]
    first = ask(model="echo", input=turns)
    assert first.output_text == "9x8 one two"
    # The answer's items go back as they came.
    again = ask(model="echo", input=[*turns, *first.output, {"role": "user", "content": "and now"}])
    assert again.output_text == "9x8 and now"
    cut = ask(model="echo", input="one two three", max_output_tokens=2)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    with pytest.raises(openai.NotFoundError):
        ask(model="other", input="a")


@pytest.mark.slow
def test_the_official_client_streams(echo: Service) -> None:
    events = list(echo.openai.responses.create(model="echo", input="one two three", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [kind for kind, _ in itertools.groupby(event.type for event in events)]
    assert kinds == [*dict.fromkeys(TEXT_EVENTS), "response.completed"]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == events[-1].response.output_text == "one two three"
    with echo.openai.responses.stream(model="echo", input="one two") as stream:
        assert stream.get_final_response().output_text == "one two"
    raw = echo.http.post("/v1/responses", json={"model": "echo", "input": "a", "stream": True})
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.text.startswith("event: response.created\ndata: {")


class FailsLater(EchoEngine):
    """Fails after the first word."""

    async def words(self, *arguments: Any) -> Any:
        async for chunk in super().words(*arguments):
            yield chunk
            await asyncio.sleep(0.1)  # the first piece is on its way
            raise ModelError("the model broke")


@pytest.mark.slow
def test_a_stream_that_fails_says_so() -> None:
    with echoing(FailsLater()) as running:
        events = list(running.openai.responses.create(model="echo", input="one two", stream=True))
        assert events[-1].type == "response.failed"
        assert events[-1].response.error.code == "server_error"
        assert "the model broke" in events[-1].response.error.message
        with pytest.raises(openai.InternalServerError):
            running.openai.responses.create(model="echo", input="one two")


@pytest.mark.slow
def test_limits_are_those_of_chats() -> None:
    with echoing(EchoEngine(token_s=0.2), max_images=1, max_text_chars=50, max_num_seqs=1, max_queued_requests=0) as it:
        two = [{"role": "user", "content": [IMAGE, IMAGE]}]
        for fields, code in (({"input": two}, "too_many_images"), ({"input": "a" * 60}, "text_too_long")):
            error = it.http.post("/v1/responses", json={"model": "echo", **fields}).json()["error"]
            assert (error["code"], error["param"]) == (code, "input")
        with it.openai.responses.create(model="echo", input="a b c d e", stream=True) as stream:
            next(iter(stream))
            busy = it.http.post("/v1/responses", json={"model": "echo", "input": "a"})
            assert (busy.status_code, busy.headers["retry-after"]) == (429, "2")
        counted = 'route="/v1/responses",status="429"'
        for _ in range(100):  # a response is counted once it has been sent
            if counted in (metrics := it.http.get("/metrics").text):
                break
            time.sleep(0.02)
        assert counted in metrics


class Answer(pydantic.BaseModel):
    """What the client is to parse."""

    colour: Literal["red", "blue"]
    sizes: list[Literal["small", "large"]] = pydantic.Field(max_length=3)


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(tmp_path_factory.mktemp("hermes"), "hermes") as running:
        yield running


@pytest.mark.slow
def test_the_official_client_parses_answers_and_calls(hermes: Service) -> None:
    parsed = hermes.openai.responses.parse(model="tiny", input="which?", text_format=Answer)
    assert isinstance(parsed.output_parsed, Answer)
    with hermes.openai.responses.stream(model="tiny", input="which?", text_format=Answer) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Answer)
    again = [{"role": "user", "content": "which?"}, *parsed.output, {"role": "user", "content": "sure?"}]
    assert hermes.openai.responses.create(model="tiny", input=again, max_output_tokens=2).output  # type: ignore[arg-type]
    any_object = hermes.openai.responses.create(
        model="tiny", input="which?", text={"format": {"type": "json_object"}}, max_output_tokens=300, temperature=0
    )
    assert any_object.output_text.startswith("{")
    tools: list[Any] = [TOOL]
    called = hermes.openai.responses.create(
        model="tiny", input="which?", tools=tools, tool_choice="required", parallel_tool_calls=False
    )
    [call] = called.output
    assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
    jsonschema.validate(json.loads(call.arguments), PARAMETERS)
    streamed = list(
        hermes.openai.responses.create(
            model="tiny", input="which?", tools=tools, tool_choice={"type": "function", "name": "get_weather"},
            parallel_tool_calls=False, stream=True,
        )
    )  # fmt: skip
    arguments = "".join(e.delta for e in streamed if e.type == "response.function_call_arguments.delta")
    [done] = [event for event in streamed if event.type == "response.function_call_arguments.done"]
    assert (done.arguments, streamed[-1].response.output[0].arguments) == (arguments, arguments)
    jsonschema.validate(json.loads(arguments), PARAMETERS)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    told = hermes.openai.responses.create(
        model="tiny", input=[{"role": "user", "content": "which?"}, call, result], tools=tools, max_output_tokens=4
    )
    assert told.status in ("completed", "incomplete")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}}, "text.format.schema.not"),
        ({"tools": [{**TOOL, "parameters": {"type": "object", "not": {}}}], "tool_choice": "required"},
         "tools.0.parameters.not"),
        ({"input": "a " * 3000}, "input"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_do_is_refused_by_name(hermes: Service, fields: dict[str, Any], param: str) -> None:
    response: httpx.Response = hermes.http.post("/v1/responses", json={"model": "tiny", "input": "a", **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param, response.text


def test_a_neutral_request_is_a_chat() -> None:
    with pytest.raises(RefusalError):
        asked(background=True)
    chat = as_chat(asked(background=False, truncation="disabled", reasoning={"effort": None}, service_tier="auto"))
    assert (chat.temperature, chat.top_p, chat.max_completion_tokens) == (1.0, 1.0, None)

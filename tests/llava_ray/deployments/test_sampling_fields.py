"""The fields of sampling and of prompts' ends over HTTP: passed on, refused by name, and what comes back."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from serving import asking
from test_structured_output import Service, service

from llava_ray.deployments.http.answering import join_pieces
from llava_ray.deployments.http.logprob_forms import format_prompt_logprobs
from llava_ray.deployments.http.schema import ChatRequest, CompletionRequest, read_request
from llava_ray.deployments.messages import chat_task, completion_task
from llava_ray.deployments.refusal import RefusalError
from llava_ray.deployments.replica import _generation_request
from llava_ray.deployments.settings import ServeSettings
from llava_ray.generate.engine import GenerationChunk, Sampling
from llava_ray.generate.logprobs import RankedLogprob

SETTINGS = ServeSettings.parsed({"model": "echo@somewhere"})
ASSISTANT = {"role": "assistant", "content": "It is "}
GOOD: dict[str, Any] = {
    "min_p": 0.1,
    "presence_penalty": 2,
    "frequency_penalty": -2.0,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": -100, "0": 2.5},
    "prompt_logprobs": 3,
    "ignore_eos": True,
}


def read_chat(**fields: Any) -> Any:
    return read_request(ChatRequest, json.dumps({**asking("x"), **fields}).encode())


def chat(*messages: dict[str, Any], **fields: Any) -> Any:
    asked = [{"role": "user", "content": "a"}, *messages]
    return chat_task(read_chat(messages=asked, **fields), "r", SETTINGS)


def refused(call: Any, *arguments: Any, **fields: Any) -> dict[str, Any]:
    with pytest.raises(RefusalError) as caught:
        call(*arguments, **fields)
    assert caught.value.refused.status == 400
    return caught.value.refused.body()["error"]


def test_each_field_reaches_the_engine_from_chats_and_completions() -> None:
    raw = {"model": "echo", "prompt": "x", "temperature": 0.5, **GOOD}
    completed = completion_task(read_request(CompletionRequest, json.dumps(raw).encode()), "r", SETTINGS)
    for task in (completed, chat(temperature=0.5, **GOOD)):
        wanted = Sampling(
            max_tokens=SETTINGS.max_tokens,
            temperature=0.5,
            min_p=0.1,
            presence_penalty=2.0,
            frequency_penalty=-2.0,
            repetition_penalty=1.1,
            logit_bias=((5, -100.0), (0, 2.5)),
            prompt_logprobs=3,
            ignore_eos=True,
        )
        assert task.sampling == wanted
        assert _generation_request(task, 0, (), None).sampling == wanted
        assert _generation_request(task, 1, (), None).sampling.prompt_logprobs is None  # the prompt is scored once


def test_the_defaults_change_nothing() -> None:
    neutral = {
        "min_p": 0.0, "presence_penalty": 0, "frequency_penalty": None, "repetition_penalty": 1, "logit_bias": {},
        "prompt_logprobs": None, "continue_final_message": False, "add_generation_prompt": True,
    }  # fmt: skip
    assert chat(**neutral) == chat()
    assert chat().sampling == Sampling(max_tokens=SETTINGS.max_tokens, temperature=1.0)


NUMBERS = ["0.1", True, [], {}, float("nan"), float("inf"), float("-inf"), 10**400, -(10**400)]
WRONG = [
    *(
        ({name: value})
        for name in ("min_p", "presence_penalty", "frequency_penalty")
        for value in [*NUMBERS, 2.1, -2.1]
    ),
    *({"repetition_penalty": value} for value in [*NUMBERS[:7], 0, -1]),
    *({"prompt_logprobs": value} for value in [*NUMBERS, -1, 21, 0.5, 1.0]),
    *({"logit_bias": value} for value in [[], "x", 1, True, [[1, 1]]]),
    *(
        {"logit_bias": {name: 1}}
        for name in ("", "a", "-1", "1.0", " 1", "01", "1_0", "²", "٣", "1" * 1000, "1" * 10, "+1")
    ),
    *({"logit_bias": {"1": 1, "2": value}} for value in [*NUMBERS, 100.1, -101, None]),
    {"logit_bias": {str(token): 1 for token in range(1025)}},
    *(
        {name: value}
        for name in ("continue_final_message", "add_generation_prompt")
        for value in ["true", 1, 0, [], {}]
    ),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: str(wrong)[:40])
def test_wrong_values_are_refused_by_field(wrong: dict[str, Any]) -> None:
    [name] = wrong
    error = refused(read_chat, **wrong)
    assert (error["param"], error["code"]) == (name, "invalid_value")
    assert error["message"].startswith(f"{name}: ")
    assert len(error["message"]) < 300
    if name not in ("continue_final_message", "add_generation_prompt"):
        body = json.dumps({"model": "echo", "prompt": "x", **wrong}).encode()
        assert refused(read_request, CompletionRequest, body)["param"] == name


def test_prompt_logprobs_are_not_streamed() -> None:
    for value in (0, 3):
        assert refused(read_chat, prompt_logprobs=value, stream=True)["param"] == "prompt_logprobs"


def test_a_message_is_continued_or_a_new_one_begun() -> None:
    begun = chat(ASSISTANT, continue_final_message=True)
    both = chat(ASSISTANT, continue_final_message=True, add_generation_prompt=False)
    assert begun.turns == both.turns
    assert begun.continue_final_message
    assert begun.turns[-1].value == "It is "
    asked = _generation_request(begun, 0, (), None)
    assert (asked.continue_final_message, asked.opens_answer) == (True, False)
    closed = chat(ASSISTANT, add_generation_prompt=False)
    assert not _generation_request(closed, 0, (), None).opens_answer
    assert _generation_request(chat(), 0, (), None).opens_answer
    chat(add_generation_prompt=False)  # a question without what comes before its answer
    error = refused(chat, ASSISTANT, continue_final_message=True, add_generation_prompt=True)
    assert error["param"] == "continue_final_message"
    assert "add_generation_prompt" in error["message"]


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [ASSISTANT, {"role": "user", "content": "b"}],
        [{"role": "assistant", "content": "c", "tool_calls": [CALL]}],
        [
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "1", "content": "4"},
        ],
    ],
    ids=["question", "later question", "calls", "result"],
)
def test_only_an_assistants_text_is_continued(messages: list[dict[str, Any]]) -> None:
    error = refused(chat, *messages, continue_final_message=True, tools=[TOOL])
    assert (error["param"], error["code"]) == ("continue_final_message", "message_order")


def test_without_these_fields_the_last_message_is_a_question() -> None:
    assert refused(chat, ASSISTANT)["param"] == "messages"


def test_prompt_logprobs_in_vllms_form() -> None:
    rows = (None, (RankedLogprob(7, "a", -1.5, 2), RankedLogprob(8, "b", float("-inf"), 1)), None)
    assert format_prompt_logprobs(rows) == {
        "prompt_logprobs": [
            None,
            {
                "7": {"logprob": -1.5, "rank": 2, "decoded_token": "a"},
                "8": {"logprob": -9999.0, "rank": 1, "decoded_token": "b"},
            },
            None,
        ]
    }
    assert format_prompt_logprobs(()) == {}
    first, later = GenerationChunk("a", (1,), prompt_logprobs=rows), GenerationChunk("b", (2,))
    assert join_pieces([(0, first), (0, later)])[0][1].prompt_logprobs == rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(tmp_path_factory.mktemp("hermes"), "hermes") as running:
        yield running


@pytest.mark.slow
def test_a_chat_and_its_prompts_scores(tiny: Service) -> None:
    plain = tiny.ask(max_tokens=4, temperature=0).json()
    assert "prompt_logprobs" not in plain
    scored = tiny.ask(max_tokens=4, temperature=0, prompt_logprobs=2, n=2).json()
    assert [choice["message"] for choice in scored["choices"]] == [plain["choices"][0]["message"]] * 2
    rows = scored["prompt_logprobs"]
    assert len(rows) == plain["usage"]["prompt_tokens"]
    assert rows[0] is None
    assert all(2 <= len(row) <= 3 for row in rows[1:])
    for row in rows[1:]:
        assert {frozenset(one) for one in row.values()} == {frozenset(("logprob", "rank", "decoded_token"))}
        assert {1, 2} <= {one["rank"] for one in row.values()}
    raw = {"model": "tiny", "prompt": "is it red?", "max_tokens": 2, "prompt_logprobs": 0, "n": 2}
    completed = tiny.http.post("/v1/completions", json=raw).json()
    assert "prompt_logprobs" not in completed
    for choice in completed["choices"]:
        said = "".join(one["decoded_token"] for row in choice["prompt_logprobs"] if row for one in row.values())
        assert said.endswith("it red?")


@pytest.mark.slow
def test_openais_client_and_vllms_fields(tiny: Service) -> None:
    create = tiny.openai.chat.completions.create
    asked: Any = {**asking("which?"), "model": "tiny", "max_tokens": 6, "temperature": 0.0}
    plain = create(**asked).choices[0].message.content
    banned = {str(token): -100 for token in range(0, 300, 3)}
    other = create(**asked, logit_bias=banned, presence_penalty=1.0, frequency_penalty=0.5)
    assert other.choices[0].message.content != plain
    again = create(**asked, logit_bias=banned, presence_penalty=1.0, frequency_penalty=0.5, stream=True)
    streamed = "".join(event.choices[0].delta.content or "" for event in again)
    assert streamed == other.choices[0].message.content
    never = create(**asked, extra_body={"ignore_eos": True, "min_p": 0.1, "repetition_penalty": 1.2})
    assert (never.choices[0].finish_reason, never.usage.completion_tokens) == ("length", 6)
    with pytest.raises(openai.BadRequestError, match="logit_bias names tokens") as caught:
        create(**asked, logit_bias={"99999999": 1})
    assert caught.value.param == "logit_bias"


@pytest.mark.slow
def test_a_message_is_continued_over_http(tiny: Service) -> None:
    messages = [{"role": "user", "content": "which?"}, {"role": "assistant", "content": "The colour is"}]
    fields = {"continue_final_message": True, "add_generation_prompt": False, "max_tokens": 5, "temperature": 0}
    begun = tiny.ask(messages=messages, **fields).json()
    question = tiny.ask(messages=messages[:1], max_tokens=5, temperature=0).json()
    assert begun["usage"]["prompt_tokens"] > question["usage"]["prompt_tokens"]
    held = tiny.ask(messages=messages, **fields, guided_choice=[" red"]).json()
    assert held["choices"][0]["message"]["content"] == " red"
    refused_one = tiny.ask(messages=messages[:1], **fields)
    assert (refused_one.status_code, refused_one.json()["error"]["param"]) == (400, "continue_final_message")


@pytest.mark.slow
def test_mixed_requests_at_once_are_each_as_alone(tiny: Service) -> None:
    kinds: list[dict[str, Any]] = [
        {}, {"repetition_penalty": 1.3}, {"logit_bias": {"40": 60}}, {"guided_choice": ["red", "blue"]},
        {"prompt_logprobs": 1}, {"frequency_penalty": 2.0}, {"temperature": 1.0, "min_p": 0.2, "seed": 4},
    ]  # fmt: skip
    asked = [{"max_tokens": 8, "temperature": 0, **kind} for kind in kinds]
    alone = [tiny.ask(**one).json()["choices"] for one in asked]

    async def together() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(tiny.ask, **one) for one in asked * 2))

    for response, expected in zip(asyncio.run(together()), alone * 2, strict=True):
        assert response.json()["choices"] == expected

"""Schemas, tools and other constraints over HTTP, with OpenAI's own client, on a tiny random model."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pydantic
import pytest
from serving import asking
from tool_service import PARAMETERS, TIME, WEATHER, Service, service

pytestmark = pytest.mark.slow


class Answer(pydantic.BaseModel):
    """What the client is to parse."""

    colour: Literal["red", "blue"]
    sizes: list[Literal["small", "large"]] = pydantic.Field(max_length=3)
    note: str | None = pydantic.Field(max_length=8)


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(tmp_path_factory.mktemp("hermes"), "hermes") as running:
        yield running


def test_the_openai_client_parses_answers(hermes: Service) -> None:
    for seed in range(3):
        parsed = hermes.openai.chat.completions.parse(
            **{**asking("which?"), "model": "tiny"}, response_format=Answer, seed=seed, temperature=1.0
        )
        [choice] = parsed.choices
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Answer)
    with hermes.openai.chat.completions.stream(
        **{**asking("which?"), "model": "tiny"}, response_format=Answer
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Answer)


def test_all_choices_are_valid_json(hermes: Service) -> None:
    answer = hermes.ask(response_format={"type": "json_object"}, n=3, seed=1, logprobs=True, top_logprobs=2).json()
    for choice in answer["choices"]:
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)
        assert len(choice["logprobs"]["content"]) > 0
    short = hermes.ask(response_format={"type": "json_object"}, max_tokens=1).json()["choices"][0]
    assert short["finish_reason"] == "length"
    assert short["message"]["content"].startswith("{")


@pytest.mark.parametrize(
    ("fields", "holds"),
    [
        ({"guided_regex": r"[a-f]{3}-\d{2}"}, r"[a-f]{3}-\d{2}"),
        ({"structured_outputs": {"regex": "a/b|c"}}, "a/b|c"),
        ({"guided_choice": ["yes it is", "no"]}, "yes it is|no"),
        ({"structured_outputs": {"choice": ["1", "2"]}}, "[12]"),
        ({"guided_grammar": 'root ::= "a" "b"* "."'}, r"ab*\."),
        ({"structured_outputs": {"grammar": 'start: "x" | "y"'}}, "[xy]"),
        ({"guided_json": {"enum": [3, "four"]}}, '3|"four"'),
        ({"guided_json": '{"const": null}'}, "null"),
    ],
    ids=str,
)
def test_the_fields_of_vllm_hold(hermes: Service, fields: dict[str, Any], holds: str) -> None:
    for route, asked in (("chat/completions", asking("which?")), ("completions", {"prompt": "which?"})):
        body = {**asked, "model": "tiny", "temperature": 0.8, "seed": 2, **fields}
        [choice] = hermes.http.post(f"/v1/{route}", json=body).json()["choices"]
        text = choice["text"] if route == "completions" else choice["message"]["content"]
        pattern = {"type": "string", "pattern": f"^(?:{holds})$"}
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(text, pattern)


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}}, "response_format"),
    ({"guided_json": {"type": "string", "frob": 1}}, "guided_json.frob"),
    ({"guided_json": {"properties": {"a": {"uniqueItems": True}}}}, "guided_json.properties.a.uniqueItems"),
    ({"guided_json": {"type": "integer", "minimum": 3, "maximum": 2}}, "guided_json"),
    ({"guided_json": {"$ref": "#"}}, "guided_json"),
    ({"guided_json": {"type": "string", "pattern": "^a$", "minLength": 2}}, "guided_json"),
    ({"guided_json": {"$ref": "https://example.com/x.json"}}, "guided_json"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_json": {"description": "x" * 1_000_000}}, "guided_json"),
    ({"guided_json": {"x-guidance": {"lenient": True}}}, "guided_json.x-guidance"),
    ({"guided_regex": "(a"}, "guided_regex"),
    ({"guided_regex": "(a{1000}){1000}"}, "guided_regex"),
    ({"guided_regex": "(?=a)b"}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": [""]}, "guided_choice.0"),
    ({"guided_grammar": "what"}, "guided_grammar"),
    ({"guided_grammar": 's ::= "a" s'}, "guided_grammar"),
    ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs.structural_tag"),
    (
        {
            "guided_json": {
                "allOf": [
                    {"anyOf": [{"properties": {f"a{i}": {"const": 1}}}, {"properties": {f"b{i}": {"const": 2}}}]}
                    for i in range(12)
                ]
            }
        },
        "guided_json",
    ),
]


@pytest.mark.parametrize(("fields", "param"), HOSTILE, ids=lambda value: str(value)[:60])
def test_what_cannot_be_held_is_refused_by_name(hermes: Service, fields: dict[str, Any], param: str) -> None:
    hermes.ask(guided_choice=["x"])  # the tokenizer's tables are built once
    start = time.process_time()
    response = hermes.ask(**fields)
    assert time.process_time() - start < 1.5
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param), response.text


def call_of(choice: dict[str, Any]) -> tuple[str, Any]:
    [call] = choice["message"]["tool_calls"]
    assert (call["type"], len(call["id"])) == ("function", 9)
    return call["function"]["name"], json.loads(call["function"]["arguments"])


@pytest.mark.parametrize("name", ["hermes", "llama_json", "mistral", "pythonic"])
def test_required_and_named_calls_are_held(name: str, tmp_path: Path) -> None:
    with service(tmp_path, name) as running:
        assert running.http.get("/v1/models/tiny").json()["capabilities"]["tools"] is True
        for choice, seed in (
            ("required", 1),
            ("required", 2),
            ({"type": "function", "function": {"name": "get_weather"}}, 3),
        ):
            asked = {"tools": [WEATHER, TIME], "tool_choice": choice, "parallel_tool_calls": False, "seed": seed}
            [answer] = running.ask(**asked).json()["choices"]
            assert answer["finish_reason"] == "tool_calls", answer
            called, arguments = call_of(answer)
            assert answer["message"]["content"] is None
            jsonschema.validate(arguments, PARAMETERS if called == "get_weather" else {"maxProperties": 0})
            assert called == "get_weather" or choice == "required"
            pieces: dict[int, list[str]] = {}
            for event in running.openai.chat.completions.create(
                **{**asking("which?"), "model": "tiny"}, **asked, stream=True
            ):
                for delta in event.choices[0].delta.tool_calls or ():
                    known = pieces.setdefault(delta.index, ["", "", ""])
                    known[0] += delta.id or ""
                    known[1] += delta.function.name or ""
                    known[2] += delta.function.arguments or ""
            [(call_id, streamed, text)] = pieces.values()
            assert (streamed, json.loads(text), len(call_id)) == (called, arguments, 9)
        history = [
            {"role": "user", "content": "which?"},
            answer["message"],
            {"role": "tool", "tool_call_id": answer["message"]["tool_calls"][0]["id"], "content": "rain"},
        ]
        assert running.ask(messages=history, tools=[WEATHER, TIME], max_tokens=5).status_code == 200


ASKED, CALL = (
    {"role": "user", "content": "a"},
    {"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}},
)
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
BAD_TOOLS: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{}]}, "tools.0.type"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]}, "tools.0.function.parameters"),
    ({"tools": [TIME, TIME]}, "tools.1.function.name"),
    ({"tools": [TIME], "tool_choice": "always"}, "tool_choice"),
    ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TIME], "response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [TIME], "tool_choice": "required", "guided_regex": "a"}, "guided_regex"),
    (
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}],
            "tool_choice": "required",
        },
        "tools.0.function.parameters.not",
    ),
    ({"tools": [{"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}]}, "tools"),
    ({"messages": [ASKED, CALLED]}, "messages"),
    ({"messages": [ASKED, CALLED, ASKED]}, "messages"),
    ({"messages": [ASKED, CALLED, {"role": "tool", "content": "x"}]}, "messages.2.tool_call_id"),
    ({"messages": [ASKED, CALLED, {"role": "tool", "content": "x", "tool_call_id": "2"}]}, "messages"),
    ({"messages": [ASKED, {"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages"),
    ({"messages": [{**ASKED, "tool_calls": [CALL]}]}, "messages.0.tool_calls"),
    ({"messages": [{**ASKED, "tool_call_id": "1"}]}, "messages.0.tool_call_id"),
    (
        {"messages": [ASKED, {**CALLED, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "["}}]}]},
        "messages.1.tool_calls.0.function.arguments",
    ),
    ({"messages": [ASKED, {**CALLED, "tool_calls": [{"function": CALL["function"]}]}]}, "messages.1.tool_calls.0.id"),
    ({"functions": [{"name": "f"}]}, "functions"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_TOOLS, ids=lambda value: str(value)[:60])
def test_bad_tools_are_refused_by_name(hermes: Service, fields: dict[str, Any], param: str) -> None:
    response = hermes.ask(**fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param, response.text


def test_tools_that_may_be_called_need_not_be(hermes: Service) -> None:
    for fields in (
        {},
        {"tool_choice": "none"},
        {"tool_choice": "auto"},
        {"tool_choice": "none", "guided_choice": ["x"]},
    ):
        [choice] = hermes.ask(tools=[WEATHER], max_tokens=8, **fields).json()["choices"]
        assert choice["finish_reason"] in ("stop", "length")
        assert "tool_calls" not in choice["message"]

"""Requests as clients write them: answers sent back, fields that ask for nothing, faults named, data URIs."""

import base64
import io
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import openai
import pytest
from pictures import picture
from PIL import Image
from serving import EchoEngine, asking, data_uri, served

from llava_ray.deployments.front import build_front
from llava_ray.deployments.gateway import LocalGateway
from llava_ray.deployments.http.routes import Front
from llava_ray.deployments.replica import Replica
from llava_ray.deployments.settings import ServeSettings

pytestmark = pytest.mark.slow


class Service(NamedTuple):
    """Clients of a service, and the engine behind it."""

    http: httpx.Client
    openai: openai.OpenAI
    engine: EchoEngine


@pytest.fixture(scope="module")
def echo() -> Iterator[Service]:
    engine, settings = EchoEngine(), ServeSettings.parsed({"model": "echo@somewhere"})
    [source] = settings.sources
    with served(build_front(Front(LocalGateway({source: Replica(engine, source, settings)}), settings))) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=10)
        yield Service(httpx.Client(base_url=address, timeout=10), client, engine)


def error_of(response: httpx.Response) -> dict[str, object]:
    """The error object of a response, which must be whole."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("dumped", [False, True])
def test_our_own_answer_goes_back_into_the_history(echo: Service, dumped: bool) -> None:
    """As every client does: the message object, or all its fields, nulls included."""
    history: list[Any] = [{"role": "user", "content": "is a circle round?"}]
    first = echo.openai.chat.completions.create(model="echo", messages=history).choices[0].message
    history += [first.model_dump() if dumped else first, {"role": "user", "content": "is it red?"}]
    second = echo.openai.chat.completions.create(model="echo", messages=history)
    assert second.choices[0].message.content == "is it red?"
    assert [turn.value for turn in echo.engine.seen[-1].turns] == [
        "is a circle round?",
        "is a circle round?",
        "is it red?",
    ]


EMPTY_ANSWERS = [
    {"content": ""},
    {"content": None},
    {"content": []},
    {},
    {"content": None, "refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None},
    {"content": None, "tool_calls": [], "reasoning_content": "hm"},
]


@pytest.mark.parametrize("answer", EMPTY_ANSWERS, ids=str)
def test_an_empty_answer_may_stand_in_the_history(echo: Service, answer: dict[str, Any]) -> None:
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", **answer}, {"role": "user", "content": "b"}]
    response = echo.http.post("/v1/chat/completions", json={"model": "echo", "messages": asked})
    assert response.status_code == 200, response.text
    assert [turn.value for turn in echo.engine.seen[-1].turns] == ["a", "", "b"]


def test_a_refusal_is_what_was_said(echo: Service) -> None:
    said = [{"content": None, "refusal": "I will not."}, {"content": [{"type": "refusal", "refusal": "I will not."}]}]
    for answer in said:
        asked = [{"role": "user", "content": "a"}, {"role": "assistant", **answer}, {"role": "user", "content": "b"}]
        assert echo.http.post("/v1/chat/completions", json={"model": "echo", "messages": asked}).status_code == 200
        assert echo.engine.seen[-1].turns[1].value == "I will not."


def test_questions_may_be_empty(echo: Service) -> None:
    for content in ("", [], [{"type": "text", "text": ""}]):
        asked = {"model": "echo", "messages": [{"role": "user", "content": content}]}
        assert echo.http.post("/v1/chat/completions", json=asked).status_code == 200
    parts = asking("", data_uri(picture()))
    assert echo.http.post("/v1/chat/completions", json=parts).json()["choices"][0]["message"]["content"] == "40x30"


# What asks for nothing beside what is done.
NEUTRAL: list[dict[str, Any]] = [
    {"tools": [], "tool_choice": "none", "functions": [], "function_call": "none", "parallel_tool_calls": False},
    {"response_format": {"type": "text"}, "modalities": ["text"], "audio": None, "prediction": None},
    {"logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": False, "top_logprobs": 0},
    {"best_of": 1, "suffix": None, "add_generation_prompt": True, "min_p": 0.0, "repetition_penalty": 1.0, "top_k": -1},
    {"reasoning_effort": None, "verbosity": "medium", "web_search_options": None, "extra_body": {}, "echo": False},
    {"chat_template_kwargs": {}, "skip_special_tokens": True, "stop_token_ids": [], "min_tokens": 0, "documents": []},
    {
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "stop": None,
        "seed": None,
        "n": None,
    },
]


@pytest.mark.parametrize("fields", NEUTRAL, ids=str)
def test_fields_that_ask_for_nothing(echo: Service, fields: dict[str, Any]) -> None:
    assert echo.http.post("/v1/chat/completions", json=asking("x", **fields)).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_effort": "high"},
        {"modalities": ["text", "audio"]},
        {"web_search_options": {}},
        {"best_of": 2},
        {"min_tokens": 1},
        {"length_penalty": True},
        {"response_format": "json"},
        {"tool_choice": "required"},
        {"extra_body": {"top_k": 1}},
        {"chat_template_kwargs": {"x": 1}},
        {"echo": True},
        {"add_special_tokens": True},
        {"guided_decoding_backend": "outlines"},
        {"bad_words": ["x"]},
        {"stop_token_ids": [1]},
    ],
    ids=str,
)
def test_fields_that_would_be_ignored_are_refused_by_name(echo: Service, fields: dict[str, Any]) -> None:
    [name] = fields
    refused = echo.http.post("/v1/chat/completions", json=asking("x", **fields))
    assert refused.status_code == 400
    error = error_of(refused)
    assert error["param"] == name
    assert name in str(error["message"])
    assert len(str(error["message"])) < 200


TEXT = {"type": "text", "text": "what colour?"}
IMAGE = {"type": "image_url", "image_url": {"url": data_uri(picture())}}


def test_what_other_servers_take_beside_a_part(echo: Service) -> None:
    for parts in (
        [{"type": "image_url", "image_url": {**IMAGE["image_url"], "detail": None}}, TEXT],  # type: ignore[dict-item]
        [IMAGE, {**TEXT, "cache_control": {"type": "ephemeral"}}],
        [{**IMAGE, "uuid": "x"}, TEXT],
        [{"type": "image_url", "image_url": data_uri(picture())}, TEXT],
    ):
        asked = {"model": "echo", "messages": [{"role": "user", "content": parts, "name": None}]}
        response = echo.http.post("/v1/chat/completions", json=asked)
        assert response.json()["choices"][0]["message"]["content"] == "40x30 what colour?"


@pytest.mark.parametrize(
    ("parts", "param", "said"),
    [
        ([{"type": "video_url", "video_url": {"url": "x"}}, TEXT], "content.0.type", "expected 'text' or 'image_url'"),
        ([TEXT, {"type": "image", "image": "x"}], "content.1.type", '{"type": "image_url", "image_url"'),
        ([{"type": "input_text", "text": "hi"}], "content.0.type", '{"type": "text", "text"'),
        ([TEXT] * 257, "content", "257 entries; at most 256"),
        (
            [TEXT, {"type": "image_url", "image_url": {"url": "x", "detail": "sharp"}}],
            "content.1.image_url.detail",
            "low",
        ),
        ([TEXT, {"type": "image_url", "image_url": {"url": 3}}], "content.1.image_url.url", "text"),
        ([TEXT, {"type": "image_url", "image_url": {"link": "x"}}], "content.1.image_url.url", "missing"),
        ([TEXT, {"type": "image_url", "image_url": 3}], "content.1.image_url", "object"),
        ([TEXT, {"type": "image_url"}], "content.1.image_url", "missing"),
        ([TEXT, {"type": "image_url", "image_url": None, "uuid": "x"}], "content.1.image_url", "missing"),
        ([TEXT, {"type": "text", "text": 3}], "content.1.text", "text"),
        ([TEXT, {"type": "text"}], "content.1.text", "missing"),
        ([TEXT, {"type": "text", "text": "x", "colour": 3}], "content.1.colour", "leave it out"),
        ([TEXT, {"text": "x"}], "content.1.type", "'text' or 'image_url'"),
        ([TEXT, {"type": ["text"]}], "content.1.type", "'text' or 'image_url'"),
        ([TEXT, "x"], "content.1", "object"),
        (3, "content", "a text, or a list of parts"),
        ({"type": "text", "text": "x"}, "content", "a text, or a list of parts"),
        (None, "content", "missing"),
    ],
    ids=str,
)
def test_a_fault_of_a_part_names_the_part_and_its_field(echo: Service, parts: Any, param: str, said: str) -> None:
    asked = {"model": "echo", "messages": [{"role": "user", "content": parts}]}
    refused = echo.http.post("/v1/chat/completions", json=asked)
    assert refused.status_code == 400
    error = error_of(refused)
    assert error["param"] == f"messages.0.{param}"
    assert said in str(error["message"])
    assert str(error["param"]) in str(error["message"])


def test_other_unions_name_their_field_too(echo: Service) -> None:
    for fields, param in (({"stop": 3}, "stop"), ({"stop": ["a", 3]}, "stop.1"), ({"stop": {}}, "stop")):
        refused = echo.http.post("/v1/chat/completions", json=asking("x", **fields))
        assert error_of(refused)["param"] == param
    for prompt in (3, ["a", "b"], [1, 2], []):
        refused = echo.http.post("/v1/completions", json={"model": "echo", "prompt": prompt})
        assert (refused.status_code, error_of(refused)["param"]) == (400, "prompt")


def noise() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((65, 65), 90).save(file, "PNG")  # of many + and / in base64
    return file.getvalue()


NOISE = noise()
BASE64 = base64.b64encode(NOISE).decode()
PERCENT = BASE64.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")


@pytest.mark.parametrize(
    "place",
    {
        "plain": f"data:image/png;base64,{BASE64}",
        "lines of 76": "data:image/png;base64," + "\n".join(textwrap.wrap(BASE64, 76)),
        "lines of RFC 2045": "data:image/png;base64,\r\n" + "\r\n".join(textwrap.wrap(BASE64, 76)) + "\r\n",
        "spaces": "data:image/png;base64, " + " ".join(textwrap.wrap(BASE64, 60)),
        "no padding": f"data:image/png;base64,{BASE64.rstrip('=')}",
        "url-safe": f"data:image/png;base64,{base64.urlsafe_b64encode(NOISE).decode()}",
        "url-safe, no padding": f"data:image/png;base64,{base64.urlsafe_b64encode(NOISE).decode().rstrip('=')}",
        "percent": f"data:image/png;base64,{PERCENT}",
        "percent, lower case": f"data:image/png;base64,{PERCENT.replace('%2B', '%2b').replace('%2F', '%2f')}",
        "percent, line breaks": "data:image/png;base64," + "%0D%0A".join(textwrap.wrap(BASE64, 76)),
        "every character escaped": "data:image/png;base64," + "".join(f"%{ord(char):02X}" for char in BASE64),
        "no type": f"data:;base64,{BASE64}",
        "nothing but base64": f"data:base64,{BASE64}",
        "parameters": f"data:image/jpg;charset=utf-8;base64,{BASE64}",
        "a quoted comma": f'data:image/png;name="a,b.png";base64,{BASE64}',
        "another type": f"data:text/plain;base64,{BASE64}",
        "upper case": f"DATA:IMAGE/PNG;BASE64,{BASE64}",
        "spaces in the head": f" data: image/png ; base64 ,{BASE64}",
    }.items(),
    ids=lambda item: item[0],
)
def test_data_uris_as_clients_write_them(echo: Service, place: tuple[str, str]) -> None:
    response = echo.http.post("/v1/chat/completions", json=asking("what?", place[1]))
    assert response.status_code == 200, response.text
    assert echo.engine.seen[-1].images == (NOISE,)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("data:image/png;base64,QUJDR????", "'?' at character 6"),
        ("data:image/png;base64,QUJDQ", "cut off: 5 characters"),
        ("data:image/png;base64,QQ==QUJD", "padding (=) before its end at character 3"),
        ("data:image/png;base64,QQ=====", "5 padding characters"),
        ("data:image/png;base64,QUJ%", "without two hexadecimal digits at character 4"),
        ("data:image/png;base64,QUJ%4g", "without two hexadecimal digits at character 4"),
        ("data:image/png;base64,QUJ%C3", "'\\xc3' at character 4"),
        ("data:image/png;base64,QUé", "'\\xe9' at character 3"),
        ("data:image/png,QUJD", "not base64"),
        ("data:image/png;base64", "no comma"),
        ("data:" + "x" * 5000 + ";base64,QUJD", "no comma in its first 1,000"),
    ],
)
def test_a_damaged_data_uri_says_what_is_wrong(echo: Service, place: str, said: str) -> None:
    refused = echo.http.post("/v1/chat/completions", json=asking("what?", place))
    assert (refused.status_code, error_of(refused)["code"]) == (400, "media_data_uri")
    assert said in str(error_of(refused)["message"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ],
    ids=str,
)
def test_engines_that_cannot_restrict_answers_are_not_asked_to(
    echo: Service, fields: dict[str, Any], param: str
) -> None:
    refused = echo.http.post("/v1/chat/completions", json=asking("x", **fields))
    assert (refused.status_code, error_of(refused)["param"]) == (400, param)
    capabilities = echo.http.get("/v1/models/echo").json()["capabilities"]
    assert (capabilities["tools"], capabilities["structured_output"]) == (False, False)

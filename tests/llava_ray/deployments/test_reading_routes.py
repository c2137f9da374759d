"""``/v1/embeddings``, ``/tokenize`` and ``/detokenize`` over HTTP, with OpenAI's own client, on a tiny random model."""

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import openai
import pytest
from pictures import picture
from serving import EchoEngine, asking, data_uri
from test_responses_api import echoing
from test_structured_output import TIME, Service, service

from llava_ray.deployments.http.reading_fields import DetokenizeRequest, EmbeddingsRequest, TokenizeRequest
from llava_ray.deployments.http.reading_tasks import embeddings_task, tokenize_task
from llava_ray.deployments.http.schema import read_request
from llava_ray.deployments.reading import count_places
from llava_ray.deployments.refusal import RefusalError
from llava_ray.deployments.settings import ServeSettings
from llava_ray.generate.engine import ModelCard

IMAGE, OTHER = data_uri(picture(30, 20)), data_uri(picture(30, 20, colour="blue"))
ABOUT_IMAGE = asking("what?", IMAGE)["messages"]
SETTINGS = ServeSettings.parsed({"model": "tiny@somewhere", "max_images": 2, "max_text_chars": 100})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(tmp_path_factory.mktemp("hermes"), "hermes") as running:
        yield running


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "input"),
    ({"input": "a", "messages": ABOUT_IMAGE}, "input"),
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": [[]]}, "input.0"),
    ({"input": ["a", ""]}, "input.1"),
    ({"input": ["a", 1]}, "input.1"),
    ({"input": ["a", ["b"]]}, "input.1"),
    ({"input": [1, "a"]}, "input.1"),
    ({"input": [1, True]}, "input.1"),
    ({"input": [-1]}, "input.0"),
    ({"input": [[1], ["a"]]}, "input.1.0"),
    ({"input": 3}, "input"),
    ({"input": {"text": "a"}}, "input"),
    ({"input": ["a"] * 2049}, "input"),
    ({"input": ["a", "<image>"]}, "input.1"),
    ({"input": "a" * 101}, "input"),
    ({"input": [1] * 101}, "input"),
    ({"input": "a", "dimensions": 8}, "dimensions"),
    ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ({"input": "a", "features": "pixels"}, "features"),
    ({"input": [1], "features": "tower"}, "input"),
    ({"input": [IMAGE] * 3, "features": "tower"}, "input"),
    ({"messages": ABOUT_IMAGE, "features": "tower"}, "messages.0.content.1"),
    ({"messages": ABOUT_IMAGE * 2, "features": "tower"}, "messages"),
    ({"messages": [{"role": "user", "content": []}], "features": "tower"}, "messages.0.content"),
    ({"messages": ABOUT_IMAGE * 2}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "input_text"}]}]}, "messages.0.content.0.type"),
    ({"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ({"input": "a", "frob": 1}, "frob"),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda value: str(value)[:60])
def test_bad_inputs_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RefusalError) as caught:
        read = read_request(EmbeddingsRequest, json.dumps({"model": "tiny", **fields}).encode())
        embeddings_task(read, "r", SETTINGS)
    assert (caught.value.refused.status, caught.value.refused.param) == (400, param)


BAD_PROMPTS: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": "a", "messages": ABOUT_IMAGE}, "prompt"),
    ({"prompt": "a" * 101}, "prompt"),
    ({"prompt": "<image>"}, "prompt"),
    ({"prompt": "a", "tools": [TIME]}, "tools"),
    ({"messages": ABOUT_IMAGE, "add_special_tokens": True}, "add_special_tokens"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"prompt": "a", "return_token_strs": "maybe"}, "return_token_strs"),
    ({"prompt": "a", "max_tokens": 3}, "max_tokens"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_PROMPTS, ids=lambda value: str(value)[:60])
def test_bad_prompts_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RefusalError) as caught:
        tokenize_task(read_request(TokenizeRequest, json.dumps(fields).encode()), "tiny", "r", SETTINGS)
    assert (caught.value.refused.status, caught.value.refused.param) == (400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [({}, "tokens"), ({"tokens": "a"}, "tokens"), ({"tokens": [1.5]}, "tokens.0"), ({"tokens": [True]}, "tokens.0"),
     ({"tokens": [1, 2**40]}, "tokens.1"), ({"tokens": [1], "frob": 1}, "frob")],
)  # fmt: skip
def test_bad_tokens_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RefusalError) as caught:
        read_request(DetokenizeRequest, json.dumps(fields).encode())
    assert caught.value.refused.param == param


def test_a_request_of_many_inputs_takes_few_places() -> None:
    body = json.dumps({"model": "tiny", "input": ["a"] * 50}).encode()
    task = embeddings_task(read_request(EmbeddingsRequest, body), "r", SETTINGS)
    assert (task.num_choices, count_places(task, 32), count_places(task, 2)) == (50, 8, 2)
    assert task.texts[-50:] == ("a",) * 50  # moderation sees them


@pytest.mark.slow
def test_the_official_client_embeds_texts_and_tokens(tiny: Service) -> None:
    texts = [f"a circle {number}" for number in range(40)]
    found = tiny.openai.embeddings.create(model="tiny", input=texts)  # in base64, as the client asks by default
    vectors = np.array([one.embedding for one in found.data])
    assert [one.index for one in found.data] == list(range(40))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    counts = [tiny.http.post("/tokenize", json={"prompt": text}).json() for text in texts[:3]]
    assert found.usage.prompt_tokens == found.usage.total_tokens > sum(one["count"] for one in counts)
    plain = tiny.openai.embeddings.create(
        model="tiny", input=[one["tokens"] for one in counts], encoding_format="float"
    )
    np.testing.assert_allclose([one.embedding for one in plain.data], vectors[:3], atol=1e-5)
    alone = tiny.openai.embeddings.create(model="tiny", input=counts[2]["tokens"], user="somebody")
    np.testing.assert_allclose(alone.data[0].embedding, vectors[2], atol=1e-5)
    raw = tiny.http.post("/v1/embeddings", json={"model": "tiny", "input": texts[0], "encoding_format": "base64"})
    bits = np.frombuffer(base64.b64decode(raw.json()["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(bits, vectors[0], atol=1e-5)
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        tiny.openai.embeddings.create(model="tiny", input="a", dimensions=8)


@pytest.mark.slow
def test_images_and_chats_are_embedded(tiny: Service) -> None:
    def embed(**fields: Any) -> np.ndarray[Any, Any]:
        answer = tiny.http.post("/v1/embeddings", json={"model": "tiny", **fields}).json()
        assert answer["usage"]["prompt_tokens"] > 0
        return np.array([one["embedding"] for one in answer["data"]])

    for features in ("tower", "projector"):
        both = embed(input=[IMAGE, OTHER], features=features)
        images = [{"type": "image_url", "image_url": {"url": place}} for place in (OTHER, IMAGE)]
        swapped = embed(messages=[{"role": "user", "content": images}], features=features)
        np.testing.assert_allclose(both, swapped[::-1], atol=1e-6)
        assert abs(both[0] @ both[1]) < 0.999
    chat = embed(messages=ABOUT_IMAGE)
    assert chat.shape == (1, 32)
    assert abs(chat[0] @ embed(messages=asking("what?", OTHER)["messages"])[0]) < 0.9999


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": [[1], [10**6]]}, "input.1", "token 1 is 1000000"),
        ({"input": [10**6]}, "input", "token 1 is 1000000"),
        ({"input": ["a", "a " * 3000]}, "input.1", "Send less"),
        ({"input": [IMAGE, IMAGE[:-30]], "features": "tower"}, "input.1", "image 2"),
        ({"input": "a", "features": "projector"}, "input", "address"),
        ({"messages": asking("what?", IMAGE[:-30])["messages"]}, "messages", "image 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_the_model_cannot_read_is_refused_by_name(
    tiny: Service, fields: dict[str, Any], param: str, words: str
) -> None:
    response = tiny.http.post("/v1/embeddings", json={"model": "tiny", **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert words in error["message"]


@pytest.mark.slow
def test_tokens_and_texts_in_the_form_of_vllm(tiny: Service) -> None:
    def post(path: str, **fields: Any) -> dict[str, Any]:
        response = tiny.http.post(path, json=fields)
        assert response.status_code == 200, response.text
        return dict(response.json())

    read = post("/tokenize", prompt="a Größe", return_token_strs=True)
    assert set(read) == {"count", "max_model_len", "tokens", "token_strs"}
    assert read["count"] == len(read["tokens"]) == len(read["token_strs"])
    assert read["max_model_len"] == 2048
    bare = post("/tokenize", prompt="a Größe", add_special_tokens=False, model="tiny")
    assert (bare["tokens"], bare["token_strs"]) == (read["tokens"][1:], None)
    assert post("/detokenize", tokens=bare["tokens"]) == {"prompt": "a Größe"}
    assert post("/detokenize", tokens=[]) == {"prompt": ""}
    assert post("/tokenize", prompt="a " * 45_000)["count"] > 2048  # longer than the context
    chat = post("/tokenize", messages=ABOUT_IMAGE)
    usage = tiny.ask(messages=ABOUT_IMAGE, max_tokens=1).json()["usage"]
    assert chat["count"] == usage["prompt_tokens"]
    assert chat["tokens"].count(-200) == 16
    assert post("/tokenize", messages=ABOUT_IMAGE, tools=[TIME])["count"] > chat["count"]
    for tokens in ([-200], [10**6]):
        error = tiny.http.post("/detokenize", json={"tokens": tokens}).json()["error"]
        assert (error["param"], error["code"]) == ("tokens", "tokens")
    assert tiny.http.post("/tokenize", json={"prompt": "a", "model": "other"}).status_code == 404


@pytest.mark.slow
def test_answers_beside_embeddings_stay_as_they_are(tiny: Service) -> None:
    alone = tiny.ask(temperature=0, max_tokens=40, ignore_eos=True).json()
    stopped = threading.Event()

    def embed() -> None:
        while not stopped.is_set():
            tiny.openai.embeddings.create(model="tiny", input=["a b c " * 30] * 10)

    thread = threading.Thread(target=embed)
    thread.start()
    try:
        for _ in range(3):
            beside = tiny.ask(temperature=0, max_tokens=40, ignore_eos=True).json()
            assert beside["choices"] == alone["choices"]
    finally:
        stopped.set()
        thread.join(60)


class OnlyAnswers(EchoEngine):
    """Neither returns features nor reads prompts."""

    read_prompt = read_ids = None  # type: ignore[assignment]

    @property
    def card(self) -> ModelCard:
        return replace(super().card, has_features=False)


@pytest.mark.slow
def test_an_engine_without_features_or_tokens_says_so() -> None:
    with echoing(OnlyAnswers()) as running:
        for path, fields in (("/v1/embeddings", {"input": "a"}), ("/tokenize", {"prompt": "a"})):
            response = running.http.post(path, json={"model": "echo", **fields})
            error = response.json()["error"]
            assert (response.status_code, error["code"], error["param"]) == (400, "engine", "model")

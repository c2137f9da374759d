"""What a judge's reply, or its absence, means: above all, whether it may have been paid."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from scripted_judge import Remote, scripted_judge

from llava_ray.config.review import JudgeConfig
from llava_ray.review.calls import list_judges
from llava_ray.review.headers import Reported
from llava_ray.review.judge import JudgeReply, OpenAIJudge, RequestError, Usage, read_reply

pytestmark = pytest.mark.slow

TEXT = "[Assistant 1]\nA bus.\n\n[End of Assistant 1]\n\n[Assistant 2]\nA dog.\n\n[End of Assistant 2]"


@pytest.fixture(scope="module")
def judge() -> Iterator[Remote]:
    with scripted_judge() as remote:
        yield remote


def ask(base_url: str) -> JudgeReply:
    async def once() -> JudgeReply:
        (spec,) = list_judges(JudgeConfig(model="m", base_url=base_url, timeout_s=1.0))
        client = OpenAIJudge.connect(spec)
        try:
            return await client.ask({"model": "m", "messages": [{"role": "user", "content": TEXT}]})
        finally:
            await client.close()

    return asyncio.run(once())


def test_a_reply(judge: Remote) -> None:
    judge.play(announce=True, requests_per_minute=10)
    reply = ask(judge.base_url)
    assert reply.content.endswith("\nBecause of the words.")
    assert reply.usage == Usage(len(TEXT) // 4, 0, len(reply.content) // 4)
    assert (reply.model, reply.fingerprint, reply.finish_reason) == ("m", "scripted", "stop")
    assert (reply.reported.requests.limit, reply.reported.requests.remaining) == (10, 9)


@pytest.mark.parametrize(
    ("script", "kind", "outcome"),
    [
        ({"status": 429}, "throttled", "refused"),
        ({"quota": 0}, "fatal", "refused"),
        ({"status": 401}, "fatal", "refused"),
        ({"status": 404}, "fatal", "refused"),
        ({"status": 400}, "rejected", "refused"),
        ({"status": 500}, "trouble", "refused"),
        ({"status": 503}, "trouble", "refused"),
        ({"status": 502}, "trouble", "uncertain"),
        ({"status": 504}, "trouble", "uncertain"),
        ({"faults": {"hang": 1}}, "trouble", "uncertain"),
        ({"faults": {"drop": 1}}, "trouble", "uncertain"),
        ({"faults": {"malformed": 1}}, "trouble", "uncertain"),
        ({"faults": {"slow": 1}}, "trouble", "uncertain"),  # each piece comes in time, the whole does not
    ],
)
def test_faults(judge: Remote, script: dict[str, Any], kind: str, outcome: str) -> None:
    judge.play(**script, retry_after=3)
    with pytest.raises(RequestError) as raised:
        ask(judge.base_url)
    assert (raised.value.kind, raised.value.outcome) == (kind, outcome)
    if kind == "throttled":
        assert raised.value.reported.retry_after_s == 3


def test_who_is_not_connected_has_paid_nothing() -> None:
    with pytest.raises(RequestError, match="not connected") as raised:
        ask("http://127.0.0.1:9/v1")
    assert (raised.value.kind, raised.value.outcome) == ("trouble", "refused")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": [1]}}]}']
)
def test_what_is_no_chat_completion_may_have_been_paid(content: bytes) -> None:
    with pytest.raises(RequestError) as raised:
        read_reply(content, Reported())
    assert raised.value.outcome == "uncertain"


def test_a_refusal_is_a_reply_without_scores() -> None:
    reply = read_reply(b'{"choices": [{"message": {"content": null, "refusal": "No."}}], "usage": null}', Reported())
    assert (reply.content, reply.usage) == ("No.", None)

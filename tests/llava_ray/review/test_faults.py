"""What errors of real endpoints mean: whether to go on, whether it is paid, and the setting that helps."""

from typing import Any

import pytest

from llava_ray.config.review import JudgeConfig
from llava_ray.review.calls import list_judges
from llava_ray.review.faults import RequestError, content_fault, error_fault, to_plain_line
from llava_ray.review.headers import Reported
from llava_ray.review.judge import Usage, read_reply, read_usage

(SPEC,) = list_judges(JudgeConfig(model="m", base_url="http://judge/v1", api_key_env="MY_KEY", max_tokens=99))


def fault(status: int, told: str, **body: Any) -> RequestError:
    return error_fault(status, told, body, SPEC, Reported(), f"HTTP {status}: ")


@pytest.mark.parametrize(
    ("status", "told", "body", "kind", "words"),
    [
        (400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", {}, "fatal", "completion"),
        (400, "max_tokens is too large: 99", {"param": "max_tokens"}, "fatal", "lower judge.max_tokens = 99"),
        (400, "Unrecognized request argument: max_completion_tokens", {}, "fatal", 'token_limit_name = "max_tokens"'),
        (422, "temperature: Input should be 1", {}, "fatal", "set judge.temperature = 1"),
        (400, "Unknown parameter: 'seed'.", {"param": "seed"}, "fatal", "leave judge.seed out"),
        (400, "Invalid parameter: 'response_format' of type 'json_schema'", {}, "fatal", 'response_format = "text"'),
        (400, "API key not valid. Please pass a valid API key.", {}, "fatal", "MY_KEY"),
        (401, "No.", {}, "fatal", "MY_KEY"),
        (403, "No.", {}, "fatal", "MY_KEY"),
        (402, "Insufficient Balance", {}, "fatal", "has no credit"),
        (404, "Not Found", {}, "fatal", 'judge.base_url = "http://judge/v1"'),
        (400, "The model `m` does not exist", {"code": "model_not_found"}, "fatal", "judge.model = 'm'"),
        (429, "Quota", {"code": None, "type": "insufficient_quota"}, "fatal", "has no credit"),
        (429, "Slow down", {"code": "rate_limit_exceeded"}, "throttled", ""),
        (400, "This model's maximum context length is 512 tokens", {}, "rejected", ""),
        (400, "x", {"code": "context_length_exceeded", "param": "max_tokens"}, "rejected", ""),
        (400, "Filtered", {"code": "content_filter"}, "rejected", ""),
        (500, "Oops: max_tokens", {}, "trouble", ""),
        (502, "Bad gateway", {}, "trouble", ""),
    ],
)
def test_errors(status: int, told: str, body: dict[str, Any], kind: str, words: str) -> None:
    found = fault(status, told, **body)
    assert (found.kind, found.systematic) == (kind, False)
    assert words in found.reason
    assert found.outcome == ("uncertain" if status == 502 else "refused")


def test_an_error_that_nobody_knows_is_systematic_where_nothing_else_comes() -> None:
    assert (fault(400, "Hm.").kind, fault(400, "Hm.").systematic) == ("rejected", True)


def test_who_asks_to_wait_for_a_day_is_not_waited_for() -> None:
    found = error_fault(429, "Daily limit", {}, SPEC, Reported(retry_after_s=86_400.0), "")
    assert found.kind == "fatal"
    assert "asks to wait 86,400 s" in found.reason


def test_what_a_server_says_is_one_line_that_a_terminal_takes() -> None:
    assert to_plain_line("a\n\tb\x1b[31m\0c") == "a b [31m c"
    assert to_plain_line("<html><head><TITLE>\nSign in</title>") == "a web page (Sign in)"
    assert len(to_plain_line("x" * 10_000)) < 400
    assert len(fault(400, "x" * 10_000).reason) <= 600


@pytest.mark.parametrize(
    ("content", "outcome"),
    [
        (b"<html>", "refused"),
        (b"  \n<!doctype html>", "refused"),
        (b"Not Found", "refused"),
        (b"", "uncertain"),
        (b"{", "uncertain"),
        (b'data: {"choices": []}', "uncertain"),
        (b"\xff\xfe", "refused"),
    ],
)
def test_what_comes_instead_of_a_completion(content: bytes, outcome: str) -> None:
    found = content_fault(content, SPEC, Reported(), "why")
    assert (found.kind, found.outcome, found.systematic) == ("trouble", outcome, True)
    assert 'is judge.base_url = "http://judge/v1" right' in found.reason


@pytest.mark.parametrize("content", [b"[" * 100_000, b"1" * 5000, b'{"choices": [{"message": {"content": [{}]}}]}'])
def test_replies_that_were_made_to_harm_are_faults(content: bytes) -> None:
    with pytest.raises(RequestError):
        read_reply(content, Reported(), SPEC)


def test_an_error_object_with_status_200_is_no_reply() -> None:
    for body, kind in (
        (b'{"error": {"message": "No", "code": 401}}', "fatal"),
        (b'{"error": {"message": "Slow", "code": 429}}', "throttled"),
        (b'{"error": "No"}', "rejected"),
        (b'{"object": "error", "message": "No", "code": 40301}', "rejected"),
    ):
        with pytest.raises(RequestError, match="an error with HTTP 200") as raised:
            read_reply(body, Reported(), SPEC)
        assert (raised.value.kind, raised.value.outcome) == (kind, "refused")


def test_parts_and_halves_of_characters() -> None:
    parts = b'{"choices": [{"message": {"content": [{"type": "thinking"}, {"type": "text", "text": "8 9\\ud800"}]}}]}'
    assert read_reply(parts, Reported(), SPEC).content == "8 9?"


def test_counts_of_tokens_that_are_none_are_not_believed() -> None:
    assert read_usage({"prompt_tokens": 7, "completion_tokens": 3}) == Usage(7, 0, 3)
    for wrong in (-7, True, 1.5, 10**400, None):
        assert read_usage({"prompt_tokens": wrong, "completion_tokens": 3}) is None
    assert read_usage({"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": 9}}) == Usage(7, 7, 0)

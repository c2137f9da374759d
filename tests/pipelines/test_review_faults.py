"""Judges that cannot answer: how soon a review stops, what it says, its exit code, and what it books."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from review_files import flags, write_review_files
from scripted_judge import Remote, scripted_judge

from llava_ray.errors import ConfigError
from llava_ray.review.ledger_file import read_account, read_final_rows
from pipelines.review import main, main_with_exit_code

PRICE = ("--judge.input_dollars", "1", "--judge.output_dollars", "2")
NUM = 20
HTML = "<!DOCTYPE html><html><head><title>Sign in</title></head><body>Please sign in.</body></html>"
NO_MAX_TOKENS = {
    "message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' "
    "instead.",
    "type": "invalid_request_error",
    "param": "max_tokens",
    "code": "unsupported_parameter",
}
NO_TEMPERATURE = {
    "message": "Unsupported value: 'temperature' does not support 0.2 with this model. Only the default (1) value is "
    "supported.",
    "type": "invalid_request_error",
    "param": "temperature",
    "code": "unsupported_value",
}

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def error(status: int, message: str, **more: Any) -> dict[str, Any]:
    return {"raw": json.dumps({"error": {"message": message, **more}}), "code": status}


# What the judge does, the exit code, the most requests that it sees, whether dollars are booked, words on the screen.
JUDGES: dict[str, tuple[dict[str, Any], int, int, bool, tuple[str, ...]]] = {
    "a web page": (
        {"raw": HTML, "type": "text/html"},
        1,
        10,
        False,
        ("a web page (Sign in)", "judge.base_url", "BASE_URL"),
    ),
    "a plain text": ({"raw": "OK", "type": "text/plain"}, 1, 10, False, ("'OK'", "judge.base_url")),
    "max_tokens refused": (
        error(400, **NO_MAX_TOKENS),
        1,
        8,
        False,
        ("'max_tokens' is not supported", 'set judge.token_limit_name = "max_completion_tokens"'),
    ),
    "temperature refused": (error(400, **NO_TEMPERATURE), 1, 8, False, ("'temperature'", "set judge.temperature = 1")),
    "any other 400": (error(400, "No such thing."), 1, 10, False, ("HTTP 400: No such thing.",)),
    "a wrong key": (
        error(401, "Incorrect API key provided.", code="invalid_api_key"),
        1,
        8,
        False,
        ("HTTP 401: Incorrect API key", "OPENAI_API_KEY"),
    ),
    "no such model": (error(404, "The model does not exist."), 1, 8, False, ("judge.model = 'scripted'",)),
    "no credit": (
        error(429, "You exceeded your current quota.", type="insufficient_quota", code=None),
        1,
        8,
        False,
        ("exceeded your current quota", "has no credit"),
    ),
    "an error with status 200": (error(200, "No."), 1, 10, False, ("an error with HTTP 200: No.",)),
    "nothing": ({"raw": ""}, 1, 10, True, ("is no chat completion",)),
    "empty replies": (
        {"content": "", "finish_reason": "length"},
        1,
        10,
        True,
        ("an empty reply, cut off after judge.max_tokens = 1024: raise it",),
    ),
    "thoughts that do not end": (
        {"content": "<think>First 3, then 4", "finish_reason": "length"},
        1,
        10,
        True,
        ("nothing but thoughts, cut off after judge.max_tokens = 1024",),
    ),
    "thoughts first": ({"content": "<think>3 against 4.</think>\n8 9\nGood."}, 0, 2 * NUM, True, ("112.50",)),
    "labels in another order": ({"content": "Assistant 2: 9\nAssistant 1: 8\nGood."}, 0, 2 * NUM, True, ("112.50",)),
    "prose": ({"content": "I give 8 of 9."}, 1, 4 * NUM, True, ("40 of them because: no scores in 'I give 8 of 9.'",)),
}


@pytest.fixture(scope="module")
def judge() -> Iterator[Remote]:
    with scripted_judge() as remote:
        yield remote


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all: MLflow makes its tables once."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def files(folder: Path) -> Path:
    return write_review_files(folder / "files", NUM)


@pytest.fixture
def output(folder: Path, request: pytest.FixtureRequest) -> Path:
    return folder / "".join(letter if letter.isalnum() else "_" for letter in request.node.name)


def exit_code(arguments: list[str]) -> int:
    try:
        main_with_exit_code(arguments)
    except SystemExit as left:
        return int(left.code or 0)
    return 0


# One of each kind in every run of the tests; the others differ in words alone, which test_faults.py has without Ray.
EACH_KIND = {"a web page", "a wrong key", "max_tokens refused", "nothing", "thoughts first"}


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=() if what in EACH_KIND else pytest.mark.verify) for what in JUDGES]
)
def test_a_judge_that_does_not_answer_as_asked(
    what: str, judge: Remote, files: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, code, most, booked, words = JUDGES[what]
    judge.play(**script)
    assert exit_code(flags(files, judge.base_url, output, *PRICE)) == code
    said, seen = capsys.readouterr().out, len(judge.stats()["arrivals"])
    account = read_account(output / "ledger.jsonl")
    for word in words:
        assert word.replace("BASE_URL", judge.base_url) in said
    assert seen <= most
    assert (account.spent > 0) == booked
    if path := os.environ.get("REVIEW_TABLE"):
        told = next((line.strip() for line in said.splitlines() if any(word in line for word in words)), "")
        with Path(path).open("a") as table:
            table.write(f"{what} | {seen} | {code} | ${account.spent:.4f} | {told}\n")
    if code:
        assert "nothing was scored" in said
        assert not any(row["state"] == "done" and row["scores"] for row in read_final_rows(output / "ledger.jsonl"))
    else:
        pair = judge.call("/stats")["paid"]
        assert set(pair.values()) == {1}


def exit_code_shown(code: int) -> str:
    return str(code)


def test_a_page_between_good_replies_is_asked_again(judge: Remote, files: Path, output: Path) -> None:
    """Only a judge that has never answered is given up so soon."""
    judge.play(faults={"malformed": 0.3}, seed=2)
    assert exit_code(flags(files, judge.base_url, output, *PRICE, "--judge.max_attempts", "20")) == 0


def test_ctrl_c_waits_for_what_is_under_way(
    judge: Remote, files: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge.play(hold_after=0)
    stop = threading.Thread(target=interrupt, args=(judge,))
    before = signal.getsignal(signal.SIGINT)
    stop.start()
    arguments = flags(files, judge.base_url, output, *PRICE, "--limits.max_concurrency", "8")
    assert exit_code(arguments) == 130
    stop.join()
    told = capsys.readouterr()
    stats, account = judge.stats(), read_account(output / "ledger.jsonl")
    assert "waiting for 8 calls under way" in told.err
    assert "it was stopped by Ctrl-C" in told.out
    assert account.done == len(stats["arrivals"]) == 8  # nothing new went
    assert signal.getsignal(signal.SIGINT) is before
    assert exit_code(arguments) == 0
    assert set(judge.stats()["paid"].values()) == {1}


def interrupt(judge: Remote) -> None:
    """Send Ctrl-C when all calls that may be under way are; let them be answered a while later."""
    until = time.monotonic() + 60
    while judge.stats()["held"] < 8 and time.monotonic() < until:
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(3)
    judge.call("/release", {})


def test_another_review_is_not_overwritten(judge: Remote, files: Path, output: Path) -> None:
    judge.play()
    base = flags(files, judge.base_url, output, *PRICE)
    assert exit_code([*base, "--max_items", "4"]) == 0
    assert exit_code(base) == 0  # the same review, and more of it
    before = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    for other in (("--judge.model", "second"), ("--judge.temperature", "1"), ("--max_items", "3")):
        with pytest.raises(ConfigError, match=r"holds another review, with .* scores by scripted"):
            main([*base, *other])
    assert before == {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}

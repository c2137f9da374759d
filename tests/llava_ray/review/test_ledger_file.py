"""The ledger's file: nothing is paid twice, whatever line was the last to reach the disk."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from llava_ray.errors import ConfigError, DataError
from llava_ray.review.ledger_file import LedgerFile, read_account, read_final_rows, read_ledger_rows


def sent(key: str, lease: str = "r1/1", by: str = "r1", epoch: str = "e", dollars: float = 0.5) -> dict[str, Any]:
    return {"key": key, "by": by, "epoch": epoch, "lease": lease, "judge": "j", "tokens": 10, "dollars": dollars}


def done(key: str, dollars: float = 0.1) -> dict[str, Any]:
    usage = {"prompt": 7, "cached": 2, "output": 3}
    return {"state": "done", "key": key, "content": "8 7", "scores": [8, 7], "dollars": dollars, "usage": usage}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out" / "ledger.jsonl"


def started(path: Path, session: str = "s") -> LedgerFile:
    ledger = LedgerFile(path, session)
    ledger.register_limiter("e", 60)
    return ledger


def test_a_call_is_claimed_sent_and_done_once(path: Path) -> None:
    ledger = started(path)
    assert ledger.claim(["a", "b"], "r1") == ["a", "b"]
    assert ledger.claim(["a", "c"], "r2") == ["c"]
    assert ledger.send(sent("a")) == ""
    assert ledger.send(sent("a")) == ""  # said twice, it is one
    assert ledger.send(sent("a", "r1/2")) == "not yours"
    assert ledger.send(sent("b", "r2/1", "r2")) == "not yours"
    assert ledger.send(sent("b", epoch="old")) == "stale"
    ledger.finish(done("a"))
    ledger.finish(done("a"))
    assert ledger.claim(["a"], "r2") == []
    assert ledger.account.spent == pytest.approx(0.1)
    assert (ledger.account.sent, ledger.account.done, ledger.account.prompt_tokens) == (1, 1, 7)
    assert read_account(path) == ledger.account
    assert [row["key"] for row in read_final_rows(path)] == ["a"]


def test_what_brought_nothing_may_go_again(path: Path) -> None:
    ledger = started(path)
    ledger.claim(["a"], "r1")
    ledger.send(sent("a"))
    returned = {"key": "a", "lease": "r1/1", "outcome": "refused", "reason": "HTTP 429", "dollars": 0.0}
    ledger.record_returned(returned)
    ledger.record_returned(returned)
    assert ledger.send(sent("a", "r1/2")) == ""
    ledger.record_returned(returned | {"lease": "r1/2", "outcome": "uncertain", "dollars": 0.5})
    assert (ledger.account.refused, ledger.account.uncertain, ledger.account.spent) == (1, 1, 0.5)


def test_a_dead_reviewers_calls_are_free_again_and_the_paid_ones_known(path: Path) -> None:
    ledger = started(path)
    ledger.claim(["a", "b", "c"], "r1")
    ledger.send(sent("a"))
    ledger.send(sent("b", "r1/2"))
    ledger.finish(done("b") | {"lease": "r1/2"})
    assert ledger.abandon("r1", "it died") == {"r1/1": 0.5, "r1/2": 0.1}
    assert ledger.account.uncertain == 1
    ledger.abandon("r1", "it died")
    assert ledger.account.uncertain == 1
    assert ledger.send(sent("c", "r1/3")) == "not yours"  # a call of the dead that arrives late
    assert ledger.claim(["a", "b", "c"], "r2") == ["a", "c"]
    ledger.finish(done("a"))  # so does a reply: it is kept
    assert ledger.entries["a"].state == "done"


def test_the_same_session_goes_on_and_another_one_takes_over(path: Path) -> None:
    ledger = started(path)
    ledger.claim(["a", "b"], "r1")
    ledger.send(sent("a"))
    ledger.close()  # the actor was killed and starts again: its reviewers are alive
    again = LedgerFile(path, "s")
    assert again.epoch == "e"
    assert again.send(sent("b", "r1/2")) == ""
    assert again.account.uncertain == 0
    again.close()
    other = LedgerFile(path, "t")  # the job was killed
    assert other.account.uncertain == 2
    assert other.account.spent == 1.0
    assert other.claim(["a", "b"], "r9") == ["a", "b"]


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_half_a_line_never_was(path: Path, cut: int) -> None:
    ledger = started(path)
    ledger.claim(["a"], "r1")
    ledger.send(sent("a"))
    whole = path.read_bytes()
    ledger.finish(done("a"))
    ledger.close()
    path.write_bytes(path.read_bytes()[: len(whole) + cut])
    again = LedgerFile(path, "s")
    assert again.entries["a"].state == "sent"
    again.finish(done("a"))
    assert [row["state"] for row in read_ledger_rows(path)][-1] == "done"


def test_one_job_writes_at_a_time(path: Path) -> None:
    ledger = started(path)
    with pytest.raises(ConfigError, match="another review is writing"):
        LedgerFile(path, "t")
    ledger.close()
    LedgerFile(path, "t").close()


def test_a_new_limiter_hears_what_counts(path: Path) -> None:
    ledger = started(path)
    ledger.claim(["a", "b"], "r1")
    ledger.send(sent("a"))
    ledger.send(sent("b", "r1/2"))
    ledger.finish(done("a"))
    standing = ledger.register_limiter("f", 60)
    assert standing.spent == pytest.approx(0.1)
    assert [one.lease for one in standing.recent] == ["r1/1", "r1/2"]
    assert [(one.lease, one.dollars) for one in standing.under_way] == [("r1/2", 0.5)]
    assert ledger.register_limiter("g", -1).recent == []


def test_a_failed_call_may_be_tried_by_a_later_job(path: Path) -> None:
    ledger = started(path)
    ledger.claim(["a"], "r1")
    ledger.finish({"state": "failed", "key": "a", "reason": "HTTP 500"})
    assert ledger.claim(["a"], "r1") == ["a"]
    ledger.send(sent("a"))
    ledger.finish(done("a"))
    assert [row["state"] for row in read_final_rows(path)] == ["failed", "done"]


def test_damage_is_told(path: Path) -> None:
    started(path).close()
    path.write_bytes(path.read_bytes() + b"{\n" + json.dumps(done("a")).encode() + b"\n")
    with pytest.raises(DataError, match="is damaged"):
        LedgerFile(path, "s")
    path.write_bytes(b'{"text": "an answers file"}\n')
    with pytest.raises(DataError, match="is no ledger"):
        LedgerFile(path, "s")


class FullDisk:
    """A file whose disk has room for so many bytes more."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, content: memoryview) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        num = self.file.write(content[: self.room])
        self.room -= num
        return num

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 1, 30])
def test_a_full_disk_leaves_whole_lines_and_says_what_to_do(tmp_path: Path, room: int) -> None:
    ledger = LedgerFile(tmp_path / "ledger.jsonl", "one")
    ledger.claim(["a"], "r")
    before = ledger.path.read_bytes()
    ledger.file = FullDisk(ledger.file, room)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"cannot write .*ledger\.jsonl: No space left on device; free some space"):
        ledger.claim(["b"], "r")
    assert ledger.path.read_bytes() == before
    assert "b" not in ledger.entries
    ledger.file.room = 1000  # type: ignore[attr-defined]
    ledger.claim(["b"], "r")
    ledger.close()
    assert [row.get("key") for row in read_ledger_rows(tmp_path / "ledger.jsonl")] == [None, "a", "b"]


def test_a_device_or_folder_is_no_ledger(tmp_path: Path) -> None:
    for place in (Path("/dev/full"), Path("/dev/zero"), tmp_path):
        with pytest.raises(ConfigError, match="no ordinary file"):
            LedgerFile(place, "one")
        with pytest.raises(ConfigError, match="no ordinary file"):
            read_account(place)

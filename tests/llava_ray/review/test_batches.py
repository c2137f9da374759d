"""The Batch API against a scripted endpoint: what expires goes out again, what a killed job sent is found again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from review_files import flags, write_review_files
from scripted_judge import Remote, scripted_judge

import pipelines.review_run as review_run
from llava_ray.errors import JudgeError
from llava_ray.review.batches import Batches, batch_client
from llava_ray.review.ledger_file import LedgerFile, read_account, read_final_rows
from llava_ray.review.pool import Progress
from llava_ray.review.rates import Budget

PRICE = ("--judge.input_dollars", "1", "--judge.output_dollars", "2")


@pytest.fixture(scope="module")
def judge() -> Iterator[Remote]:
    with scripted_judge() as remote:
        yield remote


@pytest.fixture
def job(judge: Remote, tmp_path: Path) -> review_run.ReviewJob:
    judge.play()
    files = write_review_files(tmp_path / "files", 30)
    delivery = ("--judge.delivery", "batch", "--judge.max_tokens", "64")
    return review_run.prepare(flags(files, judge.base_url, tmp_path / "out", *PRICE, *delivery))


def run(job: review_run.ReviewJob, cap: float | None = None, session: str = "s") -> Progress:
    """Send what is waiting in batches, without waiting between looks."""
    (spec,) = job.plan.judges.values()
    ledger = LedgerFile(job.ledger, session)
    progress = Progress(len(job.plan), 0)
    try:
        batches = Batches(job.plan, spec, ledger, batch_client(spec), Budget(cap), 0.0, lambda seconds: None)
        for _ in batches.run(job.waiting(), progress):
            pass
    finally:
        ledger.close()
    return progress


def test_all_come_back_once(job: review_run.ReviewJob, judge: Remote) -> None:
    judge.play(batch_s=0.2)
    progress = run(job)
    assert (progress.done, progress.failed, judge.stats()["batches"]) == (60, 0, 1)
    assert set(judge.stats()["paid"].values()) == {1}
    rows = list(read_final_rows(job.ledger))
    assert len(rows) == 60
    assert all(row["scores"] for row in rows)
    assert job.waiting() == []


def test_what_expired_or_failed_goes_out_again(job: review_run.ReviewJob, judge: Remote) -> None:
    judge.play(expire=0.2, batch_faults=0.2)
    progress = run(job)
    assert progress.done == 60
    assert judge.stats()["batches"] > 1
    assert set(judge.stats()["paid"].values()) == {1}
    account = read_account(job.ledger)
    assert (account.uncertain, account.refused) == (0, account.sent - 60)
    assert account.refused > 10


def test_what_never_comes_is_listed(job: review_run.ReviewJob, judge: Remote) -> None:
    judge.play(batch_faults=1.0)
    progress = run(job)
    assert (progress.done, progress.failed, judge.stats()["batches"]) == (0, 60, 5)
    assert "scripted" in next(read_final_rows(job.ledger))["reason"]


@pytest.mark.parametrize("noted", [True, False])
def test_a_killed_jobs_batch_is_found_again(job: review_run.ReviewJob, judge: Remote, noted: bool) -> None:
    judge.play(batch_s=0.3)

    class KilledError(Exception):
        pass

    class Killed(Batches):
        def _await(self, *arguments: Any) -> Any:
            raise KilledError

    (spec,) = job.plan.judges.values()
    ledger = LedgerFile(job.ledger, "killed")
    if not noted:
        ledger.name_batch = lambda by, batch: None  # type: ignore[method-assign]
    with pytest.raises(KilledError):
        list(Killed(job.plan, spec, ledger, batch_client(spec), Budget(None)).run(job.waiting(), Progress(60, 0)))
    ledger.close()
    progress = run(job, session="next")
    assert (progress.done, judge.stats()["batches"]) == (60, 1)
    assert read_account(job.ledger).uncertain == 0


def test_a_batch_whose_answer_was_lost_is_not_sent_twice(job: review_run.ReviewJob, judge: Remote) -> None:
    judge.play(lose_create=True)
    assert run(job).done == 60
    assert judge.stats()["batches"] == 1


def test_the_budget_holds(job: review_run.ReviewJob, judge: Remote) -> None:
    largest = max(call.dollars for call in job.plan)
    progress = run(job, cap=5 * largest)
    account = read_account(job.ledger)
    assert progress.broke > 0
    assert account.spent <= 5 * largest
    assert 5 * largest - account.spent < largest
    assert progress.failed == 0


def test_an_endpoint_without_batches_is_told(job: review_run.ReviewJob, judge: Remote) -> None:
    judge.call("/script", {})
    (spec,) = job.plan.judges.values()
    wrong = batch_client(spec).with_options(base_url=judge.base_url + "/nowhere")
    ledger = LedgerFile(job.ledger, "s")
    with pytest.raises(JudgeError, match="the same command resumes"):
        list(Batches(job.plan, spec, ledger, wrong, Budget(None)).run(job.waiting(), Progress(60, 0)))
    ledger.close()

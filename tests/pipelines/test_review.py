"""Reviews from files to report, with a scripted judge behind real HTTP: every review once, nothing invented."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import write_benchmark
from pictures import picture
from review_files import flags, write_lines, write_review_files
from scripted_judge import Remote, score_of, scripted_judge

from llava_ray.errors import ConfigError, DataError
from llava_ray.review.ledger_file import LedgerFile, read_ledger_rows
from pipelines.evaluate import main as evaluate
from pipelines.review import main, main_with_exit_code
from pipelines.review_run import Outcome

PRICE = ("--judge.input_dollars", "1", "--judge.output_dollars", "2")
NOT_CONNECTED = "http://127.0.0.1:9/v1"

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
Review = Callable[..., Outcome]


@pytest.fixture(scope="module")
def judge() -> Iterator[Remote]:
    with scripted_judge() as remote:
        yield remote


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return write_review_files(tmp_path / "files", 20, ("model", "other"))


@pytest.fixture
def review(judge: Remote, files: Path, tmp_path: Path) -> Review:
    judge.play()

    def run(*more: str, output: str = "out", **kinds: Any) -> Outcome:
        found = main(flags(files, judge.base_url, tmp_path / output, *PRICE, *more, **kinds))
        assert isinstance(found, Outcome)
        return found

    return run


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_that_nothing_was_paid_twice(judge: Remote, report: Any) -> None:
    """Every payment beyond the first of a request is one that the report calls uncertain, or paid without scores."""
    twice = sum(times - 1 for times in judge.stats()["paid"].values())
    assert twice <= report["calls"]["uncertain"] + report["calls"]["paid_without_scores"]


def test_a_review_from_files_to_report(review: Review, judge: Remote, files: Path, tmp_path: Path) -> None:
    outcome = review("--judge.temperature", "0.2")
    (found,) = outcome.report["results"]
    pairs = [(score_of(a["text"]), score_of(b["text"])) for a, b in zip(*map(rows, answers_of(files)), strict=True)]
    assert outcome.complete
    assert found["score"] == pytest.approx(100 * sum(b for _, b in pairs) / sum(a for a, _ in pairs), abs=1e-3)
    assert found["consistency"] == 1.0
    assert found["orders"]["given"] == found["orders"]["swapped"] == found["orders"]["both"]
    assert set(found["categories"]) == {"conv", "detail", "complex"}
    assert found["metric"].startswith("questions/model/relative_score/scripted/20")
    assert outcome.report["provenance"]["temperature"] == 0.2
    output = tmp_path / "out"
    written = rows(output / "reviews.jsonl")
    assert [row["question_id"] for row in written] == [str(n) for n in range(20)]
    assert [review["order"] for review in written[0]["reviews"]] == ["given", "swapped"]
    assert written[0]["reviews"][0]["scores"] == list(pairs[0])
    assert "relative" not in (output / "report.html").read_text()[:100]
    account = outcome.report["calls"]
    assert (account["sent"], account["uncertain"], len(judge.stats()["paid"])) == (40, 0, 40)
    (llava,) = output.glob("review_*.jsonl")
    assert rows(llava)[0] | {"content": ""} == {
        "id": 1,
        "question_id": "0",
        "answer1_id": "gpt4-0",
        "answer2_id": "model-0",
        "category": "llava_bench_conv",
        "content": "",
        "tuple": list(pairs[0]),
    }

    # The same command asks nothing and needs no cluster; another output with this ledger neither.
    before = (output / "reviews.jsonl").read_bytes()
    assert review().complete
    assert (output / "reviews.jsonl").read_bytes() == before
    assert review("--ledger", str(output / "ledger.jsonl"), output="another").complete
    assert sum(judge.stats()["paid"].values()) == 40


def answers_of(files: Path) -> tuple[Path, Path]:
    return files / "gpt4.jsonl", files / "model.jsonl"


def test_every_fault_is_survived_or_listed(review: Review, judge: Remote) -> None:
    faults = {"429": 0.05, "500": 0.04, "502": 0.03, "drop": 0.03, "malformed": 0.03, "slow": 0.03, "hang": 0.02}
    judge.play(faults=faults | {"unparsed": 0.05}, retry_after=0.2, seed=3)
    outcome = review("--judge.timeout_s", "3", "--judge.max_attempts", "6")
    assert outcome.complete
    done = sum(row["done"] for row in outcome.report["results"])
    (found,) = outcome.report["results"]
    assert done + found["failed"] + found["unparsed"] == 20
    assert len(judge.stats()["outcomes"]) > 3
    assert outcome.report["calls"]["uncertain"] > 0
    check_that_nothing_was_paid_twice(judge, outcome.report)


def test_what_fails_is_listed_with_its_reason_and_in_no_mean(review: Review, judge: Remote, tmp_path: Path) -> None:
    judge.play(faults={"500": 0.5}, seed=1)
    outcome = review("--judge.max_attempts", "1")
    (found,) = outcome.report["results"]
    assert outcome.complete
    assert 0 < found["failed"] < 20
    assert found["score"] is None
    assert "reviews have no scores" in found["withheld"]
    assert 0 < found["computed_score"] < 1000
    assert outcome.report["without_scores"][0]["reason"] == "HTTP 500: scripted 500 (scripted)"
    kept = [row for row in rows(tmp_path / "out/reviews.jsonl") if row["reviews"][0]["state"] == "failed"]
    assert len(kept) == found["failed"]
    # A later run tries them again, and only them.
    paid = sum(judge.stats()["paid"].values())
    judge.play()
    again = review("--judge.max_attempts", "1")
    assert again.report["results"][0]["done"] == 20
    assert sum(judge.stats()["paid"].values()) == 40 - paid


def test_a_reply_without_scores_is_asked_again_once_and_then_unparsed(review: Review, judge: Remote) -> None:
    judge.play(faults={"unparsed": 1.0})
    outcome = review("--both_orders", "False")
    (found,) = outcome.report["results"]
    assert outcome.complete
    assert (found["unparsed"], found["done"], found["score"]) == (20, 0, None)
    assert (outcome.report["calls"]["paid_without_scores"], outcome.report["calls"]["sent"]) == (20, 40)
    assert outcome.report["without_scores"][0]["reason"] == "no scores in 'I cannot say.'"


def test_an_outage_is_no_result(review: Review, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = review("--judge.base_url", NOT_CONNECTED, "--judge.max_attempts", "2", "--limits.give_up_after", "5")
    (found,) = outcome.report["results"]
    assert not outcome.complete
    assert (found["score"], found["computed_score"]) == (None, None)
    assert "failed in a row" in outcome.report["partial_because"]
    assert "not connected" in outcome.report["partial_because"]
    assert outcome.report["cost"]["dollars"] == 0
    assert "no result" in capsys.readouterr().out


def test_no_more_credit_stops_at_once_and_the_exit_code_says_partial(
    review: Review, judge: Remote, files: Path, tmp_path: Path
) -> None:
    judge.play(quota=7)
    output = tmp_path / "out"
    with pytest.raises(SystemExit) as left:
        main_with_exit_code(flags(files, judge.base_url, output, *PRICE))
    assert left.value.code == 3  # partial
    report = json.loads((output / "report.json").read_text())
    assert not report["complete"]
    assert "insufficient_quota" in report["partial_because"]
    assert sum(judge.stats()["paid"].values()) == 7
    assert judge.stats()["outcomes"]["quota"] <= 16  # those that were in flight
    judge.play()
    assert review().complete
    assert sum(judge.stats()["paid"].values()) == 33


def test_the_budget_holds_to_the_last_call(review: Review, judge: Remote, tmp_path: Path) -> None:
    judge.play(latency_s=0.02, faults={"502": 0.1, "malformed": 0.1})
    cap = 0.012
    outcome = review("--budget.dollars", str(cap), "--judge.max_tokens", "200")
    assert not outcome.complete
    assert "of the budget are spent" in outcome.report["partial_because"]
    spent, under_way, largest = 0.0, {}, 0.0
    for row in read_ledger_rows(tmp_path / "out/ledger.jsonl"):
        if row["state"] == "sent":
            under_way[row["lease"]] = row["dollars"]
            largest = max(largest, row["dollars"])
        elif row.get("lease") in under_way:
            del under_way[row["lease"]]
            spent += row["dollars"]
        assert spent + sum(under_way.values()) <= cap
    assert not under_way
    assert cap - spent < largest
    assert outcome.report["cost"]["dollars"] == pytest.approx(spent, abs=1e-6)


def test_a_storm_of_refusals_passes(review: Review, judge: Remote) -> None:
    judge.play(storm=[0.0, 3.0], retry_after=1)
    outcome = review("--judge.max_attempts", "2")
    assert outcome.complete
    assert outcome.report["results"][0]["done"] == 20
    # Whoever was in flight heard it; then all were quiet for as long as was asked.
    assert judge.stats()["outcomes"]["429"] <= 4 * 8


@pytest.mark.verify  # waits for a lock as long as a dying job may hold it
def test_two_jobs_on_one_ledger(review: Review, tmp_path: Path) -> None:
    ledger = LedgerFile(tmp_path / "out" / "ledger.jsonl", "another job")
    with pytest.raises(ConfigError, match="another review is writing"):
        review()
    ledger.close()


def test_images_are_sent_to_a_judge_that_sees(review: Review, judge: Remote, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number:03}.jpg").write_bytes(picture(kind="JPEG"))
    judge.play(keep=True)
    outcome = review("--image_folder", str(folder), "--judge.sees_images", "True", "--both_orders", "False")
    assert outcome.complete
    parts = judge.stats()["texts"][0]["messages"][-1]["content"]
    assert [part["type"] for part in parts] == ["image_url", "text"]
    assert parts[0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    (folder / "003.jpg").unlink()
    with pytest.raises(DataError, match="cannot read the image"):
        review("--image_folder", str(folder), "--judge.sees_images", "True", output="other")


def test_several_judges_and_models_against_each_other(review: Review, judge: Remote) -> None:
    outcome = review(
        "--mode",
        "pairwise",
        "--judge.others",
        f"second={judge.base_url}",
        "--judge.response_format",
        "json_schema",
        models=("model", "other", "gpt4"),
    )
    assert outcome.complete
    assert len(outcome.report["results"]) == 2 * 3
    assert len(outcome.report["comparisons"]) == 2
    for found in outcome.report["comparisons"].values():
        assert set(found["ratings"]) == {"model", "other", "gpt4"}
        assert sum(one["won"] + one["tied"] + one["lost"] for one in found["win_rates"]) == 60
    assert sum(judge.stats()["paid"].values()) == 2 * 3 * 2 * 20


def test_one_answer_at_a_time(review: Review) -> None:
    outcome = review("--mode", "single")
    (found,) = outcome.report["results"]
    assert 1 <= found["score"] <= 10
    assert found["done"] == 20


def test_benchmarks_are_scored_with_the_reviews(judge: Remote, tmp_path: Path) -> None:
    for name, category in (("llava_bench", "conv"), ("mm_vet", "rec")):
        judge.play()
        data = write_benchmark(name, tmp_path / name)
        ids = [f"v1_{n}" for n in range(2)] if name == "mm_vet" else range(3)
        answers = write_lines(tmp_path / f"{name}.jsonl", [{"question_id": n, "text": f"It is {n}."} for n in ids])
        about = ("--benchmark", name, "--data", str(data), "--answers", str(answers))
        whose = ("--judge.model", "scripted", "--judge.base_url", judge.base_url)
        outcome = main([*about, *whose, "--output", str(tmp_path / f"{name}-out")])
        assert isinstance(outcome, Outcome)
        (found,) = outcome.report["results"]
        assert category in found["categories"]
        (reviews,) = (tmp_path / f"{name}-out").glob("review_*.jsonl")
        place = ("--output", str(tmp_path / f"{name}-scored"))
        evaluate(["score", *about, "--reviews", str(reviews), "--profile", "llava", *place])
        result = json.loads((tmp_path / f"{name}-scored" / "result.json").read_text())
        assert result["score"] == pytest.approx(found["score"], abs=1e-3)


def test_a_dry_run_sends_nothing(
    files: Path, judge: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge.play()
    assert main([*flags(files, judge.base_url, tmp_path / "out", *PRICE), "--dry-run"]) is None
    said = capsys.readouterr().out
    assert "to send                40" in said
    assert "dollars, at most" in said
    assert not judge.stats()["arrivals"]
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused_before_anything_is_asked(files: Path, judge: Remote, tmp_path: Path) -> None:
    base = flags(files, judge.base_url, tmp_path / "out")
    for more, told in (
        (["--budget.dollars", "1"], "budget.dollars needs the price of scripted"),
        (["--judge.temperatur", "1"], r"did you mean 'judge\.temperature'"),
    ):
        with pytest.raises(ConfigError, match=told):
            main([*base, *more])
    (files / "model.jsonl").write_text('{"question_id": 99, "text": "x"}\n')
    with pytest.raises(DataError, match="no question has answers to review"):
        main(base)


def test_llavas_own_review_files_are_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored = [(8, 7), (9, 6), (10, 8)]
    reviews = [{"question_id": n, "category": "llava_bench_conv", "tuple": pair} for n, pair in enumerate(scored)]
    main(["summarize", str(write_lines(tmp_path / "gpt4_text_a.jsonl", reviews))])
    assert "all 77.8 90.0 70.0" in capsys.readouterr().out
    failed = [row | {"tuple": [-1, -1]} for row in reviews]
    main(["summarize", str(write_lines(tmp_path / "b.jsonl", failed)), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["withheld"] == "3 of 3 reviews failed; at most 2 % may"
    assert "all" not in found["categories"]

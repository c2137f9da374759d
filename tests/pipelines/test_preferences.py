"""Preferences from a tiny model's answers and a scripted judge: each call paid once, the same file whatever happens."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from preference_data import NUM, PRICE, make_bundle, rows, settings, write_records
from scripted_judge import Remote, score_of, scripted_judge

from llava_ray.errors import DataError, JudgeError
from llava_ray.review.ledger_file import read_account
from pipelines.preferences import PreferencesMade, make_preferences

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
Make = Callable[..., PreferencesMade]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("preferring"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("preferred") / "data")


@pytest.fixture(scope="module")
def judge() -> Iterator[Remote]:
    with scripted_judge() as remote:
        yield remote


@pytest.fixture
def make(bundle: Path, data: Path, judge: Remote, tmp_path: Path) -> Make:
    judge.play()

    def run(output: str = "out", **more: Any) -> PreferencesMade:
        of_judge = {f"judge__{key}": value for key, value in judge_settings(judge).items()}
        source = {"data_path": str(data / "data.json")}
        return make_preferences(settings(bundle, tmp_path / output, source, **{**of_judge, **more}))

    return run


def judge_settings(judge: Remote) -> dict[str, Any]:
    return {"model": "scripted", "base_url": judge.base_url, **PRICE}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """preferences.jsonl of an undisturbed run, once there is one."""
    return {}


def test_judged_pairs_become_preferences_and_nothing_is_done_twice(
    make: Make, judge: Remote, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    made = make()
    assert made.complete
    assert made.num_pairs == len(rows(made.path)) > 3
    counts = made.summary["counts"]
    assert counts["sampled_answers"] == 3 * (NUM + 1)
    different = counts["possible_pairs"] - counts.get("equal_pairs", 0) - counts.get("repeated_pairs", 0)
    assert counts["decided_pairs"] + counts.get("tied_pairs", 0) == different
    assert made.summary["order"]["first_wins"] == 0.5
    assert made.dollars == pytest.approx(read_account(tmp_path / "out/ledger.jsonl").spent, abs=1e-6)
    for row in rows(made.path):
        assert row.keys() == {"id", "images", "prompt", "chosen", "rejected", "provenance"}
        assert score_of(row["chosen"][0]["content"]) > score_of(row["rejected"][0]["content"])
        assert "".join(turn["content"] for turn in row["prompt"]).count("<image>") == len(row["images"])
        assert all(Path(image).is_file() for image in row["images"])
        found = row["provenance"]
        assert found["question"] == row["id"].partition("#")[0]
        assert {one["first"] for one in found["calls"]} == {found["chosen"]["label"], found["rejected"]["label"]}
        assert all(one["key"] and one["scores"] for one in found["calls"])
        assert found["chosen"]["seed"] != found["rejected"]["seed"]
        assert found["chosen"]["fingerprint"] == next(iter(made.summary["models"].values()))
    talk = next(row for row in rows(made.path) if row["id"].startswith("r0#"))
    assert [turn["role"] for turn in talk["prompt"]] == ["user", "assistant", "user"]
    paid = judge.stats()["paid"]
    assert set(paid.values()) == {1}

    # Half of the answers and half a line are gone: only those are sampled again, nothing is judged again.
    before = undisturbed["bytes"] = made.path.read_bytes()
    (answers,) = (tmp_path / "out/answers").glob("*/sample.jsonl")
    sampled = answers.read_bytes()
    lines = sampled.split(b"\n")
    answers.write_bytes(b"\n".join(lines[:7]) + b"\n" + lines[7][:30])
    assert make().path.read_bytes() == before
    assert answers.read_bytes() == sampled
    # Another folder and other batches: the same answers, whose judgements are known.
    other = make("other", preferences__batch_size=5, preferences__ledger=str(tmp_path / "out/ledger.jsonl"))
    assert other.path.read_bytes() == before
    assert judge.stats()["paid"] == paid
    assert other.mlflow_run_id


def test_a_killed_driver_is_followed_by_one_that_goes_on(
    make: Make, judge: Remote, bundle: Path, data: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """SIGKILL while calls are under way: they may be asked again, as the ledger says, and no other."""
    judge.play(hold_after=9)
    process = start(bundle, data, tmp_path / "out", judge)
    try:
        wait_for(lambda: judge.stats()["held"] > 0, process, tmp_path / "out.log")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (answers,) = (tmp_path / "out/answers").glob("*/sample.jsonl")
    written = answers.stat()
    judge.call("/release", {})
    made = make()
    assert made.complete
    assert (answers.stat().st_size, len(rows(answers))) == (written.st_size, 3 * (NUM + 1))
    if undisturbed:
        assert made.path.read_bytes() == undisturbed["bytes"]
    twice = sum(times - 1 for times in judge.stats()["paid"].values())
    assert twice <= made.summary["calls"]["uncertain"] + made.summary["calls"]["refused"]


def start(bundle: Path, data: Path, output: Path, judge: Remote, **more: object) -> "subprocess.Popen[bytes]":
    """Start the command in a process of its own, on this session's cluster."""
    given = {"models": bundle, "data_path": data / "data.json", "output": output, "num_samples": 3, "batch_size": 2}
    given |= {"max_new_tokens": 6, "cut_off": "keep", **more}
    flags = [f"--preferences.{key}={value}" for key, value in given.items() if key != "models"]
    flags += [f"--judge.{key}={value}" for key, value in judge_settings(judge).items()]
    flags += ["--preferences.models", str(bundle), "--actors.num_actors=1", "--actors.cpus_per_actor=0.5"]
    flags += [f"--cluster.address={ray.get_runtime_context().gcs_address}"]
    log = output.with_suffix(".log").open("wb")
    command = [sys.executable, str(ROOT / "pipelines/preferences.py"), *flags]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=os.environ | {"PYTHONPATH": path})


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.1)


@pytest.mark.verify
def test_a_driver_killed_while_sampling_samples_no_whole_batch_again(
    make: Make, judge: Remote, bundle: Path, data: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    more = {"batch_size": 1, "num_samples": 40, "max_new_tokens": 64}
    process = start(bundle, data, tmp_path / "out", judge, **more)

    def lines() -> int:
        return sum(path.read_bytes().count(b"\n") for path in (tmp_path / "out/answers").glob("*/sample.jsonl"))

    try:
        wait_for(lambda: lines() >= 40, process, tmp_path / "out.log")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (answers,) = (tmp_path / "out/answers").glob("*/sample.jsonl")
    kept = answers.read_bytes()[: answers.read_bytes().rfind(b"\n") + 1].splitlines()
    sizes = {f"preferences__{key}": value for key, value in more.items()}
    made = make(**sizes)
    assert set(kept) <= set(answers.read_bytes().splitlines())
    assert make("calm", **sizes).path.read_bytes() == made.path.read_bytes()


@pytest.mark.verify
def test_what_judges_fail_to_say_is_counted_and_never_learnt_from(make: Make, judge: Remote) -> None:
    judge.play(likes_first=9)
    with pytest.raises(DataError, match=r"no preference is left .*inconsistent pairs.*no pair has a winner in both"):
        make()
    judge.play(faults={"500": 0.4}, seed=2)
    made = make("faults", judge__max_attempts=1)
    counts = made.summary["counts"]
    assert counts["failed_pairs"] > 0
    assert made.num_pairs == counts["decided_pairs"] > 0
    decided = {row["id"] for row in rows(made.path)}
    # The same command asks the failed ones again, and only those.
    judge.play()
    again = make("faults", judge__max_attempts=1)
    assert "failed_pairs" not in again.summary["counts"]
    assert decided < {row["id"] for row in rows(again.path)}
    with pytest.raises(JudgeError, match=r"no pair was judged: .*in a row"):
        make("down", judge__base_url="http://127.0.0.1:9/v1", judge__max_attempts=1, limits__give_up_after=3)


@pytest.mark.verify
def test_a_budget_that_is_used_up_keeps_what_there_is(make: Make, judge: Remote) -> None:
    made = make(budget__dollars=0.01, judge__max_tokens=256, limits__max_concurrency=2)
    assert not made.complete
    assert made.summary["counts"]["open_pairs"] > 0
    assert "budget" in made.summary["partial_because"]
    first = judge.stats()["paid"]
    whole = make(judge__max_tokens=256)
    assert whole.complete
    assert whole.num_pairs > made.num_pairs
    assert set(judge.stats()["paid"].values()) == {1}
    assert first.keys() < judge.stats()["paid"].keys()


@pytest.mark.verify
def test_answers_to_perturbed_images_are_rejected_ones(make: Make) -> None:
    noised = make(preferences__rule="noised_image", preferences__noise_steps=1000)
    assert noised.num_pairs > 0
    assert noised.summary["counts"]["questions_without_other_image"] == 1
    assert {row["provenance"]["rejected"]["noise_steps"] for row in rows(noised.path)} == {1000}
    with pytest.raises(DataError, match=r"all 21 pairs of answers to 7 questions are equal: raise preferences\.temp"):
        make("equal", preferences__top_p=1e-6)


@pytest.mark.verify
def test_an_unreadable_image_is_named_and_asked_once_it_is_mended(make: Make, data: Path) -> None:
    whole = (data / "1.png").read_bytes()
    (data / "1.png").write_bytes(whole[:60])
    try:
        with pytest.raises(DataError, match=r"1 of 7 questions cannot be asked .*question 'r1': .*1\.png"):
            make()
        made = make(preferences__max_rejected=0.2)
        assert made.summary["rejected"] == {"image_unreadable": 1}
        assert not any(row["id"].startswith("r1#") for row in rows(made.path))
    finally:
        (data / "1.png").write_bytes(whole)
    assert make().summary["asked"] == NUM + 1

"""Long proofs of the loop: five seeds beside tuning on the chosen answers, judges of 80 % and of 50 %, SIGKILL.

The first two train small real models from those of the quickstart, which are made where they are missing: `make
improve` makes them too. Figures go to tests/benchmarks/results/improve.json.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from preference_data import PRICE, make_bundle, rows, write_colours, write_records
from scripted_judge import Remote, scripted_judge

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.improve import ImproveConfig
from llava_ray.config.recipes import load_settings
from llava_ray.data.preparation import prepare_data
from llava_ray.quickstart import easy_vqa
from llava_ray.runtime import connected
from llava_ray.train.trainer import finetune
from pipelines import quickstart_improve
from pipelines.evaluation_run import run_evaluation
from pipelines.improve import improve_model
from pipelines.improve_loop import measure_gain
from pipelines.improve_settings import evaluation_settings, tuning_settings
from pipelines.quickstart_improve import train_early, write_splits

pytestmark = [pytest.mark.verify, pytest.mark.timeout(3600)]

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "tests/benchmarks/results/improve.json"
SEEDS = int(os.environ.get("IMPROVE_SEEDS", "5"))
NUM_ASKED = int(os.environ.get("IMPROVE_ASKED", "1600"))
NUM_HELD_OUT = int(os.environ.get("IMPROVE_HELD_OUT", "1600"))  # as make improve
STEPS = os.environ.get("IMPROVE_STEPS", "")  # for a quick look at whether the proofs run
GAIN = 3.0  # points, at least
EARLY = (70.0, 85.0)
RELIABILITY = 0.8


@pytest.fixture(scope="module")
def early() -> Iterator[str]:
    """The quickstart's model, stopped early, in the repository's runs/."""
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        config = load_settings(ImproveConfig, [quickstart_improve.RECIPE])
        with connected(config.cluster) as resources:
            yield str(Path(train_early(resources)).resolve())
    finally:
        os.chdir(before)


def seed_settings(early: str, folder: Path, seed: int, **more: Any) -> ImproveConfig:
    """The quickstart's loop over questions of its own, with one seed for all that is drawn."""
    write_splits(easy_vqa.train_questions(NUM_ASKED, seed=seed), easy_vqa.test_questions(NUM_HELD_OUT, seed=1), folder)
    changes = {
        "model.model_name_or_path": early,
        "improve.benchmark": f"custom={folder}/held_out",
        "improve.output": str(folder / "improve"),
        "preferences.benchmark": f"custom={folder}/asked",
        "preferences.seed": seed,
        "train.seed": seed,
        "tracking.log_model": False,
    }
    changes |= {"train.max_steps": int(STEPS)} if STEPS else {}
    return load_settings(ImproveConfig, [quickstart_improve.RECIPE]).replaced(changes | more)


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the loops of all proofs, which share what is the same for them."""
    return tmp_path_factory.mktemp("loops")


def share(first: Path, output: Path, *names: str) -> None:
    """Give a loop another one's finished parts, which it would repeat."""
    for name in names:
        if (first / name).exists() and not (output / name).exists():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(first / name, output / name)


def tune_on_chosen(config: ImproveConfig, resources: Any) -> FinetuneConfig:
    """The settings of tuning on the chosen answers of a loop's first round, for as many steps."""
    place = Path(config.improve.output) / "round-1"
    records = []
    for number, row in enumerate(rows(place / "preferences/preferences.jsonl")):
        (question,), (chosen,) = row["prompt"], row["chosen"]
        turns = [{"from": "human", "value": question["content"]}, {"from": "gpt", "value": chosen["content"]}]
        records.append({"id": str(number), "image": row["images"][0], "conversations": turns})
    (place / "chosen.json").write_text(json.dumps(records))
    values = tuning_settings(config, 1, config.model.model_name_or_path, {}).model_dump()
    values["train"] |= {"objective": "cross_entropy"}
    values["data"] |= {"kind": "instruction", "data_path": str(place / "chosen.json")}
    values["run"] |= {"name": "chosen"}
    del values["preference"]
    return FinetuneConfig.parsed(values)


def keep(key: str, value: Any) -> None:
    """Keep a proof's figures beside those of the others."""
    if STEPS:
        print(key, json.dumps(value, indent=1))
        return
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(found | {key: value}, indent=1) + "\n")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_five_seeds_gain_beside_tuning_on_the_chosen_answers(early: str, space: Path) -> None:
    from evals.comparison import read_result

    found: list[dict[str, Any]] = []
    for seed in range(1, SEEDS + 1):
        config = seed_settings(early, space / f"seed-{seed}", seed)
        output = Path(config.improve.output)
        share(space / "seed-1/improve", output, "round-0")
        started = time.monotonic()
        summary = improve_model(config).summary
        seconds = time.monotonic() - started
        (one,) = summary["rounds"]
        with connected(config.cluster) as resources:
            settings = tune_on_chosen(config, resources)
            tuned = finetune(settings, prepare_data(settings.data), resources)
        place = output / "chosen-answers"
        run_evaluation(evaluation_settings(config, tuned.folder.bundle, place, {}))
        start, chosen = (read_result(folder / "evaluate/custom") for folder in (output / "round-0", place))
        beside = measure_gain(chosen, start, 0.05)
        found.append(
            {
                "seed": seed,
                "start": summary["start"]["score"],
                "preferences": one["preferences"]["written"],
                "dpo": one["evaluate"]["score"],
                "dpo_gain": one["gain"]["difference"],
                "dpo_interval": one["gain"]["confidence_interval"],
                "dpo_categories": one["evaluate"]["categories"],
                "chosen_answers": beside["first"],
                "chosen_answers_gain": beside["difference"],
                "chosen_answers_interval": beside["confidence_interval"],
                "seconds_of_the_loop": round(seconds, 1),
            }
        )
        print(found[-1], flush=True)
        keep("seeds", found)
    if STEPS:
        return
    assert all(EARLY[0] <= one["start"] <= EARLY[1] for one in found)
    assert all(one["dpo_interval"][0] > 0 for one in found)
    assert sum(one["dpo_gain"] for one in found) / len(found) >= GAIN


@contextmanager
def truthful_judge(reliability: float) -> Iterator[dict[str, Any]]:
    """A judge over HTTP that is right as often as its reliability, and the settings that ask it."""
    with scripted_judge(reliability=reliability) as judge:
        section = {f"judge.{key}": value for key, value in PRICE.items()}
        section |= {"judge.model": "scripted", "judge.base_url": judge.base_url}
        yield section | {"preferences.rule": "judge", "preferences.show_truth": True}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_judge_of_80_percent_gains_and_a_random_one_does_not_which_is_said(early: str, space: Path) -> None:
    found: dict[str, Any] = {}
    for name, reliability in (("reliable", RELIABILITY), ("random", 0.5)):
        with truthful_judge(reliability) as more:
            config = seed_settings(early, space / name, 1, **more)
            for first in ("seed-1", "reliable"):
                share(space / first / "improve", Path(config.improve.output), "round-0", "round-1/preferences/answers")
            summary = improve_model(config).summary
        (one,) = summary["rounds"]
        page = Path(config.improve.output, "report.html").read_text()
        pairs = rows(Path(config.improve.output, "round-1/preferences/preferences.jsonl"))
        truth = {question.id: question.answer for question in easy_vqa.read_questions("train")}
        right = [
            easy_vqa.normalize_answer(row["chosen"][0]["content"]) == truth[row["provenance"]["question"]]
            for row in pairs
        ]
        said = [text for text in ("a significant gain", "is not significant", "significantly worse") if text in page]
        found[name] = {
            "reliability": reliability,
            "start": summary["start"]["score"],
            "counts": one["preferences"]["counts"],
            "preferences": len(pairs),
            "share_of_chosen_answers_that_are_right": sum(right) / len(right),
            "score": one["evaluate"]["score"],
            "gain": one["gain"]["difference"],
            "interval": one["gain"]["confidence_interval"],
            "kept": one["accepted"],
            "dollars": summary["dollars"],
            "report_says": said,
        }
        print(found[name], flush=True)
    keep("judges", found)
    if STEPS:
        return
    assert found["reliable"]["kept"]
    assert found["reliable"]["report_says"] == ["a significant gain"]
    assert not found["random"]["kept"]
    assert "a significant gain" not in found["random"]["report_says"]
    assert found["random"]["report_says"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, questions to ask, and others that are held out."""
    folder = tmp_path_factory.mktemp("tiny")
    make_bundle(folder)
    write_records(folder / "data")
    write_colours(folder / "held_out", 12)
    return folder


def start_loop(tiny: Path, output: Path, judge: Remote) -> "subprocess.Popen[bytes]":
    """Start the command in a process of its own, on this session's cluster."""
    given = {
        "improve": {"benchmark": f"custom={tiny}/held_out", "output": output, "max_new_tokens": 8, "batch_size": 2},
        "model": {"model_name_or_path": tiny / "bundle"},
        "preferences": {
            **{"data_path": tiny / "data/data.json", "num_samples": 3, "max_new_tokens": 6, "cut_off": "keep"},
            **{"batch_size": 2},
        },
        "judge": {"model": "scripted", "base_url": judge.base_url, **PRICE},
        "data": {"cache_dir": tiny / "cache", "image_aspect_ratio": "pad"},
        "train": {"max_steps": 6, "global_batch_size": 2, "bf16": False, "zero_stage": 0, "save_steps": 2},
        "tracking": {"log_model": False},
        "actors": {"num_actors": 1, "cpus_per_actor": 0.5},
        "cluster": {"num_workers": 1, "address": ray.get_runtime_context().gcs_address},
    }
    flags = [f"--{section}.{key}={value}" for section, keys in given.items() for key, value in keys.items()]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "pipelines/improve.py"), *flags]
    with output.with_suffix(".log").open("ab") as log:
        environment = os.environ | {"PYTHONPATH": path}
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=tiny, env=environment)


def kill_when(condition: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Kill a process once a condition holds."""
    end = time.monotonic() + 300
    try:
        while not condition():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_driver_killed_in_each_stage_pays_and_repeats_nothing(tiny: Path, tmp_path: Path) -> None:
    with scripted_judge() as judge:
        calm = tmp_path / "calm"
        undisturbed = start_loop(tiny, calm, judge)
        assert undisturbed.wait(600) == 0, calm.with_suffix(".log").read_text()[-3000:]
        calls = len(judge.stats()["paid"])
        judge.play(hold_after=calls // 2)
        output, log = tmp_path / "out", tmp_path / "out.log"
        first, last = output / "round-0", output / "round-1"

        def lines(folder: Path, name: str) -> int:
            return sum(path.read_bytes().count(b"\n") for path in folder.rglob(name))

        def files(folder: Path, *names: str) -> dict[Path, bytes]:
            return {path: path.read_bytes() for name in names for path in sorted(folder.rglob(name))}

        moments: list[Callable[[], bool]] = [
            lambda: lines(first, "answers.jsonl") > 1,
            lambda: lines(last / "preferences", "sample.jsonl") > 2,
            lambda: judge.stats()["held"] > 0,
            lambda: lines(last / "tune", "metrics.jsonl") > 1,
            lambda: lines(last / "evaluate", "answers.jsonl") > 1,
        ]
        kept: list[dict[Path, bytes]] = []
        for number, moment in enumerate(moments):
            if number == 3:
                judge.call("/release", {})
            kill_when(moment, start_loop(tiny, output, judge), log)
            kept.append(files(output, "evaluate.json", "preferences.json", "tune.json"))
        held = judge.stats()
        assert start_loop(tiny, output, judge).wait(600) == 0, log.read_text()[-3000:]
        # What was finished when the process was killed is as it was: no stage ran again.
        for notes in kept:
            assert {path: path.read_bytes() for path in notes} == notes
        assert sum(map(len, kept)) >= 6
        assert judge.stats()["paid"] == held["paid"]  # all calls of this folder came before the last kills
        ledger = [json.loads(line) for line in (output / "ledger.jsonl").read_text().splitlines()]
        uncertain = sum(row.get("outcome", row["state"]) in ("uncertain", "refused") for row in ledger)
        assert sum(times - 1 for times in judge.stats()["paid"].values()) <= uncertain
        done = [row["key"] for row in ledger if row["state"] == "done"]
        assert len(done) == len(set(done)) == calls
        place = "round-1/preferences/preferences.jsonl"
        assert (output / place).read_bytes() == (calm / place).read_bytes()
        summaries = [json.loads((folder / "summary.json").read_text()) for folder in (calm, output)]
        bundles, scores = (
            [one["rounds"][0][a][b] for one in summaries] for a, b in (("tune", "bundle_hash"), ("evaluate", "score"))
        )
        assert bundles[0] == bundles[1]
        assert scores[0] == scores[1]
        keep("killed", {"kills": len(moments), "calls": calls, "uncertain": uncertain, "stages_repeated": 0})

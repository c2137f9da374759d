"""Sweeps as people start them, with real tiny trials: good, stopped, diverged, failed, killed, interrupted."""

import json
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from commands import in_terminal, kill_one, members, running
from mlflow import MlflowClient
from samples import small_run, write_recipe, write_samples

from llava_ray.sweep.ledger import read_ledger
from llava_ray.sweep.trials import ENDED

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
PATIENCE = 800

# Two rounds, to step 4 and to the end.
GRID = """
[sweep]
method = "grid"
scheduler = "halving"
reduction_factor = 4.0
include_default = false
[space]
"""
LENGTHS = """
"train.model_max_length" = { choice = [512, 12], when = { "train.learning_rate" = [1e-2] } }
"""
SPACE = f"""{GRID}
"train.learning_rate" = {{ choice = [1e-2, 1e30] }}
{LENGTHS}
"""
# More than run at a time, so that one has ended while another is in the middle.
LARGER_SPACE = f"""{GRID}
"train.learning_rate" = {{ choice = [1e-2, 1e-3, 1e-5, 1e30] }}
"model.mm_projector_type" = {{ choice = ["linear", "mlp2x_gelu"], when = {{ "train.learning_rate" = [1e-3] }} }}
{LENGTHS}
"""


def make_recipe(folder: Path, space: str = SPACE) -> Path:
    """A space of trials over a tiny model, of which one diverges and one finds no data that fits."""
    held_out = write_samples(folder / "held_out", 24, seed=5)
    base = {
        "data.vision_features": "cached",
        "held_out.path": str(held_out),
        "held_out.images": str(folder / "held_out/images"),
        "held_out.num_answers": 6,
        "held_out.max_new_tokens": 3,
        "train.num_train_epochs": 2,
        "train.save_steps": 4,
        "train.tokens_per_micro_batch": 512,
        "cluster.num_workers": 1,
        "cluster.cpus_per_worker": 1.0,
        "tracking.log_model": False,
    }
    recipe = write_recipe(folder, small_run(folder, **base))
    recipe.write_text(space + recipe.read_text())
    return recipe


def started(recipe: Path, pipeline: str, *flags: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """Start a pipeline."""
    command = [sys.executable, str(ROOT / f"pipelines/{pipeline}.py"), str(recipe), *flags]
    return running(command, recipe.parent / f"{pipeline}.log")


def finish(recipe: Path, pipeline: str, *flags: str) -> str:
    """Run a pipeline to its end and return what it said."""
    with started(recipe, pipeline, *flags) as process:
        code = process.wait(timeout=PATIENCE)
    said = (recipe.parent / f"{pipeline}.log").read_text()
    assert code == 0, said[-5000:]
    return said


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A sweep that nobody disturbed: its recipe, report and words."""
    recipe = make_recipe(tmp_path_factory.mktemp("sweep"))
    said = finish(recipe, "sweep", "--run.name", "swept")
    return recipe, json.loads((recipe.parent / "runs/swept/report.json").read_text()), said


def by_settings(trials: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {json.dumps(trial["settings"], sort_keys=True): trial for trial in trials}


def find(report: dict[str, Any], **settings: Any) -> dict[str, Any]:
    wanted = {key.replace("__", "."): value for key, value in settings.items()}
    return next(trial for trial in report["trials"] if wanted.items() <= trial["settings"].items())


def test_each_trial_is_shown_as_what_it_is_and_everything_is_given_back(swept):
    _, report, said = swept
    assert report["num_trials"] == 3
    assert report["clean"] is True
    diverged = find(report, train__learning_rate=1e30)
    assert diverged["state"] == "diverged"
    assert "the loss is" in diverged["reason"]
    failed = find(report, train__model_max_length=12)
    assert failed["state"] == "failed"
    assert "DataError" in failed["reason"]
    assert failed["attempts"] == 1
    good = [trial for trial in report["trials"] if trial["state"] == "finished"]
    assert [trial["attempts"] for trial in good] == [2]  # one for each round
    assert {trial["state"] for trial in report["trials"]} <= {"finished", "stopped", "diverged", "failed"}
    assert all(look["held_out_accuracy"] is not None for trial in good for look in trial["curve"])
    assert "Best: trial" in said
    page = (swept[0].parent / "runs/swept/report.html").read_text()
    assert "diverged: step" in page


def test_trials_are_mlflow_children_of_the_sweep(swept):
    recipe, report, _ = swept
    client = MlflowClient(f"sqlite:///{recipe.parent}/runs/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("llava_ray").experiment_id])
    parent = next(run for run in runs if run.info.run_name == "swept")
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.info.run_name for run in children} <= {trial["id"] for trial in report["trials"]}
    assert len(children) >= 2  # the one without data ended before it had a run
    assert all(run.info.status != "RUNNING" for run in [parent, *children])
    assert parent.data.metrics["held_out_loss"] == pytest.approx(report["best"]["held_out_loss"])


def test_features_were_computed_once_for_all(swept):
    recipe, _, _ = swept
    entries = list((recipe.parent / "cache/features").iterdir())
    assert len(entries) == 2  # what is learnt from, what is held out
    assert all((entry / "features.json").exists() for entry in entries)


def test_the_same_command_finds_a_sweep_done(swept):
    recipe, report, _ = swept
    finish(recipe, "sweep", "--run.name", "swept")
    again = json.loads((recipe.parent / "runs/swept/report.json").read_text())
    assert again["trials"] == report["trials"]
    assert again["best"] == report["best"]


@pytest.mark.verify
def test_the_best_recipe_by_hand_gives_the_trials_curve(swept):
    recipe, report, _ = swept
    best = recipe.parent / "runs/swept/best.toml"
    assert (recipe.parent / "runs/swept/best/model/llava.json").exists()
    log = recipe.parent / "finetune.log"
    with started(
        best, "finetune", "--run.name", "by-hand", "--run.storage_path", str(recipe.parent / "hand")
    ) as process:
        assert process.wait(timeout=PATIENCE) == 0, log.read_text()[-3000:] if log.exists() else ""

    def losses(folder: Path) -> list[float]:
        return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]

    trial = losses(recipe.parent / "runs/swept/trials" / report["best"]["id"])
    assert losses(recipe.parent / "hand/by-hand") == pytest.approx(trial, rel=1e-4)


def test_other_settings_under_the_same_name_are_refused(swept):
    recipe, _, _ = swept
    with started(recipe, "sweep", "--run.name", "swept", "--train.weight_decay", "0.2") as process:
        assert process.wait(timeout=100) == 1
    assert "train.weight_decay: 0.1 -> 0.2" in (recipe.parent / "sweep.log").read_text()


def final(folder: Path) -> dict[str, Any]:
    """What a sweep's table says, but for times and random names."""
    trials = json.loads((folder / "report.json").read_text())["trials"]
    return {
        key: {name: value for name, value in trial.items() if name in ("state", "seed", "curve", "settings")}
        for key, trial in by_settings(trials).items()
    }


def wait_for(condition: Any, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


# Both give a table that does not depend on which trial was faster.
@pytest.mark.verify
@pytest.mark.parametrize(("scheduler", "over"), [("none", "finished"), ("halving", "stopped")])
def test_a_driver_killed_in_the_middle_repeats_nothing_and_ends_with_the_same_table(tmp_path, scheduler, over):
    recipe = make_recipe(tmp_path, LARGER_SPACE)
    flags = ("--sweep.scheduler", scheduler)
    finish(recipe, "sweep", "--run.name", "whole", *flags)
    folder = tmp_path / "runs/killed"
    with started(recipe, "sweep", "--run.name", "killed", *flags) as process:
        # One has ended, and another has been seen once and is in the middle.
        wait_for(lambda: any(t.state == over for t in ledger_of(folder)))
        wait_for(lambda: any(t.state == "running" and 4 <= t.steps < 16 for t in ledger_of(folder)))
        process.kill()
    done = {t.id: t.attempts for t in ledger_of(folder) if t.state in ENDED}
    half = {t.id: t for t in ledger_of(folder) if t.state == "running" and t.steps}
    assert half
    time.sleep(8)  # the killed driver's cluster takes a few seconds to notice and go
    finish(recipe, "sweep", "--run.name", "killed", *flags)
    after = {trial.id: trial for trial in ledger_of(folder)}
    assert all(after[name].attempts == attempts for name, attempts in done.items())
    for name, before in half.items():
        assert after[name].attempts == before.attempts + 1
        ledger = [
            json.loads(line)["step"] for line in (folder / "trials" / name / "ledger.jsonl").read_text().splitlines()
        ]
        assert ledger == list(range(16))
    left, right = final(folder), final(tmp_path / "runs/whole")
    assert left.keys() == right.keys()
    for key, trial in left.items():
        assert (trial["state"], trial["seed"]) == (right[key]["state"], right[key]["seed"])
        for mine, theirs in zip(trial["curve"], right[key]["curve"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4)


# Tune would end each trial in order after Ctrl-C, which looks like one that was stopped for good.
@pytest.mark.verify
def test_ctrl_c_in_a_terminal_keeps_every_trial(tmp_path):
    recipe = make_recipe(tmp_path, f'{GRID}"train.learning_rate" = {{ choice = [1e-2, 1e-3] }}\n')
    folder, screen = tmp_path / "runs/interrupted", tmp_path / "screen.log"
    flags = ("--run.name", "interrupted", "--sweep.scheduler", "none", "--sweep.max_concurrent_trials", "2")
    command = [sys.executable, str(ROOT / "pipelines/sweep.py"), str(recipe), *flags]
    with in_terminal(command, screen) as (process, press):
        wait_for(lambda: len(ledger_of(folder)) == 2 and any(4 <= t.steps < 16 for t in ledger_of(folder)))
        pressed = time.monotonic()
        press(b"\x03")
        assert process.wait(timeout=100) == 130, screen.read_text()[-3000:]
        seconds = time.monotonic() - pressed
        wait_for(lambda: not members(process.pid), 60)
    assert "Once more to leave at once" in screen.read_text()
    assert "Stopped. The same command goes on" in screen.read_text()
    assert "Traceback" not in screen.read_text()
    half = ledger_of(folder)
    print(f"left after {seconds:.1f} s: {[(t.state, t.steps) for t in half]}")
    assert [t.state for t in half] == ["running", "running"]
    finish(recipe, "sweep", *flags)
    after = ledger_of(folder)
    assert [(t.id, t.state, t.attempts, t.steps) for t in after] == [(t.id, "finished", 2, 16) for t in half]
    for trial in after:
        lines = (folder / "trials" / trial.id / "ledger.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(16))


def ledger_of(folder: Path) -> list[Any]:
    return read_ledger(str(folder)) if folder.exists() else []


@pytest.mark.verify
def test_a_trial_whose_processes_are_killed_goes_on_and_the_sweep_ends(tmp_path):
    recipe = make_recipe(tmp_path, LARGER_SPACE)
    folder = tmp_path / "runs/wounded"
    with started(recipe, "sweep", "--run.name", "wounded", "--sweep.scheduler", "none") as process:
        wait_for(lambda: any(t.state == "running" and t.steps >= 4 for t in ledger_of(folder)))
        killed = kill_one("ray::trial", process.pid) or kill_one("ray::ImplicitFunc", process.pid)
        assert killed
        assert process.wait(timeout=PATIENCE) == 0, (tmp_path / "sweep.log").read_text()[-3000:]
    trials = ledger_of(folder)
    assert [t for t in trials if t.attempts == 2]
    assert all(t.state == "finished" for t in trials if t.attempts == 2)

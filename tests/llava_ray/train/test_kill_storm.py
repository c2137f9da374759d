"""Runs whose processes are killed and stopped from outside: nothing that was committed is lost, and nothing repeats."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from subprocess import Popen

import pytest
from commands import members, running
from samples import small_run, write_recipe

from llava_ray.train.runs import SNAPSHOT, SNAPSHOT_COPY

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[3]
RESULT = ROOT / "tests/benchmarks/results/kill_storm.json"
PATIENCE = 600  # seconds until a checkpoint must have come, on a machine that has much to do
WORKER, CONTROLLER = "ray::RayTrainWorker", "ray::TrainController"


def read_log(recipe: Path, name: str) -> str:
    """Return what the command said."""
    return (recipe.parent / f"{name}.log").read_text(errors="replace")


def started(recipe: Path, name: str, *flags: str) -> AbstractContextManager[Popen[bytes]]:
    """Start the tuning command as a run of that name."""
    command = [sys.executable, str(ROOT / "pipelines/finetune.py"), str(recipe), "--run.name", name, *flags]
    return running(command, recipe.parent / f"{name}.log")


def committed(recipe: Path, name: str) -> int:
    """Return the step of the run's committed checkpoint."""
    for file in (SNAPSHOT, SNAPSHOT_COPY):  # a look just while Ray rewrites its own finds it torn
        try:
            snapshot = json.loads((recipe.parent / "runs" / name / file).read_text())
            return max(int(row["checkpoint_dir_name"].removeprefix("step-")) for row in snapshot["checkpoint_results"])
        except (OSError, ValueError):
            continue
    return 0


def wait_until(
    process: Popen[bytes], is_true: Callable[[], bool], recipe: Path, name: str, patience: float = PATIENCE
) -> float:
    """Wait for a condition while a process runs, and return the seconds that it took."""
    start = time.monotonic()
    while not is_true():
        waiting = process.poll() is None and time.monotonic() - start < patience
        assert waiting, read_log(recipe, name)[-3000:]
        time.sleep(0.1)
    return time.monotonic() - start


def ledger(recipe: Path, name: str) -> bytes:
    """Return a run's ledger."""
    return (recipe.parent / "runs" / name / "ledger.jsonl").read_bytes()


def losses(recipe: Path, name: str) -> list[float]:
    """Return the loss of every step."""
    lines = (recipe.parent / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.timeout(1500)
def test_a_rank_that_is_stopped_is_named_with_the_stacks_of_the_others_and_replaced(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        small_run(tmp_path, **{"train.num_train_epochs": 60, "train.save_steps": 4, "tracking.log_model": False}),
    )
    name = "stopped"
    with started(recipe, name, "--run.hang_minutes", "0.2") as process:
        wait_until(process, lambda: committed(recipe, name) >= 4, recipe, name)
        victims = sorted(number for number, title in members(process.pid).items() if title.startswith(WORKER))
        os.kill(victims[1], signal.SIGSTOP)
        before = committed(recipe, name)
        took = wait_until(process, lambda: committed(recipe, name) > before + 4, recipe, name, 180)
        assert not set(victims) & set(members(process.pid)), "the stopped process and its peer are gone"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=90) == 130
    said = read_log(recipe, name)
    assert took < 180
    assert "No worker makes progress" in said
    assert f"(pid {victims[1]} on" in said
    assert "does not answer" in said
    assert "loop.py" in said, "the stack of the rank that waits for it"

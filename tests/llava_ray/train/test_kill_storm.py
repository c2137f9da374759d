"""Runs whose processes are killed and stopped from outside: nothing that was committed is lost, and nothing repeats."""

import json
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
from commands import kill_one, members, running
from samples import small_run, write_recipe
from watched_runs import committed, ledger

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[3]
RESULT = ROOT / "tests/benchmarks/results/kill_storm.json"
PATIENCE = 600  # seconds until a checkpoint must have come, on a machine that has much to do
WORKER, CONTROLLER = "ray::RayTrainWorker", "ray::LocalController"


def read_log(recipe: Path, name: str) -> str:
    """Return what the command said."""
    return (recipe.parent / f"{name}.log").read_text(errors="replace")


def started(recipe: Path, name: str, *flags: str) -> AbstractContextManager[Popen[bytes]]:
    """Start the tuning command as a run of that name."""
    command = [sys.executable, str(ROOT / "pipelines/finetune.py"), str(recipe), "--run.name", name, *flags]
    return running(command, recipe.parent / f"{name}.log")


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


LORA = {"lora.lora_enable": True, "lora.lora_r": 4, "lora.lora_alpha": 8}
CASES: dict[str, dict[str, Any]] = {
    "full, ZeRO 2": {"train.zero_stage": 2},
    "full, ZeRO 3": {"train.zero_stage": 3},
    "LoRA, ZeRO 2": LORA | {"train.zero_stage": 2},
    "LoRA, ZeRO 3": LORA | {"train.zero_stage": 3},
    "QLoRA, ZeRO 2": LORA | {"train.zero_stage": 2, "lora.bits": 4},
}
DRIVER = "driver"
# Of each case: whom a SIGKILL meets, and whether while a checkpoint is being written.
KILLS = [(WORKER, False), (WORKER, True), (CONTROLLER, False), (DRIVER, True), (WORKER, False), (DRIVER, False)]
EPOCHS, STEPS = 12, 96
SETTLED_S = 6.0  # until what a killed driver had started has noticed and gone


@pytest.fixture(scope="module")
def storm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data and models of all cases."""
    folder = tmp_path_factory.mktemp("storm")
    small_run(folder)
    return folder


def make_recipe(folder: Path, case: str) -> Path:
    """Write the recipe of a case into a folder of its own and return its path."""
    changes = {"train.num_train_epochs": EPOCHS, "train.save_steps": 4, "tracking.log_model": False}
    config = small_run(folder, **changes | CASES[case])
    own = folder / case.replace(" ", "").replace(",", "-")
    own.mkdir()
    return write_recipe(own, config.replaced({"run.storage_path": str(own / "runs")}))


@pytest.fixture(scope="module")
def undisturbed(storm_folder: Path) -> tuple[bytes, list[float]]:
    """Ledger and losses of a run that nobody disturbed; the plan is the same in all cases."""
    (storm_folder / "undisturbed").mkdir()
    config = small_run(storm_folder, **{"train.num_train_epochs": EPOCHS, "tracking.log_model": False})
    recipe = write_recipe(
        storm_folder / "undisturbed", config.replaced({"run.storage_path": str(storm_folder / "undisturbed/runs")})
    )
    with started(recipe, "undisturbed") as process:
        assert process.wait(timeout=1200) == 0, read_log(recipe, "undisturbed")[-3000:]
    return ledger(recipe, "undisturbed"), losses(recipe, "undisturbed")


@pytest.fixture(scope="module")
def results() -> Iterator[list[dict[str, Any]]]:
    """All kills, saved at the end."""
    sys.path.append(str(RESULT.parents[1]))
    rows: list[dict[str, Any]] = []
    yield rows
    result = {
        "command": "pytest -m verify tests/llava_ray/train/test_kill_storm.py",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "kills": len(rows),
        "median_seconds_to_next_checkpoint": statistics.median(row["seconds"] for row in rows) if rows else None,
        "rows": rows,
    }
    from outcome import keep_result  # of tests/benchmarks

    keep_result(result, RESULT if len(rows) >= len(CASES) * len(KILLS) else None)


@pytest.mark.verify
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CASES)
def test_a_storm_of_kills_loses_nothing_that_was_committed(
    case: str, storm_folder: Path, undisturbed: tuple[bytes, list[float]], results: list[dict[str, Any]]
) -> None:
    if "QLoRA" in case:
        pytest.importorskip("bitsandbytes")
    recipe, draw = make_recipe(storm_folder, case), random.Random(case)
    rows: list[dict[str, Any]] = []
    while len(rows) < len(KILLS) or committed(recipe, "stormy") < STEPS:
        with started(recipe, "stormy", "--run.max_failures", "-1") as process:
            for victim, saving in KILLS[len(rows) :]:
                rows.append(
                    {"case": case, "victim": victim, "saving": saving} | strike(process, recipe, victim, saving, draw)
                )
                if victim != WORKER:
                    break
            else:
                assert process.wait(timeout=1200) == 0, read_log(recipe, "stormy")[-3000:]
                break
            process.wait(timeout=120)
        time.sleep(SETTLED_S)
    results += rows
    assert [row for row in rows if row["after"] < row["before"]] == [], "a committed checkpoint was lost"
    assert ledger(recipe, "stormy") == undisturbed[0]
    if case == "full, ZeRO 2":
        assert losses(recipe, "stormy") == pytest.approx(undisturbed[1], rel=1e-5)
    assert not list(Path(tempfile.gettempdir()).glob("llava_ray-stormy-*/step-*")), "nothing half-written is left"


def strike(process: Popen[bytes], recipe: Path, victim: str, saving: bool, draw: random.Random) -> dict[str, Any]:
    """Send SIGKILL to a process of a run once it has saved again; return what was committed before and after."""
    name, before = "stormy", committed(recipe, "stormy")
    started_at = time.monotonic()
    wait_until(process, lambda: committed(recipe, name) > before, recipe, name)
    seconds = time.monotonic() - started_at
    caught = False
    if saving:
        end = time.monotonic() + 60
        while not caught and time.monotonic() < end:
            caught = bool(list(Path(tempfile.gettempdir()).glob(f"llava_ray-{name}-*/step-*/zero/*.pt")))
    else:
        time.sleep(draw.uniform(0, 2))
    before = committed(recipe, name)
    if victim == DRIVER:
        process.kill()
    else:
        assert kill_one(victim, process.pid, draw.randrange(2))
    time.sleep(0.5)
    return {"before": before, "after": committed(recipe, name), "caught_saving": caught, "seconds": round(seconds, 1)}

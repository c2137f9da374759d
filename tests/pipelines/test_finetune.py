"""The tuning command as people start it: alone, interrupted, killed, and as a job on a real cluster."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from commands import free_port, kill_one, members, running
from samples import small_run, write_recipe
from watched_runs import committed, ledger

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
# What Ray, DeepSpeed and transformers say of themselves.
NOISE = re.compile(r".*(?:WARNING|INFO|\(\w* ?pid=|real_accelerator|core_worker|DeprecationWarning|SIGTERM received).*")
PATIENCE = 240  # seconds until a checkpoint must have come


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run long enough to be killed in: 48 short steps, a checkpoint every four."""
    folder = tmp_path_factory.mktemp("finetune")
    changes = {"train.num_train_epochs": 6, "train.save_steps": 4, "tracking.log_model": False}
    return write_recipe(folder, small_run(folder, **changes))


def started(recipe: Path, name: str, *flags: str, **variables: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """Start the command as a run of that name."""
    command = [sys.executable, str(ROOT / "pipelines/finetune.py"), str(recipe), "--run.name", name, *flags]
    return running(command, recipe.parent / f"{name}.log", **variables)


def finish(recipe: Path, name: str) -> None:
    """Run the command to its end."""
    with started(recipe, name) as process:
        code = process.wait(timeout=400)
    assert code == 0, (recipe.parent / f"{name}.log").read_text()[-3000:]


def wait_for_step(recipe: Path, name: str, step: int) -> None:
    """Wait until a checkpoint of at least ``step`` is committed."""
    end = time.monotonic() + PATIENCE
    while committed(recipe, name) < step:
        assert time.monotonic() < end, (recipe.parent / f"{name}.log").read_text()[-3000:]
        time.sleep(0.1)


@pytest.fixture(scope="module")
def submitted(recipe: Path) -> str:
    """What a job on a real cluster said of a run that nobody disturbed."""
    gcs, dashboard = free_port(), free_port()
    environment = os.environ | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    ray = str(Path(sys.executable).parent / "ray")
    head = [ray, "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}", "--num-cpus=3"]
    ports = [f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"]
    job = [ray, "job", "submit", "--working-dir", ".", "--"]
    script = recipe.parent / "job.sh"
    imported = "import llava_ray.data.chunks as chunks; print('imported', chunks.__file__)"
    script.write_text(
        f'PYTHONPATH=. {sys.executable} -c "{imported}"\n'
        f"exec {sys.executable} pipelines/finetune.py {recipe} --run.name undisturbed\n"
    )
    entry = ["sh", str(script)]
    with running([*head, *ports, "--disable-usage-stats"], recipe.parent / "head.log") as cluster:
        try:
            wait_for_port(dashboard)
            done = subprocess.run(
                [*job, *entry], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
            )
        finally:  # in this order, so that Ray ends its own processes
            os.killpg(cluster.pid, signal.SIGTERM)
            cluster.wait(timeout=60)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, submitted: str) -> bytes:
    """The ledger of the run that nobody disturbed."""
    return ledger(recipe, "undisturbed")


def test_a_job_submitted_to_a_real_cluster_trains_and_says_where_the_results_are(recipe, submitted, undisturbed):
    for line in ("joined", "Finished: 48 steps", "model ", "ledger ", "metrics ", "mlflow ui --backend-store-uri"):
        assert line in submitted
    assert re.search(r"imported \S+/_ray_pkg_\w+/llava_ray/data/chunks.py", submitted)  # not what is installed here
    assert (recipe.parent / "runs/undisturbed/model/llava.json").exists()
    assert len(undisturbed.splitlines()) == 48


def test_ctrl_c_and_kills_of_a_worker_and_of_the_driver_leave_the_same_ledger(recipe, undisturbed):
    with started(recipe, "stopped") as process:
        wait_for_step(recipe, "stopped", 4)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
    interrupted = committed(recipe, "stopped")
    assert 4 <= interrupted < 48
    said = (recipe.parent / "stopped.log").read_text()
    assert f"Stopped. The same command resumes from step {interrupted} of 48; its checkpoint is saved." in said
    assert len(ledger(recipe, "stopped").splitlines()) == interrupted
    assert mlflow_status(recipe, "stopped") == "KILLED"
    assert not NOISE.findall(said)
    named = re.search(r"the libraries' own lines go to (\S+\.log)", said)
    assert named
    assert Path(named[1]).is_file()
    with started(recipe, "stopped") as process:
        wait_for_step(recipe, "stopped", interrupted + 4)
        assert kill_one("ray::RayTrainWorker", process.pid)
        wounded = committed(recipe, "stopped")
        wait_for_step(recipe, "stopped", wounded + 8)  # the run has gone on by itself
        assert process.poll() is None
        process.kill()
    wait_for_end(process.pid)
    assert committed(recipe, "stopped") >= wounded + 8
    finish(recipe, "stopped")
    log = (recipe.parent / "stopped.log").read_text()
    assert "Stopped. The same command resumes" in log
    assert "Finished: 48 steps" in log
    assert ledger(recipe, "stopped") == undisturbed
    assert read_losses(recipe, "stopped") == pytest.approx(read_losses(recipe, "undisturbed"), rel=1e-5)


def wait_for_end(session: int) -> None:
    """Wait until what a killed driver had started has noticed and gone."""
    end = time.monotonic() + PATIENCE
    while left := members(session):
        assert time.monotonic() < end, left
        time.sleep(0.1)


def mlflow_status(recipe: Path, name: str) -> str:
    """Return how MLflow says that a run ended."""
    with contextlib.closing(sqlite3.connect(recipe.parent / "runs/mlflow.db")) as store:
        [(status,)] = store.execute("select status from runs where name = ?", (name,)).fetchall()
    return str(status)


def read_losses(recipe: Path, name: str) -> list[float]:
    """Return a run's losses."""
    path = recipe.parent / "runs" / name / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


@pytest.mark.verify
@pytest.mark.timeout(1800)
def test_a_storm_of_kills_leaves_the_same_ledger(recipe, undisturbed):
    draw = random.Random(0)
    with started(recipe, "stormy", "--run.max_failures", "-1") as process:
        for step in (4, 12, 20, 28, 36):
            wait_for_step(recipe, "stormy", step)
            time.sleep(draw.uniform(0, 0.5))
            if committed(recipe, "stormy") < 48:
                assert kill_one("ray::RayTrainWorker", process.pid, draw.randrange(2))
        assert process.wait(timeout=600) == 0, (recipe.parent / "stormy.log").read_text()[-3000:]
    assert ledger(recipe, "stormy") == undisturbed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own that can be filled up."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a full disk needs the right to mount one: run as root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.verify
def test_a_full_disk_stops_the_run_with_its_remedy_and_loses_nothing(recipe, undisturbed, small_disk):
    flags = ("--run.max_failures", "0")
    # Ray's own files stay where they are: a socket's path must be short.
    with started(recipe, "full", *flags, TMPDIR=str(small_disk), RAY_TMPDIR="/tmp") as process:
        wait_for_step(recipe, "full", 4)
        # The run writes at the same time: whoever comes last has no room.
        with contextlib.suppress(OSError), (small_disk / "filler").open("wb") as filler:
            while free_bytes(small_disk) > 4096:
                filler.write(b"0" * 4096)
                filler.flush()
        assert process.wait(timeout=300) == 1
    log = (recipe.parent / "full.log").read_text()
    assert "CheckpointError: cannot write the checkpoint of step" in log
    assert "free some space or set TMPDIR" in log
    assert committed(recipe, "full") >= 4
    finish(recipe, "full")
    assert ledger(recipe, "full") == undisturbed


def free_bytes(folder: Path) -> int:
    """Return the free bytes of a disk."""
    return shutil.disk_usage(folder).free


def wait_for_port(port: int) -> None:
    """Wait until somebody listens."""
    end = time.monotonic() + 90
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError(f"nobody listens on port {port}")

#!/usr/bin/env python
"""A run's start: seconds and core-seconds of every process from exec to the end of the first optimiser step.

python tests/benchmarks/bench_startup.py --output tests/benchmarks/results/startup.json

Needs a folder in which the quickstart has run: its data are prepared, its models are there. The run itself has a new
folder, with a copy of the quickstart's MLflow store if there is one. Everything that descends from the command counts,
Ray's own processes too.
"""

import argparse
import contextlib
import datetime
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outcome import keep_result

ROOT = Path(__file__).parents[2]
TARGET_SECONDS, TARGET_CORE_SECONDS = 15.0, 30.0
SAMPLE_S = 0.05
PATIENCE_S = 240.0
LAST_ONES_S = 60.0
FIRST_STEP = re.compile(r"First step done at (\S+),")  # said by the run's recorder
TICK = 1 / os.sysconf("SC_CLK_TCK")

# What a process is called in the table, by a part of its command line or title.
NAMES = {
    "bench_startup": "",
    "gcs_server": "Ray: gcs_server",
    "raylet/raylet": "Ray: raylet",
    "dashboard/dashboard.py": "Ray: dashboard",
    "dashboard/agent.py": "Ray: dashboard agent",
    "runtime_env/agent": "Ray: runtime-env agent",
    "log_monitor.py": "Ray: log monitor",
    "monitor.py": "Ray: autoscaler's monitor",
    "process_reaper": "Ray: reaper",
    "finetune.py": "driver",
    "llava-ray: forks": "fork server",
    "llava-ray: owns": "owner of the cluster",
    "setup_worker.py": "Ray: starting a worker",
    "default_worker.py": "Ray: starting a worker",
    "forked_worker.py": "asking for a fork",
    "ray::": "",
}


@dataclass
class Process:
    """One process: its names over time and its CPU time, in samples."""

    pid: int
    title: str = ""
    samples: list[tuple[float, float]] = field(default_factory=list)

    def seconds_until(self, moment: float) -> float:
        """Return its CPU time at a moment."""
        return max((used for at, used in self.samples if at <= moment), default=0.0)


class Watch:
    """Sample the CPU time of a process and of everything that descends from it, in a thread."""

    def __init__(self, root: int) -> None:
        """Start to watch."""
        self.root = root
        self.processes: dict[tuple[int, str], Process] = {}
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self.ended.wait(SAMPLE_S):
            self.sample()

    def sample(self) -> None:
        """Read /proc once."""
        now, table = time.time(), {}
        for entry in os.listdir("/proc"):  # noqa: PTH208 - twenty times a second
            if entry.isdigit():
                with contextlib.suppress(OSError), open(f"/proc/{entry}/stat") as file:  # noqa: PTH123
                    table[int(entry)] = file.read().rpartition(")")[2].split()
        known = {pid for pid, _ in self.processes}
        inside = {self.root}
        grown = True
        while grown:  # a process whose parent has died belongs to the benchmark, which adopts it
            more = {
                pid
                for pid, fields in table.items()
                if int(fields[1]) in inside or (pid in known or int(fields[1]) == os.getpid())
            }
            grown = not more <= inside
            inside |= more
        inside.discard(os.getpid())
        for pid in inside & table.keys():
            fields = table[pid]
            process = self.processes.setdefault((pid, fields[19]), Process(pid))
            process.samples.append((now, (int(fields[11]) + int(fields[12])) * TICK))
            process.title = self._title(pid) or process.title

    def _title(self, pid: int) -> str:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            return ""
        return words

    def close(self) -> None:
        """Stop watching."""
        self.ended.set()
        self.thread.join()


def name_of(title: str) -> str:
    """Return a process's line in the table."""
    for part, name in NAMES.items():
        if part in title:
            return name or title.split()[0]
    return title[:60] or "?"


def start_once(folder: Path, recipe: str, extra: list[str]) -> dict[str, Any]:
    """Run to the end of the first step, and stop."""
    wait_for_the_last_one()
    with tempfile.TemporaryDirectory() as storage:
        store = folder / "runs/quickstart/mlflow.db"
        if store.exists():  # the quickstart's stages before have made it
            shutil.copy(store, storage)
        command = [sys.executable, str(ROOT / "pipelines/finetune.py"), str(ROOT / recipe)]
        command += [*quickstarts_arguments(folder), "--run.storage_path", storage, *extra]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
        began = time.time()
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        watch = Watch(process.pid)
        ended = None
        patience = threading.Timer(PATIENCE_S, process.kill)
        patience.start()
        lines = []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            found = FIRST_STEP.search(line)
            if found and ended is None:
                ended = moment_of(found[1], began)
                process.send_signal(signal.SIGINT)
        code = process.wait()
        patience.cancel()
        watch.close()
    if ended is None:
        raise SystemExit(f"the run ended with {code} before its first step:\n{''.join(lines)[-3000:]}")
    return summarise(watch, began, ended)


def wait_for_the_last_one() -> None:
    """Wait until no process of an earlier start is left: it would count as one of this."""
    with contextlib.suppress(ChildProcessError):
        end = time.monotonic() + LAST_ONES_S
        while time.monotonic() < end:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(SAMPLE_S)


def quickstarts_arguments(folder: Path) -> list[str]:
    """Return what the quickstart adds to the recipe of its tune: the images, and the projector of its stage before."""
    from llava_ray.quickstart import easy_vqa

    aligned = sorted((folder / "runs/quickstart").glob("align-*/model"), key=lambda path: path.stat().st_mtime)
    if not aligned:
        raise SystemExit(f"{folder}/runs/quickstart holds no align-…: run the quickstart there first")
    images = str(easy_vqa.image_folder("train"))
    return ["--data.image_folder", images, "--model.pretrain_mm_mlp_adapter", str(aligned[-1].resolve())]


def moment_of(clock: str, began: float) -> float:
    """Return the time of a clock's reading after ``began``."""
    day = datetime.datetime.fromtimestamp(began).date()
    return datetime.datetime.combine(day, datetime.time.fromisoformat(clock)).timestamp()


def summarise(watch: Watch, began: float, ended: float) -> dict[str, Any]:
    """Return seconds and core-seconds, process by process."""
    seconds: dict[str, float] = defaultdict(float)
    number: dict[str, int] = defaultdict(int)
    for process in watch.processes.values():
        used = process.seconds_until(ended)
        if process.samples and process.samples[0][0] <= ended:
            seconds[name_of(process.title)] += used
            number[name_of(process.title)] += 1
    table = {
        name: {"processes": number[name], "core_seconds": round(used, 2)}
        for name, used in sorted(seconds.items(), key=lambda item: -item[1])
        if used >= 0.01
    }
    return {
        "seconds": round(ended - began, 2),
        "core_seconds": round(sum(seconds.values()), 2),
        "processes": table,
    }


def adopt_orphans() -> None:
    """Become the parent of descendants whose parent ends, so that they are seen (PR_SET_CHILD_SUBREAPER)."""
    import ctypes

    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def main() -> None:
    """Measure some starts and keep the median one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where the quickstart has run")
    parser.add_argument("--recipe", default="pipelines/recipes/quickstart/tune.toml")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options, extra = parser.parse_known_args()
    adopt_orphans()
    starts = []
    for _ in range(options.repeats):
        starts.append(start_once(options.folder, options.recipe, extra))
        print(render(starts[-1]), flush=True)
    seconds = [start["seconds"] for start in starts]
    used = [start["core_seconds"] for start in starts]
    middle = sorted(starts, key=lambda start: start["core_seconds"])[len(starts) // 2]
    result = {
        "what": "from exec to the end of the first optimiser step of the quickstart's tune, no Ray running",
        "seconds": statistics.median(seconds),
        "target_seconds": TARGET_SECONDS,
        "core_seconds": statistics.median(used),
        "target_core_seconds": TARGET_CORE_SECONDS,
        "all_seconds": seconds,
        "all_core_seconds": used,
        "processes": middle["processes"],
        "command": " ".join(["python tests/benchmarks/bench_startup.py", *sys.argv[1:]]),
        "machine": f"{processor()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
    }
    keep_result(result, options.output)


def processor() -> str:
    """Return the processor's name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    found = re.search(r"model name\s*:\s*(.*)", text)
    return found[1] if found else platform.machine()


def render(start: dict[str, Any]) -> str:
    """Return one start as a table."""
    lines = [f"{start['seconds']:.1f} s, {start['core_seconds']:.1f} core-seconds"]
    lines += [
        f"  {row['core_seconds']:7.2f}  {row['processes']:3d} x {name}" for name, row in start["processes"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

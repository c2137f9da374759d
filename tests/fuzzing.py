"""Seeded fuzzing: inputs made from numbers go through one function in a child process that can be killed.

A fuzzer is a module-level ``make_target`` without arguments. It sets up what all inputs share and returns a function
from a seed to a word that says what came of that seed's input ("read", "400"). Errors of our own tree are an outcome
too. Everything else fails: any other exception, more than ``HANG_S`` for one input, more than ``GROWTH_BYTES`` of
memory above what the child held before its first input.
"""

import json
import multiprocessing
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from llava_ray.errors import LlavaRayError

NUM_INPUTS = 500  # in `make test`
NUM_PROOF_INPUTS = 20_000  # in `make verify`
HANG_S = 10.0
GROWTH_BYTES = 2**30
POLL_S = 0.05
SETUP_S = 120.0
RESULTS = Path(__file__).parent / "benchmarks" / "results"
MAX_FAULTS = 20  # a fuzzer that fails this often has said enough

Target = Callable[[int], str]


@dataclass
class FuzzReport:
    """What came of all inputs, and the seeds of those that must not happen again."""

    name: str
    num_inputs: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)
    hangs: list[int] = field(default_factory=list)
    growths: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    largest_growth_mb: float = 0.0
    seconds: float = 0.0

    @property
    def faults(self) -> list[str]:
        """Return everything that fails the fuzzer, each with its seed."""
        return [*self.foreign, *(f"seed {seed}: hung" for seed in self.hangs), *self.growths]

    def save(self, path: Path) -> None:
        """Write the report as JSON, with the command that made it."""
        command = " ".join(["pytest", *sys.argv[1:]])
        path.write_text(json.dumps({"command": command, **asdict(self)}, indent=1) + "\n")


def fuzz(name: str, make_target: Callable[[], Target], num_inputs: int, first_seed: int = 0) -> FuzzReport:
    """Run ``num_inputs`` seeds in a child; start another one behind an input that hung or grew too large."""
    report, outcomes, started = FuzzReport(name), Counter[str](), time.monotonic()
    seed, end = first_seed, first_seed + num_inputs
    while seed < end and len(report.faults) < MAX_FAULTS:
        seed = _run_child(make_target, seed, end, report, outcomes)
    report.num_inputs = seed - first_seed
    report.outcomes = dict(outcomes.most_common())
    report.seconds = round(time.monotonic() - started, 1)
    return report


def fuzz_at_length(name: str, make_target: Callable[[], Target], num_inputs: int = NUM_PROOF_INPUTS) -> FuzzReport:
    """Run the inputs of a proof, and keep what came of them with the benchmarks' results."""
    report = fuzz(name, make_target, num_inputs)
    report.save(RESULTS / f"fuzz_{name}.json")
    return report


def _run_child(
    make_target: Callable[[], Target], seed: int, end: int, report: FuzzReport, outcomes: Counter[str]
) -> int:
    """Run seeds in one child until it has done all or must be killed; return the next seed."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(make_target, seed, end, theirs), daemon=False)
    child.start()
    theirs.close()
    process, baseline, since = psutil.Process(child.pid), 0, time.monotonic()
    try:
        while seed < end:
            if ours.poll(POLL_S):
                try:
                    kind, value = ours.recv()
                except EOFError:
                    report.foreign.append(f"seed {seed}: the process died with exit code {_exit_code(child)}")
                    return seed + 1
                now = time.monotonic()
                if kind == "ready":
                    baseline = value
                else:
                    seconds = now - since
                    report.slowest_s = round(max(report.slowest_s, seconds), 3)
                    num_growths = len(report.growths)
                    _count(kind, value, seed, baseline, report, outcomes)
                    seed += 1
                    # A peak is never forgotten: the next inputs get a child of their own.
                    if len(report.growths) > num_growths or len(report.faults) >= MAX_FAULTS:
                        return seed
                since = now
                continue
            if not baseline:
                if time.monotonic() - since > SETUP_S:
                    raise TimeoutError(f"the fuzzer {report.name} did not set up within {SETUP_S:g} s")
                continue
            if time.monotonic() - since > HANG_S:
                report.hangs.append(seed)
                return seed + 1
            growth = _resident_bytes(process) - baseline
            if growth > GROWTH_BYTES:
                report.growths.append(f"seed {seed}: memory grew by {growth / 1e6:,.0f} MB")
                return seed + 1
    finally:
        _kill_tree(process)
        child.join()
        ours.close()
    return seed


def _count(
    kind: str, value: tuple[str, int], seed: int, baseline: int, report: FuzzReport, outcomes: Counter[str]
) -> None:
    word, peak = value
    growth = peak - baseline
    report.largest_growth_mb = round(max(report.largest_growth_mb, growth / 1e6), 1)
    if growth > GROWTH_BYTES:
        report.growths.append(f"seed {seed}: memory grew by {growth / 1e6:,.0f} MB")
    if kind == "foreign":
        report.foreign.append(f"seed {seed}: {word}")
    else:
        outcomes[word] += 1


def _child(make_target: Callable[[], Target], seed: int, end: int, pipe: Connection) -> None:
    target = make_target()
    pipe.send(("ready", _peak_bytes()))
    for number in range(seed, end):
        try:
            kind, word = "done", target(number)
        except LlavaRayError as error:
            kind, word = "done", type(error).__name__
        except BaseException:  # noqa: BLE001 - what it was is the finding
            kind, word = "foreign", traceback.format_exc(limit=-4)
        pipe.send((kind, (word, _peak_bytes())))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _resident_bytes(process: psutil.Process) -> int:
    total = 0
    for one in [process, *_children(process)]:
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _kill_tree(process: psutil.Process) -> None:
    for one in [*_children(process), process]:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue


def _exit_code(child: multiprocessing.process.BaseProcess) -> int | None:
    child.join(5)
    return child.exitcode

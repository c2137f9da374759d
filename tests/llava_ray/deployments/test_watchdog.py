"""A process whose event loop stands still is killed; one whose loop turns is left alone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from llava_ray.deployments import watchdog

pytestmark = pytest.mark.slow

PERIOD_S, PERIODS = 0.1, 10
CODE = f"""
import asyncio, runpy, sys, time
start_watchdog = runpy.run_path({watchdog.__file__!r})["start_watchdog"]

async def main():
    watchdog = start_watchdog({PERIOD_S}, {PERIODS})
    await asyncio.sleep(0)
    print("here", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    time.sleep(60)  # in the event loop

asyncio.run(main())
"""


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", CODE]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        yield process
        process.kill()


def children(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children() if child.status() != psutil.STATUS_ZOMBIE]


def until(condition: Callable[[], bool], seconds: float) -> float:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "too late"
        time.sleep(0.01)
    return time.monotonic() - start


def ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def hang(process: subprocess.Popen[str]) -> None:
    """Let the event loop sleep."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def stop(process: subprocess.Popen[str]) -> None:
    """Stop every thread."""
    process.send_signal(signal.SIGSTOP)


@pytest.mark.parametrize("silence", [hang, stop])
def test_a_process_that_stands_still_is_killed(
    process: subprocess.Popen[str], silence: Callable[[subprocess.Popen[str]], None]
) -> None:
    (child,) = children(process.pid)
    silence(process)
    seconds = until(lambda: process.poll() is not None, 10)
    assert process.returncode == -signal.SIGKILL
    assert seconds > PERIOD_S * (PERIODS - 2)
    until(lambda: ended(child), 2)
    assert process.stderr is not None
    assert process.stderr.read() == f"replica process {process.pid} hung for 1 s: killed\n"


def test_one_that_turns_or_pauses_is_not(process: subprocess.Popen[str]) -> None:
    for _ in range(2):
        time.sleep(PERIOD_S * PERIODS / 2)
        process.send_signal(signal.SIGSTOP)
        time.sleep(PERIOD_S * PERIODS / 3)
        process.send_signal(signal.SIGCONT)
    assert process.poll() is None


def test_a_watchdog_that_ends_is_replaced_and_one_without_a_process_ends(process: subprocess.Popen[str]) -> None:
    (first,) = children(process.pid)
    os.kill(first, signal.SIGKILL)
    until(lambda: children(process.pid) not in ([], [first]), 5)
    (second,) = children(process.pid)
    process.kill()
    until(lambda: ended(second), 2)


def test_a_watchdog_that_is_stopped_does_no_harm(process: subprocess.Popen[str]) -> None:
    (child,) = children(process.pid)
    os.kill(child, signal.SIGSTOP)
    time.sleep(PERIOD_S * PERIODS * 1.5)
    os.kill(child, signal.SIGCONT)
    time.sleep(PERIOD_S * PERIODS * 1.5)
    assert process.poll() is None

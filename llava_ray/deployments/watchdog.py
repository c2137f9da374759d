"""A watchdog that kills a replica whose event loop hangs, so that its resources are free for another at once.

A process that is stopped (SIGSTOP) or hangs answers no health check. Serve gives it up after three of them, and then
waits ``drain_timeout_s`` for answers that it cannot finish; its CPUs and GPUs stay occupied meanwhile.
RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS would end that wait, but only in the environment in which the cluster's head was
started, which a service cannot choose. A child process per replica works on every cluster.
"""

import asyncio
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

_log = logging.getLogger(__name__)

_PERIOD_S = 1.0
_PERIODS = 30  # as long as three health checks take


def start_watchdog(period_s: float = _PERIOD_S, periods: int = _PERIODS) -> asyncio.Task[None]:
    """Start the watchdog of this process's event loop; the caller has to keep the returned task."""
    return asyncio.get_running_loop().create_task(_send_beats(period_s, periods))


async def _send_beats(period_s: float, periods: int) -> None:
    """Start the child process, and send it a heartbeat each period; restart it if it has ended."""
    child, pipe = _start_child(period_s, periods)
    try:
        while True:
            try:
                pipe.write(b".")  # without effect while the pipe is full: the child has been stopped itself
            except BrokenPipeError:
                _log.warning("the watchdog of this replica ended with %s; starting another", child.wait())
                child, pipe = _start_child(period_s, periods)
            await asyncio.sleep(period_s)
    finally:
        child.kill()
        child.wait()


def _start_child(period_s: float, periods: int) -> tuple["subprocess.Popen[bytes]", IO[bytes]]:
    """Start the child process, and return it with the pipe that it reads.

    It runs in its own session, so that a signal to the replica's process group does not stop it too.
    """
    script = Path(__file__).with_name("watchdog_process.py")
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", str(script), str(os.getpid()), str(period_s), str(periods)],
        stdin=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
    )
    assert child.stdin is not None
    os.set_blocking(child.stdin.fileno(), False)
    return child, child.stdin

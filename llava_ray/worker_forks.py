"""A local cluster's workers, forked from one process that has imported what they need.

A worker of Ray is a fresh interpreter, which imports Ray, torch, transformers and DeepSpeed anew: seconds for each of a
dozen processes, most of a run's start. Here the command starts a server of its own first. It imports all that, once and
while the command itself is still looking at its settings, and waits. The raylet starts ``forked_worker`` in place of
Ray's script of a worker, and the server forks one, which goes on as Ray's script does.

Only for a cluster on this machine that the command starts itself, and only without a GPU, whose driver does not survive
a fork. Where the server is missing or has died, workers start as Ray starts them.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from llava_ray.forked_worker import SERVER_VARIABLE

WORKER_SCRIPT = Path(__file__).with_name("forked_worker.py")
SWITCH = "LLAVA_RAY_FORKED_WORKERS"  # "0": every worker is a fresh interpreter
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd")
_WAIT_S = 10.0
# Two values that Ray keeps from the moment of its import. A worker is one of no job until it gets a task, as those are
# that Ray starts ahead of need; and it ends with the process of the second, which is that of the command, as the raylet does.
_NO_JOB_YET = {"RAY_JOB_ID": "ffffffff"}


def can_fork() -> bool:
    """Return whether workers on this machine may be forked."""
    gpus = any(Path(device).exists() for device in _GPU_DRIVERS)
    return sys.platform == "linux" and not gpus and os.environ.get(SWITCH) != "0" and SERVER_VARIABLE not in os.environ


@contextlib.contextmanager
def forking_workers(modules: Sequence[str]) -> Iterator[None]:
    """Let workers of a cluster that this process starts be forked, with ``modules`` imported, until the block ends."""
    if not can_fork():
        yield
        return
    folder = Path(tempfile.mkdtemp(prefix="llava-ray-"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(folder / "forks"))
        listener.listen(128)
        server = subprocess.Popen(
            [sys.executable, "-m", "llava_ray.fork_server", str(listener.fileno()), *modules],
            stdin=subprocess.PIPE,  # its end is the server's
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            env=os.environ | _NO_JOB_YET | {"RAY_RAYLET_PID": str(os.getpid())},
        )
    os.environ[SERVER_VARIABLE] = str(folder / "forks")
    try:
        yield
    finally:
        os.environ.pop(SERVER_VARIABLE, None)
        assert server.stdin is not None
        server.stdin.close()
        try:
            server.wait(_WAIT_S)
        except subprocess.TimeoutExpired:  # still importing
            server.kill()
            server.wait()
        shutil.rmtree(folder, ignore_errors=True)

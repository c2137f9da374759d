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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from llava_ray.config.sections import FinetuneConfig
from llava_ray.forked_worker import SERVER_VARIABLE

WORKER_SCRIPT = Path(__file__).with_name("forked_worker.py")
WORKER_IMPORTS = "llava_ray.train.worker_imports"  # of a fine-tuning run
SWITCH = "LLAVA_RAY_FORKED_WORKERS"  # "0": every worker is a fresh interpreter
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd")
_WAIT_S = 10.0
# Two values that Ray keeps from the moment of its import. A worker is one of no job until it gets a task, as those are
# that Ray starts ahead of need; and it ends with the process of the second, which is that of the command, as the raylet does.
_NO_JOB_YET = {"RAY_JOB_ID": "ffffffff"}


def starts_here(address: str | None) -> bool:
    """Return whether a command starts a cluster of its own: neither ``cluster.address``, a job nor RAY_ADDRESS names one."""
    return not address and not os.environ.get("RAY_ADDRESS") and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ


def set_defaults() -> None:
    """Set what Ray reads from the environment, of this process and of those that it starts, unless the user has."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # Ray runs one tokenising task per CPU already
    # How often a run's controller polls its workers: bounds the delay until a dead worker or a finished run is noticed.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Ray Data sets log levels of its own: each execution would be logged twice, across the run's progress bar.
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "WARNING")


def set_local_defaults() -> None:
    """Set the same for a cluster on this machine, which is not preempted: no process needs to watch for a notice."""
    set_defaults()
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_WARN_BLOCKING_GET_INSIDE_ASYNC", "0")  # as Ray Train sets it for its controller


def import_environment(config: FinetuneConfig, *, use_gpu: bool = False) -> dict[str, str]:
    """Return the variables with which the workers of a run import torch and DeepSpeed."""
    variables = {} if use_gpu else {"DS_ACCELERATOR": "cpu"}
    if config.lora.quantization is None:
        # We compile nothing, but DeepSpeed decorates an optimizer that we do not use: importing the compiler for it
        # takes seconds of every start. bitsandbytes does compile.
        variables["TORCHDYNAMO_DISABLE"] = "1"
    return variables


def can_fork() -> bool:
    """Return whether workers on this machine may be forked."""
    gpus = any(Path(device).exists() for device in _GPU_DRIVERS)
    return sys.platform == "linux" and not gpus and os.environ.get(SWITCH) != "0" and SERVER_VARIABLE not in os.environ


@contextlib.contextmanager
def forking_workers(address: str | None, modules: Sequence[str], environment: Mapping[str, str]) -> Iterator[None]:
    """Let workers of a cluster that this process starts be forked, with ``modules`` imported, until the block ends.

    ``address`` is the setting cluster.address: a cluster that is joined starts its own. ``environment`` is what the
    modules are imported with.
    """
    if not (starts_here(address) and can_fork()):
        yield
        return
    set_local_defaults()
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
            env={**os.environ, **_NO_JOB_YET, "RAY_RAYLET_PID": str(os.getpid()), **environment},
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

"""A local cluster's workers, forked from one process that has imported what they need.

A worker of Ray is a fresh interpreter, which imports Ray, torch, transformers and DeepSpeed anew: seconds for each of a
dozen processes, most of a run's start. Here the command forks a server of itself before it connects to Ray, while it
has one thread and has imported most of that anyway. The server imports the rest and waits. The raylet starts
``forked_worker`` in place of Ray's script of a worker, and the server forks one, which goes on as Ray's script does.

Only for a cluster on this machine that the command starts itself, and only without a GPU, whose driver does not survive
a fork. Where there is no server, or it has died, workers start as Ray starts them.
"""

import gc
import os
import shutil
import socket
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.forked_worker import SERVER_VARIABLE

WORKER_SCRIPT = Path(__file__).with_name("forked_worker.py")
SWITCH = "LLAVA_RAY_FORKED_WORKERS"  # "0": every worker is a fresh interpreter
_WORKER_IMPORTS = "llava_ray.train.worker_imports"
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd")
_TOO_LATE = ("ray", "numpy", "torch")  # modules that would have been imported with other settings
_OPENING = ("mlflow", "sqlalchemy")  # modules that keep connections
_HARMLESS_THREAD = "jemalloc_bg_thd"  # survives a fork; Arrow starts it when it is imported


@dataclass
class _Forks:
    """The server of this process: prepared for, then started, at most once."""

    prepared: bool = False
    replaced: dict[str, str | None] = field(default_factory=dict)
    """The user's values of the variables that were set for the imports."""
    address: str | None = None
    listener: socket.socket | None = None
    """Workers may ask before there is a server: they wait."""
    owner: socket.socket | None = None
    """The server ends with this end of the pair."""


_forks = _Forks()


def starts_here(address: str | None) -> bool:
    """Return whether a command starts a cluster: neither ``cluster.address``, RAY_ADDRESS nor a job names one."""
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
    return sys.platform == "linux" and not gpus and os.environ.get(SWITCH) != "0"


def prepare_forks(config: FinetuneConfig) -> None:
    """Import Ray such that workers can be forked from this process, if it is to start a cluster here.

    Does nothing where it is too late for that, as in a notebook that has imported torch.
    """
    if _forks.prepared or not (starts_here(config.cluster.address) and can_fork()):
        return
    if any(name in sys.modules for name in _TOO_LATE):
        return
    set_local_defaults()
    # NumPy's and torch's libraries start threads, which a fork would lack; Ray's workers begin with one as well.
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    changes = threads | import_environment(config)
    # Two values that Ray keeps from its import on. A worker is one of no job until it gets a task, as those are that
    # Ray starts ahead of need; and it ends with the process named second: this one, with which the raylet ends too.
    kept = {"RAY_JOB_ID": "ffffffff", "RAY_RAYLET_PID": str(os.getpid())}
    _forks.replaced = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes | kept)
    from llava_ray.fork_server import keep_random_ids_apart

    keep_random_ids_apart()
    for name in kept:
        del os.environ[name]
    gc.disable()  # until the fork: a fifth of the time that the imports take, for nothing
    _listen()
    _forks.prepared = True


def forks_prepared() -> bool:
    """Return whether this process has been prepared for the server, and has not started it yet."""
    return _forks.prepared and _forks.listener is not None


def undo_import_settings() -> None:
    """Restore the user's values of the variables that were set for the imports."""
    for name, value in _forks.replaced.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def start_forks() -> None:
    """Fork the server, if this process has been prepared for it and has no thread that a fork would lack.

    To be called when most has been imported, but before anything is opened: workers would have the same connection to a
    database, for one.
    """
    too_late = any(name in sys.modules for name in _OPENING)
    if forks_prepared():
        if _has_one_thread() and not too_late:
            _start_server()
        else:
            stop_forks()
        undo_import_settings()
    gc.enable()


def use_forks() -> None:
    """Let the workers of a cluster that this process starts from now on be forked, if there is a server."""
    if _forks.address is not None:
        os.environ[SERVER_VARIABLE] = _forks.address


def leave_forks() -> None:
    """Start the workers of later clusters as Ray does, until ``use_forks`` is called again."""
    os.environ.pop(SERVER_VARIABLE, None)


def stop_forks() -> None:
    """End the server, if there is one; the process does so by itself when it ends."""
    leave_forks()
    for end in (_forks.listener, _forks.owner):
        if end is not None:
            end.close()
    if _forks.address is not None:
        shutil.rmtree(Path(_forks.address).parent, ignore_errors=True)
    _forks.listener = _forks.owner = _forks.address = None


def _listen() -> None:
    """Make the socket at which workers are asked for."""
    import atexit

    folder = Path(tempfile.mkdtemp(prefix="llava-ray-"))
    _forks.address = str(folder / "forks")
    _forks.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    _forks.listener.bind(_forks.address)
    _forks.listener.listen(128)
    atexit.register(stop_forks)


def _start_server() -> None:
    """Fork the server."""
    from llava_ray import fork_server

    assert _forks.listener is not None
    ours, theirs = socket.socketpair()
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork() == 0:
        ours.close()
        fork_server.serve(_forks.listener, theirs, [_WORKER_IMPORTS])
    _forks.listener.close()
    theirs.close()
    _forks.listener, _forks.owner = None, ours


def _has_one_thread() -> bool:
    """Return whether this process has no threads that a fork would lack."""
    try:
        names = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    except OSError:
        return False
    return threading.active_count() == 1 and sum(name != _HARMLESS_THREAD for name in names) == 1

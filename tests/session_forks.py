"""Workers of the tests' own cluster, forked from one process that has imported what they need.

A run forks them from its command, which has imported nothing slow yet (see ``llava_ray.worker_forks``); pytest has.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_ray.forked_worker import SERVER_VARIABLE
from llava_ray.worker_forks import can_fork

# The process that forks: with what Ray keeps from its import on (see ``prepare_forks``), and without stray threads.
_SERVER = """
import gc, os, socket, sys
gc.disable()
from llava_ray.fork_server import keep_random_ids_apart, serve
keep_random_ids_apart()
for name in ("RAY_JOB_ID", "RAY_RAYLET_PID"):
    del os.environ[name]
listener, owner = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
serve(listener, owner, sys.argv[3:])
"""
_MODULES = (
    "llava_ray.train.worker_imports",
    "llava_ray.generate.answer_actor",
    "llava_ray.deployments.replica",
    "llava_ray.deployments.front",
    "mlflow.store.tracking.sqlalchemy_store",  # of a run's recorder
)


@contextmanager
def forking_workers() -> Iterator[None]:
    """Let clusters that start inside the block fork their workers, where that is possible here."""
    if not can_fork():
        yield
        return
    folder = Path(tempfile.mkdtemp(prefix="forks-"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(folder / "forks"))
        listener.listen(128)
        ours, theirs = socket.socketpair()
        files = (listener.fileno(), theirs.fileno())
        one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        kept = {"RAY_JOB_ID": "ffffffff", "RAY_RAYLET_PID": str(os.getpid())}
        server = subprocess.Popen(
            [sys.executable, "-c", _SERVER, *map(str, files), *_MODULES],
            env=os.environ | one_thread | kept,
            pass_fds=files,
            start_new_session=True,
        )
        theirs.close()
    os.environ[SERVER_VARIABLE] = str(folder / "forks")
    try:
        yield
    finally:
        os.environ.pop(SERVER_VARIABLE, None)
        ours.close()
        server.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)

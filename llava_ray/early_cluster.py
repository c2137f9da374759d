"""A cluster on this machine that starts while its command still imports what it needs: both take seconds.

Ray starts threads where it starts, and a process that has threads cannot fork workers (see ``worker_forks``). So the
command forks another process, which starts Ray and owns it: the cluster ends with that process, and that process when
the command closes its end of a pipe, or dies. Where anything goes wrong, the command starts Ray itself.
"""

import contextlib
import gc
import json
import os
import signal
from dataclasses import dataclass
from typing import Any, NoReturn

import ray

from llava_ray.local_ray import NO_DASHBOARD_VARIABLE, lean_start
from llava_ray.worker_forks import forks_prepared, leave_forks, set_local_defaults, undo_import_settings, use_forks

_AUTH_VARIABLE = "RAY_AUTH_MODE"  # Ray sets it where it starts a cluster


@dataclass
class _Owner:
    """The process that owns the cluster, for this one."""

    pid: int
    num_cpus: int
    dashboard: bool
    said: int
    """The pipe on which it says where the cluster is."""
    held: int
    """It ends when this end of the other pipe is closed."""


_owner: _Owner | None = None


def start_early(num_cpus: int, *, dashboard_port: int, dashboard: bool) -> None:
    """Let another process start a cluster, if this one has been prepared to fork its workers."""
    global _owner
    if _owner is not None or not forks_prepared():
        return
    said, saying = os.pipe()
    holding, held = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(said)
        os.close(held)
        _own_cluster(num_cpus, dashboard_port, dashboard, saying, holding)
    os.close(saying)
    os.close(holding)
    _owner = _Owner(pid, num_cpus, dashboard, said, held)


def join_early(num_cpus: int, *, dashboard: bool, **options: Any) -> bool:
    """Connect to the cluster that was started early, with ``options`` of ``ray.init``; return whether there is one.

    One that was started for something else is ended.
    """
    owner = _owner
    if owner is None:
        return False
    with os.fdopen(os.dup(owner.said)) as file:
        found = json.loads(file.readline() or "{}")  # nothing is said where the start failed
    if not found or (owner.num_cpus, owner.dashboard) != (num_cpus, dashboard):
        end_early()
        return False
    if found["auth"] is not None and os.environ.get(_AUTH_VARIABLE) != found["auth"]:
        os.environ[_AUTH_VARIABLE] = found["auth"]
        ray._raylet.Config.initialize("")
    if not dashboard:
        os.environ[NO_DASHBOARD_VARIABLE] = "1"
    ray.init(address=found["address"], **options)
    return True


def end_early() -> None:
    """End the cluster that was started early, if there is one, and wait for it."""
    global _owner
    if _owner is not None:
        owner, _owner = _owner, None
        os.close(owner.said)
        os.close(owner.held)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(owner.pid, 0)


def _own_cluster(num_cpus: int, dashboard_port: int, dashboard: bool, saying: int, holding: int) -> NoReturn:
    """Start the cluster, say where it is, and end it when the other end of ``holding`` is closed."""
    from llava_ray.fork_server import leave_the_owners_things

    try:
        leave_the_owners_things({saying, holding})
        ray._raylet.setproctitle("llava-ray: owns the cluster")
        gc.enable()
        undo_import_settings()
        set_local_defaults()
        use_forks()
        with lean_start(dashboard=dashboard):
            ray.init(
                address="local",
                num_cpus=num_cpus,
                dashboard_port=dashboard_port,
                logging_config=ray.LoggingConfig(log_level="WARNING"),
                log_to_driver=False,
            )
        leave_forks()
        found = {"address": ray.get_runtime_context().gcs_address, "auth": os.environ.get(_AUTH_VARIABLE)}
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the command says when, also where its group is signalled
        os.write(saying, json.dumps(found).encode() + b"\n")
        os.close(saying)
        os.read(holding, 1)
        ray.shutdown()
    finally:
        os._exit(0)

"""Connection to a Ray cluster, joined or started, and the resources that a run takes of it."""

import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from llava_ray import invocation
from llava_ray.config.run import ClusterConfig
from llava_ray.early_cluster import end_early, join_early, start_early
from llava_ray.errors import ConfigError
from llava_ray.local_ray import NO_DASHBOARD_VARIABLE, lean_start
from llava_ray.log_file import LibraryLog
from llava_ray.placement import alive_nodes, can_grow, find_pools, pool_resources
from llava_ray.shared_storage import Places, check_shared
from llava_ray.uploads import check_upload
from llava_ray.worker_forks import (
    forks_prepared,
    leave_forks,
    set_defaults,
    set_local_defaults,
    starts_here,
    use_forks,
)

# CPUs left for reading and decoding beside the train workers.
_DATA_CPUS = 1.0
_RUN_LIMIT = 512 * 10**6  # bytes: the largest working directory that Ray uploads when a run joins a cluster

DASHBOARD_VARIABLE = "RAY_API_SERVER_ADDRESS"  # where Ray's State API looks first

_NOTHING_SHARED = Places()


@dataclass(frozen=True)
class Resources:
    """The resources that one run takes of the cluster, resolved from its ClusterConfig."""

    num_workers: int
    cpus_per_worker: float
    use_gpu: bool
    accelerator_type: str | None
    gpus_per_worker: float = 1.0
    threads: int | None = None
    """Compute threads of a worker, where they are not as many as the CPUs that it reserves."""
    cores: int = 1
    """Cores exclusive to this job, for work that runs while no worker does."""

    @property
    def bundle(self) -> dict[str, float]:
        """Return the resources that each worker reserves."""
        return {"CPU": self.cpus_per_worker} | ({"GPU": self.gpus_per_worker} if self.use_gpu else {})

    @property
    def num_threads(self) -> int:
        """Return the number of threads that a worker may compute with."""
        return self.threads or max(1, int(self.cpus_per_worker))


@contextmanager
def connected(
    cluster: ClusterConfig,
    shared: Places = _NOTHING_SHARED,
    *,
    runs: int = 1,
    quiet: bool = False,
    storage_path: str | None = None,
    dashboard: bool = False,
) -> Iterator[Resources]:
    """Join the cluster that ``cluster.address``, the job or RAY_ADDRESS names, or start a local one for ``runs``.

    The output of libraries and workers goes to a file in ``storage_path``; with ``quiet`` the workers' lines stay in
    Ray's own files. Yields the run's resources, and disconnects at the end. Raises ConfigError when the cluster cannot
    be reached, is too small, or its nodes do not all see the ``shared`` places.
    """
    if ray.is_initialized():  # a notebook or a test with its own connection
        check_shared(shared)
        yield share_node(fit_resources(cluster), given=cluster.cpus_per_worker != "auto")
        return
    log = LibraryLog(storage_path)
    print(f"Starting Ray; the libraries' own lines go to {log.path}", flush=True)  # noqa: T201
    with log.taking_over():
        with _keeping_sigterm():
            started_here = start(cluster, runs=runs, quiet=quiet, dashboard=dashboard)
        log.take_workers_lines()
        with _leaving(started_here):
            if can_grow():  # starting a node takes longer than the minute after which Ray Train asks again
                os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1800")
            resources = fit_resources(cluster)
            if started_here and not resources.use_gpu:
                resources = share_cores(resources, runs, given=cluster.cpus_per_worker != "auto")
            elif not started_here and not dashboard:  # how many runs a sweep has there at a time is not known yet
                resources = share_node(resources, given=cluster.cpus_per_worker != "auto")
            check_shared(shared)
            _print_resources(resources, "started here" if started_here else "joined")
            yield resources


@contextmanager
def _leaving(started_here: bool) -> Iterator[None]:
    """Disconnect from Ray at the end of the block."""
    try:
        yield
    finally:
        ray.shutdown()
        if started_here:
            end_early()
            os.environ.pop(DASHBOARD_VARIABLE, None)
            os.environ.pop(NO_DASHBOARD_VARIABLE, None)
            leave_forks()


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Restore the SIGTERM handler afterwards: Ray replaces it, and its libraries print a stack trace on SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _print_resources(resources: Resources, how: str) -> None:
    """Print the cluster that was found and the resources that the run takes."""
    total, pools = ray.cluster_resources(), sorted(find_pools())
    print(  # noqa: T201
        f"Ray: {how}, {len(ray.nodes())} node(s), {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs; "
        f"{resources.num_workers} worker(s) x {resources.threads or resources.cpus_per_worker:g} CPU"
        + (" + 1 GPU" if resources.use_gpu else "")
        + (f"; pools: {', '.join(pools)}" if pools else ""),
        flush=True,
    )


def start(cluster: ClusterConfig, *, runs: int = 1, quiet: bool = False, dashboard: bool = False) -> bool:
    """Connect this process to Ray; return whether a new local cluster had to be started.

    ``dashboard`` starts Ray's page and its State API with a local one, which takes seconds.
    A cluster that merely runs on this machine is not joined: it may belong to another run, and end with it.
    """
    set_defaults()
    warnings_only = ray.LoggingConfig(log_level="WARNING")
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    inside_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # Ray refuses a second working_dir inside a job
    if starts_here(cluster.address):
        set_local_defaults()
        use_forks()
        cpus, own = local_cpus(cluster, runs), {"logging_config": warnings_only, "log_to_driver": not quiet}
        if not join_early(cpus, dashboard=dashboard, **own):
            with lean_start(dashboard=dashboard):
                ray.init(address="local", num_cpus=cpus, dashboard_port=announce_port(), **own)
        return True
    address = cluster.address or os.environ.get("RAY_ADDRESS") or "auto"
    # .rayignore lists what the upload leaves out. An installed llava_ray is on the nodes already.
    runtime_env: dict[str, Any] = {}
    if not inside_job and (_root() / ".rayignore").exists():
        check_upload(_root(), _RUN_LIMIT)
        runtime_env["working_dir"] = str(_root())
        if started_as := os.environ.get(
            invocation.STARTED_AS_VARIABLE
        ):  # workers' messages name commands as this process does
            runtime_env["env_vars"] = {invocation.STARTED_AS_VARIABLE: started_as}
    try:
        ray.init(address=address, runtime_env=runtime_env, logging_config=warnings_only, log_to_driver=not quiet)
    except ConnectionError as error:
        raise ConfigError(
            f"no Ray cluster answers at {address!r}: {error}; check cluster.address, or leave it out to start "
            "a local one"
        ) from error
    return False


def start_ahead(cluster: ClusterConfig, *, runs: int = 1, dashboard: bool = False) -> None:
    """Start the local cluster for which ``start`` will ask, if it will, while this process imports the rest.

    To be called between ``prepare_forks`` and ``start_forks``.
    """
    if starts_here(cluster.address) and forks_prepared():
        start_early(local_cpus(cluster, runs), dashboard_port=announce_port(), dashboard=dashboard)


def announce_port() -> int:
    """Return a free port for a local cluster's dashboard, and announce it to all processes by an environment variable.

    Ray Train asks a dashboard whether the run's controller is alive. Without an address it may ask that of another
    cluster on this machine, which does not know the controller, and the run would lose its reserved resources.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    os.environ[DASHBOARD_VARIABLE] = f"http://127.0.0.1:{port}"
    return port


def _root() -> Path:
    """Return the folder that holds llava_ray, evals and pipelines."""
    return Path(__file__).resolve().parent.parent


def local_cpus(cluster: ClusterConfig, runs: int = 1) -> int:
    """Return the logical CPUs of a local cluster: all there are, and enough for workers and data side by side."""
    return max(num_cores(), math.ceil(runs * (_worker_cpus(cluster) + _DATA_CPUS) + _DATA_CPUS))


def _worker_cpus(cluster: ClusterConfig) -> float:
    """Return the CPUs that all workers of a run ask for."""
    return cluster.num_workers * (1.0 if cluster.cpus_per_worker == "auto" else cluster.cpus_per_worker)


def local_runs(cluster: ClusterConfig) -> int:
    """Return how many runs this machine's cores can hold at a time."""
    return max(1, int(num_cores() / _worker_cpus(cluster)))


def share_cores(resources: Resources, runs: int, *, given: bool) -> Resources:
    """Divide this machine's cores among the workers of ``runs`` concurrent runs.

    The CPUs that workers reserve stay the same, so that the data stream finds its own; where they were ``given`` by the
    user, workers compute with exactly that many.
    """
    threads = None if given else max(1, num_cores() // (runs * resources.num_workers))
    return replace(resources, threads=threads, cores=num_cores())


def local_threads(cluster: ClusterConfig) -> int:
    """Return the threads of each worker of one run that starts a cluster on this machine, without GPUs."""
    given = cluster.cpus_per_worker != "auto"
    cpus = 1.0 if cluster.cpus_per_worker == "auto" else cluster.cpus_per_worker
    resources = Resources(cluster.num_workers, cpus, use_gpu=False, accelerator_type=None)
    return share_cores(resources, 1, given=given).num_threads


def share_node(resources: Resources, *, given: bool) -> Resources:
    """Divide this machine's cores among the workers, where it is the only node of the cluster that is connected.

    One worker on two cores would leave one of them idle: a worker reserves no more than one, for others to fit in. On
    more nodes it cannot be known which of them get how many workers.
    """
    nodes = alive_nodes()
    alone = len(nodes) == 1 and nodes[0]["NodeID"] == ray.get_runtime_context().get_node_id() and not can_grow()
    if given or resources.use_gpu or not alone:
        return resources
    cores = min(num_cores(), int(nodes[0]["Resources"].get("CPU", 1)))
    return replace(resources, threads=max(1, cores // resources.num_workers))


def num_cores() -> int:
    """Return the number of cores that this process may use, by CPU affinity and container quota."""
    cores = min(os.cpu_count() or 1, len(os.sched_getaffinity(0)))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max"
        return cores


def runs_at_once(total: Mapping[str, float], resources: Resources) -> int:
    """Return how many runs a cluster with these resources can hold; at least one."""
    fitting = (total.get("CPU", 0.0)) / (resources.num_workers * resources.cpus_per_worker + _DATA_CPUS)
    if resources.use_gpu:
        fitting = min(fitting, total.get("GPU", 0.0) / (resources.num_workers * resources.gpus_per_worker))
    return max(1, int(fitting))


def fit_resources(cluster: ClusterConfig) -> Resources:
    """Resolve "auto" settings against the cluster; raise ConfigError when it is too small even when idle.

    Only the training pool counts, if there is one. An autoscaling cluster is never too small: the run waits for nodes.
    """
    total, growing, pools = pool_resources("train"), can_grow(), find_pools()
    cpus, gpus = total["CPU"], total["GPU"]
    where = "the pool 'train'" if "train" in pools else "the cluster"
    wanted = cluster.num_workers * cluster.gpus_per_worker
    use_gpu = gpus >= wanted if cluster.use_gpu == "auto" else cluster.use_gpu
    if use_gpu and gpus < wanted and not growing:
        raise ConfigError(
            f"{cluster.num_workers} workers want {cluster.gpus_per_worker:g} GPU each, {where} has {gpus:g}; "
            "lower cluster.num_workers or set cluster.use_gpu = false"
        )
    data_cpus = 0.0 if "decode" in pools else _DATA_CPUS
    room = cpus - data_cpus
    share = 1.0 if growing else min(1.0, math.floor(10 * room / cluster.num_workers) / 10)
    cpus_per_worker = share if cluster.cpus_per_worker == "auto" else cluster.cpus_per_worker
    if not growing and (cpus_per_worker <= 0 or cpus_per_worker * cluster.num_workers > room):
        raise ConfigError(
            f"{cluster.num_workers} workers x {cluster.cpus_per_worker} CPU and {data_cpus:g} for data do not fit into "
            f"the {cpus:g} CPUs of {where}: the run would wait for ever; lower cluster.num_workers or "
            "cluster.cpus_per_worker"
        )
    return Resources(cluster.num_workers, cpus_per_worker, use_gpu, cluster.accelerator_type, cluster.gpus_per_worker)

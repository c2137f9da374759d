"""Join a Ray cluster or start one, and say what was found."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray

from llava_ray.config.sections import ClusterConfig
from llava_ray.errors import ConfigError

# What a working directory sent to a remote cluster leaves out: results, tests' data, caches.
EXCLUDED = [".git", ".venv", "runs", "tests", "*.safetensors", "__pycache__", ".mypy_cache", ".ruff_cache"]

# CPUs kept for reading and decoding beside the train workers.
DATA_CPUS = 1.0


@dataclass(frozen=True)
class Resources:
    """What one run takes of the cluster, resolved from its ClusterConfig."""

    num_workers: int
    cpus_per_worker: float
    use_gpu: bool
    accelerator_type: str | None
    gpus_per_worker: float = 1.0

    @property
    def num_threads(self) -> int:
        """Threads a worker may compute with."""
        return max(1, int(self.cpus_per_worker))


@contextmanager
def connected(cluster: ClusterConfig, *, runs: int = 1, quiet: bool = False) -> Iterator[Resources]:
    """Join the cluster that ``cluster.address``, the job or the machine names, or start a local one; leave it after.

    A local one has room for ``runs`` at a time; ``quiet`` keeps what workers print out of this terminal. Yields what
    the run may take. Raises ConfigError when the cluster cannot be reached or is too small.
    """
    if ray.is_initialized():  # a notebook or a test that has its own
        yield fitted(cluster)
        return
    started_here = start(cluster, runs=runs, quiet=quiet)
    try:
        resources = fitted(cluster)
        total = ray.cluster_resources()
        print(  # noqa: T201 - said to the person who started the run
            f"Ray: {'started here' if started_here else 'joined'}, {len(ray.nodes())} node(s), "
            f"{total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs; "
            f"{resources.num_workers} worker(s) x {resources.cpus_per_worker:g} CPU"
            + (" + 1 GPU" if resources.use_gpu else ""),
            flush=True,
        )
        yield resources
    finally:
        ray.shutdown()


def start(cluster: ClusterConfig, *, runs: int = 1, quiet: bool = False) -> bool:
    """Connect this process to Ray; return whether a new local cluster had to be started.

    A cluster that merely happens to run on this machine is not joined: it may be another run's own, and end with it.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # How often a run's controller looks at its workers: a dead one is noticed, and a finished run ends, this fast.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    logging = ray.LoggingConfig(log_level="WARNING")
    inside_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # a second working_dir would be refused there
    address = cluster.address or os.environ.get("RAY_ADDRESS") or ("auto" if inside_job else None)
    if address is None:
        ray.init(address="local", num_cpus=local_cpus(cluster, runs), logging_config=logging, log_to_driver=not quiet)
        return True
    runtime_env = {} if inside_job else {"working_dir": str(root()), "excludes": EXCLUDED}
    try:
        ray.init(address=address, runtime_env=runtime_env, logging_config=logging, log_to_driver=not quiet)
    except ConnectionError as error:
        raise ConfigError(
            f"no Ray cluster answers at {address!r}: {error}; check cluster.address, or leave it out to start "
            "a local one"
        ) from error
    return False


def root() -> Path:
    """Return the folder that holds llava_ray, evals and pipelines."""
    return Path(__file__).resolve().parent.parent


def local_cpus(cluster: ClusterConfig, runs: int = 1) -> int:
    """Return the logical CPUs of a local cluster: all there are, and enough for workers and data side by side."""
    return max(os.cpu_count() or 1, math.ceil(runs * (worker_cpus(cluster) + DATA_CPUS) + DATA_CPUS))


def worker_cpus(cluster: ClusterConfig) -> float:
    """Return the CPUs that all workers of a run would like to have."""
    return cluster.num_workers * (1.0 if cluster.cpus_per_worker == "auto" else cluster.cpus_per_worker)


def local_runs(cluster: ClusterConfig) -> int:
    """Return how many runs at a time this machine's cores can carry."""
    return max(1, int((os.cpu_count() or 1) / worker_cpus(cluster)))


def runs_at_once(total: Mapping[str, float], resources: Resources) -> int:
    """Return how many runs a cluster with these resources has room for; at least the one that fits."""
    fitting = (total.get("CPU", 0.0)) / (resources.num_workers * resources.cpus_per_worker + DATA_CPUS)
    if resources.use_gpu:
        fitting = min(fitting, total.get("GPU", 0.0) / (resources.num_workers * resources.gpus_per_worker))
    return max(1, int(fitting))


def fitted(cluster: ClusterConfig) -> Resources:
    """Resolve "auto" settings against the cluster; raise ConfigError when it is too small even when idle."""
    total = ray.cluster_resources()
    cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
    wanted = cluster.num_workers * cluster.gpus_per_worker
    use_gpu = gpus >= wanted if cluster.use_gpu == "auto" else cluster.use_gpu
    if use_gpu and gpus < wanted:
        raise ConfigError(
            f"{cluster.num_workers} workers want {cluster.gpus_per_worker:g} GPU each, the cluster has {gpus:g}; "
            "lower cluster.num_workers or set cluster.use_gpu = false"
        )
    room = cpus - DATA_CPUS
    share = min(1.0, math.floor(10 * room / cluster.num_workers) / 10)
    cpus_per_worker = share if cluster.cpus_per_worker == "auto" else cluster.cpus_per_worker
    if cpus_per_worker <= 0 or cpus_per_worker * cluster.num_workers > room:
        raise ConfigError(
            f"{cluster.num_workers} workers x {cluster.cpus_per_worker} CPU and {DATA_CPUS:g} for data do not fit into "
            f"{cpus:g} CPUs: the run would wait for ever; lower cluster.num_workers or cluster.cpus_per_worker"
        )
    return Resources(cluster.num_workers, cpus_per_worker, use_gpu, cluster.accelerator_type, cluster.gpus_per_worker)

"""What every test shares: one small Ray cluster, and quiet, private settings for it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before ray is imported: no token file in the developer's home, no usage report, one thread a process.
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    DS_ACCELERATOR="cpu",
    HF_HUB_OFFLINE="1",
    CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", ""),
)

import pytest
from jaxtyping import install_import_hook

# Shapes and types of what these modules are called with are checked at every call, in test processes only. Nothing of
# them may be imported before.
SHAPES_CHECKED = [
    "llava_ray.data.batches",
    "llava_ray.data.packing",
    "llava_ray.generate.builtin",
    "llava_ray.images.anyres",  # not containers and opening: their loops over bytes have bounds of time in tests
    "llava_ray.images.geometry",
    "llava_ray.images.processing",
    "llava_ray.images.tokens",
    "llava_ray.images.views",
    "llava_ray.model.network",
    "llava_ray.objectives",
]
install_import_hook(SHAPES_CHECKED, "beartype.beartype")

# What tests share is found here by Ray's workers too, which do not read pytest's pythonpath.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let ``--dist loadgroup`` give the files whose tests share one cluster to one process, and each other file to one.

    xdist's own groups are marks, which it adds to tests' names; this version of pytest does not let it.
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadFileScheduling

    class SharedClusterScheduling(LoadFileScheduling):
        """By file, but those that name the cluster's fixture together."""

        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "ray_cluster" if "ray_cluster" in (config.rootpath / file).read_text() else file

    return SharedClusterScheduling(config, log)


@pytest.fixture(autouse=True)
def started_as_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let messages name commands as for a library's user, whatever an earlier test has started as a script."""
    monkeypatch.delenv("LLAVA_RAY_STARTED_AS", raising=False)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A private four-CPU (logical) cluster for the whole session."""
    import ray
    from session_forks import forking_workers

    from llava_ray.forked_worker import SERVER_VARIABLE
    from llava_ray.local_ray import lean_start
    from llava_ray.runtime import DASHBOARD_VARIABLE, announce_port

    with forking_workers():
        # Without a dashboard each run would end ten seconds later: Ray's watch over it waits for an answer.
        with lean_start(dashboard=True):
            ray.init(
                address="local",
                num_cpus=4,
                object_store_memory=300 * 2**20,
                include_dashboard=True,
                dashboard_port=announce_port(),
                log_to_driver=False,
            )
        # This cluster's processes have them; commands that tests start have their own.
        for name in (DASHBOARD_VARIABLE, SERVER_VARIABLE):
            os.environ.pop(name, None)
        yield
        ray.shutdown()

"""Four Ray nodes on one machine, told apart by labels: tunes on them, takes a node away, prints what ran where.

A program of its own, because a process joins one cluster only:

python tests/four_nodes.py fixed FOLDER      # a cluster that stays as it is: the node for decoding goes for good
python tests/four_nodes.py growing FOLDER    # one that makes nodes: the node for training goes, another one comes

GPUs are only Ray's accounting here.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray starts no node that counts more GPUs than it would see

import ray
import ray.data
import ray.train
from commands import free_port
from PIL import Image
from ray.cluster_utils import Cluster
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.state import list_actors, list_tasks
from samples import small_run

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.run import ClusterConfig
from llava_ray.data.preparation import prepare_data
from llava_ray.errors import ConfigError
from llava_ray.placement import in_pool
from llava_ray.runtime import Resources, connected, fit_resources
from llava_ray.shared_storage import Places, check_shared
from llava_ray.train.ray_trainer import scaling
from llava_ray.train.runs import committed_step
from llava_ray.train.trainer import finetune

SMALL = {"object_store_memory": 150 * 2**20}
# What a task or actor does, by a part of its name.
DOING = {"read_blocks": "decode", "ImageDecoder": "decode", "FeatureActor": "vision", "RayTrainWorker": "train"}
MOST = 10_000  # rows of the state API
SECONDS_UNTIL_ANOTHER = 3.0


def start_nodes(decode_cpus: int, **head: Any) -> tuple[Cluster, dict[str, Any]]:
    """Start a head without CPUs and a node for each pool; connect this process."""
    port = free_port()
    options = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": port, **SMALL, **head}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    nodes = {
        "decode": cluster.add_node(num_cpus=decode_cpus, labels={"pool": "decode"}, **SMALL),
        "vision": cluster.add_node(num_cpus=1, num_gpus=1, labels={"pool": "vision"}, **SMALL),
        "train": cluster.add_node(num_cpus=4, num_gpus=2, labels={"pool": "train"}, **SMALL),
    }
    ray.init(address=cluster.address, log_to_driver=False)
    return cluster, nodes


def fixed(folder: Path) -> dict[str, Any]:
    """Tune undisturbed, then lose the only node for decoding, which has room for all its tasks at once."""
    cluster, nodes = start_nodes(decode_cpus=4)
    told: dict[str, Any] = {"gpus": places_with_gpus(folder), "refusals": refusals()}
    config, began = settings(folder), now()
    told["undisturbed"] = tune(config, "undisturbed") | {"placements": placements(began)}
    remove = lambda: cluster.remove_node(nodes["decode"], allow_graceful=False)  # noqa: E731
    with_loss = tune(config, "disturbed", remove)
    told["disturbed"] = with_loss | {"placements": placements(with_loss["removed_ms"])}
    stop(cluster)
    return told


def growing(folder: Path) -> dict[str, Any]:
    """Tune, and lose the node for training; another one comes, as an autoscaler makes it."""
    cluster, nodes = start_nodes(decode_cpus=8, labels={"pools": "decode.vision.train"})
    fits = fit_resources(ClusterConfig(num_workers=64, use_gpu=True))  # not there yet, so not refused
    another: list[subprocess.Popen[bytes]] = []

    def replace() -> None:
        cluster.remove_node(nodes["train"], allow_graceful=False)
        time.sleep(SECONDS_UNTIL_ANOTHER)
        another.append(join_train_node(cluster.address))

    began = now()
    try:
        disturbed = tune(settings(folder), "disturbed", replace) | {"placements": placements(began)}
    finally:
        for process in another:
            process.terminate()
            process.wait()
    stop(cluster)
    return {"waits_for": fits.num_workers, "disturbed": disturbed}


def join_train_node(address: str) -> subprocess.Popen[bytes]:
    """Start a node for training as an autoscaler does, by command: a thread cannot start one in this process."""
    ray_command = str(Path(sys.executable).parent / "ray")
    options = ["--num-cpus=4", "--num-gpus=2", "--labels=pool=train", f"--object-store-memory={150 * 2**20}"]
    return subprocess.Popen(
        [ray_command, "start", "--block", f"--address={address}", *options], stdout=subprocess.DEVNULL
    )


def stop(cluster: Cluster) -> None:
    """Leave no process behind."""
    ray.shutdown()
    cluster.shutdown()


def here(batch: dict[str, Any] | None = None) -> dict[str, Any]:
    """Say in which pool this process is, and how many GPUs it was given."""
    del batch
    labels = ray.get_runtime_context().get_node_labels()
    return {"pool": [labels.get("pool", "none")], "gpus": [len(ray.get_gpu_ids())]}


class Here:
    """The same as an actor."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return here(batch)


def places_with_gpus(folder: Path) -> dict[str, list[Any]]:
    """Where work that takes GPUs lands: workers as finetune() asks for them, actors as the stream does."""

    def loop() -> None:
        rank = ray.train.get_context().get_world_rank()
        (folder / f"rank{rank}.json").write_text(json.dumps(here()))

    DataParallelTrainer(
        loop,
        scaling_config=scaling(Resources(2, 1.0, use_gpu=True, accelerator_type=None)),
        run_config=ray.train.RunConfig(name="gpus", storage_path=str(folder)),
    ).fit()
    trained = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    seen = ray.data.range(4).map_batches(
        Here, batch_size=4, compute=ray.data.ActorPoolStrategy(size=1), num_gpus=1, num_cpus=0.5, **in_pool("vision")
    )
    return {
        "train": [[said["pool"][0], said["gpus"][0]] for said in trained],
        "vision": list(seen.take_all()[0].values()),
    }


def refusals() -> list[str]:
    """What is said of a run that is too big for its pool, and of folders that the nodes do not share."""
    said = []
    for attempt in (
        lambda: fit_resources(ClusterConfig(num_workers=3, use_gpu=True)),
        lambda: check_shared(Places(written=("memory://runs",))),  # every process has its own
        lambda: check_shared(Places(read=("/not/there",))),
    ):
        try:
            attempt()
        except ConfigError as error:
            said.append(str(error))
    return said


def settings(folder: Path) -> FinetuneConfig:
    """Return a run whose images take so long to decode that decoding goes on while it trains."""
    changes = {
        "data.vision_features": "streamed",
        "data.image_aspect_ratio": "pad",
        "train.num_train_epochs": 24,
        "train.save_steps": 8,
        "tracking.log_model": False,
        "cluster.use_gpu": False,
    }
    config = small_run(folder, num_samples=64, **changes)
    for path in (folder / "images").iterdir():
        with Image.open(path) as image:
            large = image.resize((1600, 1200))
        large.save(path)
    return config


def tune(config: FinetuneConfig, name: str, disturb: Callable[[], None] | None = None) -> dict[str, Any]:
    """Run to the end, disturbed once a checkpoint is committed; return what the ledger says, and when that was."""
    config, noted = config.replaced({"run.name": name}), dict[str, Any]()

    def wait_and_disturb() -> None:
        while (step := committed_step(config.run.storage_path, name)) == 0:
            time.sleep(0.1)
        if disturb is not None:
            disturb()
        noted.update(removed_after_step=step, removed_ms=now())

    disturbing = threading.Thread(target=wait_and_disturb, daemon=True)
    disturbing.start()
    with connected(config.cluster, Places.of([config.run.storage_path, config.data.cache_dir], [])) as resources:
        finished = finetune(config, prepare_data(config.data, show_progress=False), resources)
    disturbing.join(60)
    ledger = Path(finished.folder.path, "ledger.jsonl").read_bytes()
    alive = sum(node["Alive"] for node in ray.nodes())
    return noted | {"steps": finished.num_steps, "ledger": hashlib.sha256(ledger).hexdigest(), "nodes": alive}


def placements(since_ms: float) -> dict[str, dict[str, int]]:
    """Count, for everything that began since then, which pool it ran in: {"decode": {"decode": 31}, …}."""
    pools = {node["NodeID"]: node.get("Labels", {}).get("pool", "none") for node in ray.nodes()}
    found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for task in list_tasks(limit=MOST, detail=True, raise_on_missing_output=False):
        doing = next((what for part, what in DOING.items() if part in task.name), None)
        if doing == "decode" and task.node_id and (task.start_time_ms or 0) >= since_ms:
            found[doing][pools[task.node_id]] += 1
    for actor in list_actors(limit=MOST, detail=True, raise_on_missing_output=False):
        doing = next((what for part, what in DOING.items() if part in actor.class_name), None)
        if doing in ("vision", "train") and actor.node_id:
            found[doing][pools[actor.node_id]] += 1
    return {doing: dict(counts) for doing, counts in found.items()}


def now() -> float:
    """The time as the state API has it."""
    return time.time() * 1000


if __name__ == "__main__":
    print(json.dumps({"fixed": fixed, "growing": growing}[sys.argv[1]](Path(sys.argv[2]))))

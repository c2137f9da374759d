"""Four Ray nodes on one machine, told apart by labels; tunes on them twice, prints what ran where, as JSON.

A program of its own, because a process joins one cluster only: python tests/four_nodes.py FOLDER
The second run has the same settings; a node of it goes away in its midst. GPUs are only Ray's accounting here.
"""

import json
import socket
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import ray
from PIL import Image
from ray.cluster_utils import Cluster
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.state import list_actors, list_tasks
from samples import small_run

from llava_ray.config.sections import ClusterConfig, FinetuneConfig
from llava_ray.data.preparation import prepare_data
from llava_ray.errors import ConfigError
from llava_ray.placement import in_pool
from llava_ray.runtime import Resources, connected, fitted
from llava_ray.shared_storage import Places, check_shared
from llava_ray.train.runs import committed_step
from llava_ray.train.trainer import finetune, scaling

NUM_SAMPLES = 64
# What a task or actor does, by a part of its name.
DOING = {"read_micro_batches": "decode", "decode_images": "decode", "FeatureActor": "vision", "RayTrainWorker": "train"}
MOST = 10_000  # rows of the state API


def start_nodes() -> tuple[Cluster, dict[str, Any]]:
    """Start a head without CPUs and a node for each pool; connect this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    small = {"object_store_memory": 150 * 2**20}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": True, "dashboard_port": port, **small},
    )
    nodes = {
        "decode": cluster.add_node(num_cpus=1, labels={"pool": "decode"}, **small),
        "vision": cluster.add_node(num_cpus=1, num_gpus=1, labels={"pool": "vision"}, **small),
        "train": cluster.add_node(num_cpus=4, num_gpus=2, labels={"pool": "train"}, **small),
    }
    ray.init(address=cluster.address, log_to_driver=False)
    return cluster, nodes


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
    vision = seen.take_all()[0]
    return {"train": [[said["pool"][0], said["gpus"][0]] for said in trained], "vision": list(vision.values())}


def refusals() -> list[str]:
    """What is said of a run that is too big for its pool, and of folders that the nodes do not share."""
    said = []
    for attempt in (
        lambda: fitted(ClusterConfig(num_workers=3, use_gpu=True)),
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
    config = small_run(folder, num_samples=NUM_SAMPLES, **changes)
    for path in (folder / "images").iterdir():
        with Image.open(path) as image:
            large = image.resize((1600, 1200))
        large.save(path)
    return config


def tune(config: FinetuneConfig, name: str) -> list[dict[str, Any]]:
    """Run to the end; return the ledger."""
    config = config.replaced({"run.name": name})
    with connected(config.cluster, Places.of([config.run.storage_path, config.data.cache_dir], [])) as resources:
        finished = finetune(config, prepare_data(config.data, show_progress=False), resources)
    return [json.loads(line) for line in Path(finished.folder.path, "ledger.jsonl").read_text().splitlines()]


def placements(since_ms: float) -> dict[str, dict[str, int]]:
    """Count, for everything that began since then, which pool it ran in: {"decode": {"decode": 31}, …}."""
    pools = {node["NodeID"]: node["Labels"].get("pool", "none") for node in ray.nodes()}
    found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for task in list_tasks(limit=MOST, detail=True, raise_on_missing_output=False):
        doing = next((what for part, what in DOING.items() if part in task.name), None)
        if doing == "decode" and task.node_id and (task.start_time_ms or 0) >= since_ms:
            found[doing][pools[task.node_id]] += 1
    for actor in list_actors(limit=MOST, detail=True, raise_on_missing_output=False):
        doing = next((what for part, what in DOING.items() if part in actor.class_name), None)
        if doing and actor.node_id:
            found[doing][pools[actor.node_id]] += 1
    return {doing: dict(counts) for doing, counts in found.items()}


def remove_mid_run(cluster: Cluster, node: Any, config: FinetuneConfig, name: str, noted: dict[str, Any]) -> None:
    """Take a node away once the run has committed a checkpoint; note when, and after which step."""
    while (step := committed_step(config.run.storage_path, name)) == 0:
        time.sleep(0.1)
    noted.update(step=step, time_ms=time.time() * 1000)
    cluster.remove_node(node, allow_graceful=False)


def main(folder: Path) -> None:
    """Tune twice, and print."""
    cluster, nodes = start_nodes()
    told = {"gpus": places_with_gpus(folder), "refusals": refusals()}
    config = settings(folder)
    began = time.time() * 1000
    undisturbed = tune(config, "undisturbed")
    first = placements(began)
    noted: dict[str, Any] = {}
    removing = threading.Thread(
        target=remove_mid_run, args=(cluster, nodes["decode"], config, "disturbed", noted), daemon=True
    )
    removing.start()
    disturbed = tune(config, "disturbed")
    removing.join(60)
    told |= {
        "placements": first,
        "steps": len(undisturbed),
        "removed_after_step": noted["step"],
        "same_ledger": undisturbed == disturbed,
        "after_removal": placements(noted["time_ms"]).get("decode", {}),
        "nodes_left": sum(node["Alive"] for node in ray.nodes()),
    }
    print(json.dumps(told))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

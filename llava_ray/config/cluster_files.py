"""The resources that a cluster file offers, and whether a recipe fits them: Ray's files and KubeRay's, without Ray.

Node types have Ray's labels: ``pool`` names a node's purpose (see ``llava_ray.placement``). Types of the same pool,
such as spot and on-demand, are interchangeable.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.grpo import GRPO
from llava_ray.config.run import ClusterConfig
from llava_ray.errors import ConfigError
from llava_ray.reading import read_bounded, short_repr, wrap_errors

_KUBERAY_SPECS = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}
_ACCELERATOR = "accelerator_type:"  # Ray's prefix of the resource that names a GPU
_MAX_BYTES = 2**17
_MAX_NODES = 10**6
_MAX_PAIRS = 10_000
_MAX_BRACKETS = 1000  # the time to parse unclosed ones grows with their square
_DECODE_CPUS = 1.0  # at least, beside workers where there is no pool for decoding


@dataclass(frozen=True)
class NodeType:
    """One kind of node: its resources, its pool, and its maximum number."""

    name: str
    cpus: float
    gpus: float
    accelerators: frozenset[str]
    """Ray's names of its GPU, such as "A100" and "A100-80G"."""
    pool: str | None
    max_nodes: int


@dataclass(frozen=True)
class ClusterFile:
    """The node types of a file, and the maximum number of nodes at a time, the head included."""

    path: str
    node_types: tuple[NodeType, ...]
    max_nodes: int

    def nodes(self, pool: str) -> list[NodeType]:
        """Return the node types that a pool's work may use: its own, or all where the file has no such pool."""
        return [one for one in self.node_types if one.pool == pool] or list(self.node_types)

    def has_pool(self, pool: str) -> bool:
        """Return whether the cluster can have nodes of that pool."""
        return any(one.pool == pool and one.max_nodes for one in self.node_types)

    def places(self, pool: str, cpus: float, gpus: float, accelerator: str | None = None) -> int:
        """Count the processes of that size that fit on a pool's nodes together."""
        total, nodes_left = 0, self.max_nodes
        suited = [one for one in self.nodes(pool) if accelerator is None or accelerator in one.accelerators]
        for one in sorted(suited, key=lambda one: -_capacity(one, cpus, gpus)):
            count = min(one.max_nodes, nodes_left)
            total += count * _capacity(one, cpus, gpus)
            nodes_left -= count
        return total


def _capacity(node: NodeType, cpus: float, gpus: float) -> int:
    """Count the processes of that size that fit on one node."""
    rooms = [int(have / want) for have, want in ((node.cpus, cpus), (node.gpus, gpus)) if want > 0]
    return min(rooms) if rooms else 0


def find_misfits(cluster: ClusterFile, config: FinetuneConfig) -> list[str]:
    """Return the reasons why a run does not fit, each with its remedy; an empty list where it does."""
    wanted, data = config.cluster, config.data
    gpu = 1.0 if _takes_gpus(cluster, wanted) else 0.0
    cpus = _cpu_share(cluster, wanted.num_workers, gpu) if wanted.cpus_per_worker == "auto" else wanted.cpus_per_worker
    room = cluster.places("train", cpus, gpu, wanted.accelerator_type)
    misfits = []
    if room < wanted.num_workers:
        size = f"{cpus:g} CPU" + (f" + 1 {wanted.accelerator_type or 'GPU'}" if gpu else "")
        misfits.append(
            f"{wanted.num_workers} workers x {size}: there is room for {room} ({_listed(cluster.nodes('train'))}); "
            "lower cluster.num_workers, or raise max_workers"
        )
    samplers = config.grpo.num_rollout_actors if config.train.objective == GRPO and gpu else 0
    if wanted.num_workers <= room < wanted.num_workers + samplers and wanted.gpus_per_worker == 1:
        misfits.append(
            f"{samplers} rollout actors beside {wanted.num_workers} workers, a GPU each: there is room for {room} "
            f"({_listed(cluster.nodes('train'))}); lower grpo.num_rollout_actors or cluster.num_workers"
        )
    if _spare_cpus(cluster) - wanted.num_workers * cpus < 0:
        misfits.append(
            "decoding images: no CPU is left beside the workers; lower cluster.cpus_per_worker, or add nodes"
        )
    if data.vision_features == "streamed":
        beside = 0 if cluster.has_pool("vision") or not gpu else wanted.num_workers
        found = max(0, cluster.places("vision", data.num_decode_cpus, gpu) - beside)
        if found < data.num_vision_actors:
            misfits.append(
                f"{data.num_vision_actors} actors for vision features: there is room for {found} "
                f"({_listed(cluster.nodes('vision'))}); lower data.num_vision_actors, or add nodes of pool vision"
            )
    return misfits


def _takes_gpus(cluster: ClusterFile, wanted: ClusterConfig) -> bool:
    """Return whether workers compute on GPUs; "auto" does where each finds one."""
    if wanted.use_gpu == "auto":
        return cluster.places("train", 0.0, 1.0, wanted.accelerator_type) >= wanted.num_workers
    return wanted.use_gpu


def _cpu_share(cluster: ClusterFile, num_workers: int, gpu: float) -> float:
    """Return the CPUs that "auto" gives each worker: one, or less where some must be left for decoding."""
    return 1.0 if gpu else max(0.1, min(1.0, int(10 * _spare_cpus(cluster) / num_workers) / 10))


def _spare_cpus(cluster: ClusterFile) -> float:
    """Return the CPUs of the training nodes without those that decoding needs."""
    cpus = sum(one.cpus * one.max_nodes for one in cluster.nodes("train"))
    return cpus - (0.0 if cluster.has_pool("decode") else _DECODE_CPUS)


def _listed(nodes: list[NodeType]) -> str:
    """Format node types with their resources."""
    return ", ".join(f"{one.max_nodes} x {one.name}: {one.cpus:g} CPU, {one.gpus:g} GPU" for one in nodes)


def read_cluster_file(path: str | Path) -> ClusterFile:
    """Read a file of Ray's cluster launcher or of KubeRay.

    Raises ConfigError where it does not exist, is neither, or does not state its nodes' resources.
    """
    file, what = Path(path), f"cluster file {str(path)!r}"
    try:
        content = read_bounded(file, _MAX_BYTES, ConfigError)
    except OSError as error:
        raise ConfigError(f"cannot read {what}: {error}") from error
    if content.count(b"[") + content.count(b"{") > _MAX_BRACKETS:
        raise ConfigError(f"cannot read {what}: it has more than {_MAX_BRACKETS:,} opening brackets. Fix it.")
    with wrap_errors(f"cannot read {what}", "Fix it; the shipped ones are in clusters/.", ConfigError, ""):
        documents = [some for some in yaml.load_all(content, _Loader) if isinstance(some, dict)]
    for document in documents:
        with wrap_errors(what, "The shipped ones in clusters/ show what belongs there.", ConfigError, "lacks a key"):
            if str(document.get("kind")) in _KUBERAY_SPECS:
                return _read_kuberay(str(path), document)
            if "provider" in document:
                return _read_launcher(str(path), document)
    raise ConfigError(
        f"{str(path)!r} is no cluster file: expected Ray's (cluster_name, provider, …) or KubeRay's (kind: "
        f"{', '.join(_KUBERAY_SPECS)}); the shipped ones are in clusters/"
    )


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """A loader that bounds merge keys (``<<: *name``): a few lines can expand to more than memory holds."""

    num_pairs = 0

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Expand the merge keys of a mapping, within bounds."""
        super().flatten_mapping(node)
        self.num_pairs += len(node.value)
        if self.num_pairs > _MAX_PAIRS:
            raise yaml.constructor.ConstructorError(None, None, "too many merged keys", node.start_mark)


def _read_launcher(path: str, document: Mapping[str, Any]) -> ClusterFile:
    """Build a ClusterFile from a file for ``ray up``."""
    if document["provider"].get("type") == "local":
        workers = len(document["provider"].get("worker_ips", []))
        resources = document.get("metadata", {}).get("node_resources")
        if not resources:
            raise ConfigError(
                f"{path!r} names machines, but not what they have: add what the smallest of them has, such as "
                "metadata: {node_resources: {CPU: 8, GPU: 1}}"
            )
        return ClusterFile(path, (_node_type("machine", resources, {}, 1 + workers),), 1 + workers)
    most = int(document.get("max_workers", 2))
    types = tuple(
        _node_type(
            name,
            kind["resources"],
            kind.get("labels", {}),
            1 if name == document.get("head_node_type") else min(most, kind.get("max_workers", most)),
        )
        for name, kind in document["available_node_types"].items()
    )
    return ClusterFile(path, types, most + 1)


def _read_kuberay(path: str, document: Mapping[str, Any]) -> ClusterFile:
    """Build a ClusterFile from a RayCluster, or the one inside a RayJob or RayService."""
    spec = document["spec"]
    for key in _KUBERAY_SPECS[document["kind"]]:
        spec = spec[key]
    types = tuple(
        _node_type(
            group.get("groupName", "head"),
            _group_resources(group),
            group.get("labels", {}),
            group.get("maxReplicas", 1),
        )
        for group in (spec["headGroupSpec"], *spec.get("workerGroupSpecs", ()))
    )
    return ClusterFile(path, types, sum(one.max_nodes for one in types))


def _group_resources(group: Mapping[str, Any]) -> dict[str, float]:
    """Return the resources of a KubeRay group's nodes: its own take precedence over the container's."""
    container = group["template"]["spec"]["containers"][0].get("resources", {})
    limits = {**container.get("requests", {}), **container.get("limits", {})}
    found = {"CPU": _quantity(limits.get("cpu", 0)), "GPU": _quantity(limits.get("nvidia.com/gpu", 0))}
    return found | {name: _quantity(value) for name, value in group.get("resources", {}).items()}


def _quantity(value: object) -> float:
    """Parse Kubernetes' quantities of CPUs and GPUs: "8", 8, "500m"."""
    text = str(value)
    return float(text.removesuffix("m")) / 1000 if text.endswith("m") else float(text)


def _node_type(name: str, resources: Mapping[str, float], labels: Mapping[str, str], max_nodes: int) -> NodeType:
    """Build a NodeType from a file's values."""
    for key, value in {**{key: resources.get(key, 0) for key in ("CPU", "GPU")}, "nodes": max_nodes}.items():
        number = float(value)
        if not 0 <= number <= _MAX_NODES or (key == "nodes" and number != int(number)):
            raise ConfigError(
                f"{short_repr(name)} has {short_repr(value)} {key}, expected a number from 0 to {_MAX_NODES:,}"
            )
    accelerators = frozenset(key.removeprefix(_ACCELERATOR) for key in resources if key.startswith(_ACCELERATOR))
    cpus, gpus = (float(resources.get(key, 0)) for key in ("CPU", "GPU"))
    return NodeType(str(name), cpus, gpus, accelerators, labels.get("pool"), int(max_nodes))

"""Settings that are left to the machine: "auto" becomes a value before a run starts, from its workers' devices.

A run that has begun keeps the values it began with, on whatever machine it is resumed.
"""

import json
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.data.storage import absolute_path
from llava_ray.placement import POOL_LABEL, alive_nodes, in_pool, pool_selector
from llava_ray.runtime import Resources
from llava_ray.train.planning.memory import GIB, GPU_MEMORY_GIB

GPUS_WITHOUT_BF16 = frozenset({"K80", "M60", "P4", "P100", "T4", "V100"})  # before NVIDIA's Ampere
_ROW_LENGTHS = (16_384, 12_288, 8_192, 6_144, 4_096, 3_072, 2_048, 1_536, 1_024)
_USABLE_SHARE = 0.9  # of a GPU's memory: the estimate's error must not end a run
# A step in bf16 also converts weights and gradients: a multiplication only slightly faster would not pay.
_FASTER = 0.8
_MEASURED = "processors.json"  # in data.cache_dir: each processor is measured once
_REPEATS = 7
_SHAPE = (512, 1024, 2048)  # of the matrices multiplied: a row of tokens and a small model's MLP


@dataclass(frozen=True)
class Workers:
    """The devices of train workers: their GPUs' names and memory in GiB where known; None without GPUs."""

    gpus: Mapping[str, float | None] | None

    @classmethod
    def of(cls, resources: Resources) -> "Workers":
        """Return the workers of a run on the connected cluster."""
        if not resources.use_gpu:
            return cls(None)
        names = {resources.accelerator_type} if resources.accelerator_type else _gpu_names()
        return cls({name: GPU_MEMORY_GIB.get(name) for name in names})


def decide_settings(
    config: FinetuneConfig, workers: Workers, saved: Mapping[str, Any] | None = None
) -> tuple[FinetuneConfig, list[str]]:
    """Return the config with a value for each setting that is "auto", and a line about each that was decided.

    ``saved`` are the settings of the run that is resumed. A processor is measured where this machine has not been.
    """
    lines = []
    for key, decide in (("train.bf16", _decide_bf16), ("train.tokens_per_micro_batch", _decide_row_length)):
        name = key.removeprefix("train.")
        if getattr(config.train, name) != "auto":
            continue
        value, why = (saved or {}).get("train", {}).get(name), "as the run began"
        if value in (None, "auto"):
            value, why = decide(config, workers)  # rows in the dtype decided before
        lines.append(f"Chosen: {key} = {f'{value:,}' if type(value) is int else str(value).lower()} ({why})")
        config = config.replaced({key: value})
    return config, lines


def _decide_bf16(config: FinetuneConfig, workers: Workers) -> tuple[bool, str]:
    """Return whether bf16 pays on the workers' devices, and why."""
    if workers.gpus is not None:
        without = sorted(workers.gpus.keys() & GPUS_WITHOUT_BF16)
        return (False, f"{', '.join(without)} has no bf16") if without else (True, "on GPUs")
    ratio = _bf16_ratio(Path(absolute_path(config.data.cache_dir)))
    return ratio < _FASTER, f"a multiplication in bf16 takes {ratio:.2f} of its time in fp32 on this processor"


def _decide_row_length(config: FinetuneConfig, workers: Workers) -> tuple[int, str]:
    """Return the longest row whose estimated memory leaves a tenth of the workers' GPUs free, and why."""
    shortest = config.train.model_max_length
    if workers.gpus is None:
        return shortest, "model_max_length, without GPUs"
    known = [memory for memory in workers.gpus.values() if memory is not None]
    if not known:
        return shortest, "model_max_length: the memory of these GPUs is not known; set cluster.accelerator_type"
    length, needed = find_row_length(config, min(known) * GIB)
    return length, f"{needed / GIB:.1f} of {min(known):g} GiB on each GPU, estimated"


def find_row_length(config: FinetuneConfig, memory: float) -> tuple[int, float]:
    """Return the longest row of a list that fits into ``memory`` bytes with a tenth to spare, and its bytes.

    That is model_max_length where none fits: the run is then refused, or tried, like any other of that length.
    """
    from llava_ray.train.planning.fitting import memory_estimator  # torch

    needs, shortest = memory_estimator(), config.train.model_max_length
    for length in [*(one for one in _ROW_LENGTHS if one > shortest), shortest]:
        needed = needs(config.replaced({"train.tokens_per_micro_batch": length}))
        if needed <= _USABLE_SHARE * memory:
            return length, needed
    return shortest, needed


def _gpu_names() -> set[str]:
    """Return Ray's names of the GPUs on which workers may be placed."""
    prefix, pool = "accelerator_type:", pool_selector("train")
    nodes = [node for node in alive_nodes() if not pool or node["Labels"].get(POOL_LABEL) == pool[POOL_LABEL]]
    labelled = (
        {name.removeprefix(prefix) for name in node["Resources"] if name.startswith(prefix)}
        for node in nodes
        if node["Resources"].get("GPU")
    )
    return {max(names, key=len) for names in labelled if names}  # "A100-80G" says more than "A100"


def _bf16_ratio(cache: Path) -> float:
    """Return the workers' time of a multiplication in bf16 as a share of that in fp32."""
    if ray.is_initialized() and len(alive_nodes()) > 1:  # this process may run on another kind of processor
        return float(ray.get(ray.remote(measure_bf16).options(num_cpus=1, **in_pool("train")).remote()))
    processor, file = _processor_name(), cache / _MEASURED
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        known = {}
    if type(known.get(processor)) is not float:
        known[processor] = round(measure_bf16(), 3)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(known, indent=1) + "\n")
    return float(known[processor])


def measure_bf16() -> float:
    """Multiply matrices in bf16 and fp32 with one thread; return the ratio of the median times."""
    import torch

    rows, inner, columns = _SHAPE
    medians, num_threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            left, right = torch.ones(rows, inner, dtype=dtype), torch.ones(columns, inner, dtype=dtype)
            times = []
            for _ in range(_REPEATS):
                start = time.process_time()  # what other processes take does not count
                torch.nn.functional.linear(left, right)
                times.append(time.process_time() - start)
            medians[dtype] = statistics.median(times)
    finally:
        torch.set_num_threads(num_threads)
    return medians[torch.bfloat16] / max(medians[torch.float32], 1e-9)


def _processor_name() -> str:
    """Return the processor's model and the instructions that decide, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in facts.items()}
    instructions = [flag for flag in named.get("flags", "").split() if "bf16" in flag]
    return " ".join([named.get("model name", platform.machine()), *instructions])

"""The dry run, before anything is downloaded or started: parts, data, steps, memory, and whether the run fits."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from llava_ray.config.cluster_files import ClusterFile, find_misfits, read_cluster_file
from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.grpo import GRPO
from llava_ray.config.mixtures import learnt_paths
from llava_ray.config.sources import describe_source
from llava_ray.data.first_look import count_samples
from llava_ray.data.mixture import count_draws, list_shares, naming_source
from llava_ray.errors import ConfigError, DataError
from llava_ray.invocation import command
from llava_ray.model.summary import ModelSummary, summarize_model
from llava_ray.runtime import local_threads, num_cores
from llava_ray.train.planning.automatic import Workers, decide_settings
from llava_ray.train.planning.fitting import suggest_memory_fixes
from llava_ray.train.planning.memory import GIB, GPU_MEMORY_GIB, Memory, estimate_memory
from llava_ray.train.planning.sizing import measure_sizes, run_settings
from llava_ray.uploads import MB, check_upload
from llava_ray.worker_forks import starts_here

_LABELS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimiser state",
    "activations": "activations",
    "logits": "logits",
    "vision": "vision tower",
    "buffers": "DeepSpeed's buffers",
    "reserved": "CUDA, NCCL, allocator",
}
_GPU_ONLY = ("reserved",)


@dataclass(frozen=True)
class Device:
    """The device of each worker: its name, its memory in GiB if known, and whether it is a GPU."""

    name: str
    memory_gib: float | None
    is_gpu: bool = True


def describe_run(
    config: FinetuneConfig, gpu_memory_gib: float | None = None, cluster_file: str | None = None
) -> Iterator[str]:
    """Yield the description of a run, a line at a time.

    ``gpu_memory_gib`` overrides the memory of the cluster file's GPUs or of cluster.accelerator_type. Raises
    ModelError if the model's size cannot be known without a download, and ConfigError if the run does not fit into the
    cluster or, at the end, into the GPUs' memory, with settings under which it would.
    """
    cluster = read_cluster_file(cluster_file) if cluster_file else None
    if cluster is not None:
        yield from _describe_cluster(cluster, config)
        yield f"Upload {check_upload(Path.cwd()) / MB:.1f} MB with ray job submit --working-dir ."
    device = find_device(config, gpu_memory_gib, cluster)
    workers = Workers({device.name: device.memory_gib} if device.is_gpu else None)
    config, decided = decide_settings(config, workers)
    yield from decided
    summary = summarize_model(config)
    yield from _describe_parts(summary)
    yield from tell_data(config)
    if config.train.objective == GRPO:
        grpo = config.grpo
        yield f"Rollouts {grpo.group_size} answers to each, by {grpo.num_rollout_actors} actor(s) with the whole model"
    memory = estimate_memory(measure_sizes(summary), run_settings(config))
    if not device.is_gpu:
        memory = replace(memory, reserved=0.0)
    yield from tell_memory(memory, config, device)
    if not device.is_gpu and cluster is None and starts_here(config.cluster.address):
        yield f"Compute threads of each worker: {local_threads(config.cluster)}, on {num_cores()} core(s) here"
    if device.is_gpu and device.memory_gib is not None and memory.total > device.memory_gib * GIB:
        fixes = [
            f"  {fix}  ({needed / GIB:.1f} GiB)"
            for fix, needed in suggest_memory_fixes(config, device.memory_gib * GIB)
        ]
        raise ConfigError(
            f"the run needs {memory.total / GIB:.1f} GiB on each worker's GPU, {device.name} has "
            f"{device.memory_gib:g} GiB. "
            + (
                "It would fit with any of\n" + "\n".join(fixes)
                if fixes
                else "No known setting makes it fit: use larger GPUs."
            )
        )


def _describe_cluster(cluster: ClusterFile, config: FinetuneConfig) -> Iterator[str]:
    """Yield where the run would be placed. Raises ConfigError with every reason why it does not fit."""
    if misfits := find_misfits(cluster, config):
        raise ConfigError(f"the run does not fit {cluster.path}. " + ". ".join(misfits))
    pools = ", ".join(sorted({one.pool for one in cluster.node_types if one.pool}))
    yield f"Fits  {cluster.path}" + (f" (pools: {pools})" if pools else "")


def find_device(config: FinetuneConfig, gpu_memory_gib: float | None, cluster: ClusterFile | None = None) -> Device:
    """Return the GPU named by its memory, by cluster.accelerator_type or, as the smallest, by a cluster file.

    Without any of them, and where the run would start on this machine, return the machine.
    """
    if not _uses_gpu(config, gpu_memory_gib, cluster):
        here = None if cluster else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
        return Device("this machine, for all", here, is_gpu=False)
    if gpu_memory_gib is not None:
        return Device("the GPU", gpu_memory_gib)
    name = config.cluster.accelerator_type
    named = {name} if name else set(_gpu_names(cluster) if cluster else ())
    known = {one: GPU_MEMORY_GIB[one] for one in named if one in GPU_MEMORY_GIB}
    name = min(known, key=lambda one: known[one], default=name)
    return Device(name or "the GPU", known.get(name) if name else None)


def _uses_gpu(config: FinetuneConfig, gpu_memory_gib: float | None, cluster: ClusterFile | None) -> bool:
    """Return whether a run's workers would have GPUs; a cluster that is not queried is assumed to have some."""
    chosen = config.cluster
    if chosen.use_gpu != "auto":
        return chosen.use_gpu
    if gpu_memory_gib is not None or chosen.accelerator_type:
        return True
    if cluster is not None:
        return any(node.gpus for node in cluster.nodes("train"))
    return bool(chosen.address or os.environ.get("RAY_ADDRESS")) or torch.cuda.device_count() > 0


def _gpu_names(cluster: ClusterFile) -> Iterator[str]:
    """Yield the most exact name ("A100-80G" before "A100") of each kind of GPU that trains."""
    for node in cluster.nodes("train"):
        if node.accelerators:
            yield max(node.accelerators, key=len)


def _describe_parts(summary: ModelSummary) -> Iterator[str]:
    """Yield a table of the model's parts with their trainable parameters."""
    yield f"{'Model':<16}{'parameters':>18}{'trainable':>18}"
    for part in summary.parts:
        yield f"  {part.name:<14}{part.num_total:>18,}{part.num_trainable:>18,}  {part.kind}, {part.origin}"
    total, trainable = (sum(getattr(part, key) for part in summary.parts) for key in ("num_total", "num_trainable"))
    yield f"  {'total':<14}{total:>18,}{trainable:>18,}"


def tell_data(config: FinetuneConfig) -> Iterator[str]:
    """Yield where the data are, shares of a mixture, and the number of steps if known.

    Raises DataError or ConfigError if there are no data, or none of a source.
    """
    train, data = config.train, config.data
    counts = count_sources(config)
    count = count_of_run(config)
    if not data.sources:
        yield f"Data  {data.data_path}" + ("" if count is None else f", {count:,} samples")
    elif count is None:
        for number, source in enumerate(data.sources):
            known = "" if counts[number] is None else f", {counts[number]:,} samples"
            yield f"Data  {describe_source(number, source)}: {source.data_path}{known}"
        yield f"Shares known when the data have been prepared ({command('prepare')})"
    else:
        sizes = [size or 0 for size in counts]
        draws = count_draws(data.sources, sizes, data.epoch_samples)
        yield from list_shares(data, list(zip(sizes, draws, strict=True)))
    steps = steps_of_run(config, count)
    if count is not None:
        yield f"Steps {steps:,} of {train.global_batch_size} samples, if none is rejected or split"
    elif steps is not None:
        yield f"Steps at most {steps:,} of {train.global_batch_size} samples (train.max_steps)"
    else:
        yield f"Steps known when the data have been prepared ({command('prepare')})"


def count_sources(config: FinetuneConfig) -> list[int | None]:
    """Return the number of samples of each source if none is rejected, of one where there is no mixture.

    None stands for a number that cannot be known from here. Raises DataError for a source without any.
    """
    data, counts = config.data, []
    limits = [source.max_samples for source in data.sources] or [data.max_samples]
    for number, (path, most) in enumerate(zip(learnt_paths(data).values(), limits, strict=True)):
        count = count_samples(path)
        if count == 0:
            with naming_source(data, number):
                raise DataError(f"{path} holds no record; check data.data_path")
        counts.append(count if count is None else min(count, most or count))
    return counts


def count_of_run(config: FinetuneConfig) -> int | None:
    """Return the samples of an epoch if none is rejected; None if they cannot be known from here."""
    counts = count_sources(config)
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return None
    data = config.data
    return sum(count_draws(data.sources, known, data.epoch_samples)) if data.sources else known[0]


def steps_of_run(config: FinetuneConfig, count: int | None) -> int | None:
    """Return the steps of a run over ``count`` samples; without a count its upper bound, None if unbounded."""
    train = config.train
    if count is None:
        return train.max_steps
    steps = math.ceil(count / train.global_batch_size) * train.num_train_epochs
    return min(steps, train.max_steps or steps)


def tell_memory(memory: Memory, config: FinetuneConfig, device: Device) -> Iterator[str]:
    """Yield the memory that each worker needs, and what its device has."""
    train, cluster = config.train, config.cluster
    yield (
        f"Memory of each worker ({cluster.num_workers}): ZeRO {train.zero_stage}, a row of {train.row_length:,} "
        f"tokens, {'bf16' if train.uses_bf16 else 'fp32'}"
        + (", gradient checkpointing" if train.gradient_checkpointing else "")
        + (", optimiser offloaded" if train.offload_optimizer else "")
    )
    for field in fields(memory):
        if field.name in _LABELS and (device.is_gpu or field.name not in _GPU_ONLY):
            yield f"  {_LABELS[field.name]:<24}{getattr(memory, field.name) / GIB:>8.2f} GiB"
    yield f"  {'total':<24}{memory.total / GIB:>8.2f} GiB"
    if memory.host:
        yield f"  {'host memory a worker':<24}{memory.host / GIB:>8.2f} GiB"
    if device.memory_gib is not None:
        yield f"  {device.name:<24}{device.memory_gib:>8.2f} GiB"
    elif device.is_gpu:
        yield (
            f"Not compared: the memory of {device.name} is not known here. Set cluster.accelerator_type to one of "
            f"{', '.join(GPU_MEMORY_GIB)}, or give --gpu_memory_gib."
        )

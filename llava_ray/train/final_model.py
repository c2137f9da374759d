"""What a run leaves behind: whole tensors gathered from the engine and written as a bundle."""

import tempfile
from typing import TYPE_CHECKING, Any

import fsspec
import torch
import torch.distributed as dist

from llava_ray.config.sections import FinetuneConfig
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.saving import Contents, names_beside, save_bundle
from llava_ray.train.settings import LoopSettings

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def save_final_model(engine: "DeepSpeedEngine", parts: LlavaParts, settings: LoopSettings) -> None:
    """Write the run's model; collective. What cannot have changed is named instead of copied."""
    include = find_contents(settings.config)
    tensors = gather_tensors(engine, parts, include)
    if dist.get_rank() == 0:
        training = describe_training(settings, settings.num_steps)
        files, inner = fsspec.core.url_to_fs(settings.bundle_folder)
        if "file" in files.protocol:
            save_bundle(inner, parts, tensors, include=include, training=training)
        else:
            with tempfile.TemporaryDirectory() as folder:
                new = f"{folder}/model"
                save_bundle(new, parts, tensors, include=include, training=training, place=settings.bundle_folder)
                files.put(new, inner, recursive=True)
    dist.barrier()


def find_contents(config: FinetuneConfig) -> Contents:
    """Return what bundles of a run hold: an adapter, or only the projector, where the other parts stay as they are."""
    if config.lora.lora_enable:
        return "adapter"
    # A quantised language model is frozen, and cannot be written as it was.
    return "projector" if config.model.tune_mm_mlp_adapter or config.lora.bits < 16 else "all"


def describe_training(settings: LoopSettings, steps: int) -> dict[str, Any]:
    """Return what a bundle says of its origin."""
    return {
        "run": settings.config.run.name,
        "steps": steps,
        "data_hash": settings.data_hash,
        "plan_hash": settings.plan_hash,
    }


def gather_tensors(engine: "DeepSpeedEngine", parts: LlavaParts, include: Contents) -> dict[str, torch.Tensor]:
    """Return the whole tensors that such a bundle needs on rank 0's CPU, one gathered at a time.

    Every rank must take part, in the same order.
    """
    from deepspeed.runtime.zero import GatheredParameters

    llava = engine.module
    partitioned = engine.zero_optimization_stage() == 3
    beside = names_beside(parts)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in llava.named_parameters():
        learns_beside = include == "adapter" and parameter.requires_grad
        if include == "all" or name.startswith(beside) or learns_beside:
            with GatheredParameters([parameter], enabled=partitioned):
                if dist.get_rank() == 0:
                    tensors[name] = parameter.detach().cpu().clone()
    if include == "all":
        kept = llava.state_dict().keys()
        tensors |= {name: buffer.cpu() for name, buffer in llava.named_buffers() if name in kept}
    return tensors

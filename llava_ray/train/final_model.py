"""The final model of a run: tensors gathered from the engine and written as a bundle."""

import tempfile
from typing import TYPE_CHECKING, Any

import fsspec
import torch
import torch.distributed as dist

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.saving import Contents, names_beside, save_bundle
from llava_ray.train.settings import LoopSettings

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def save_final_model(
    engine: "DeepSpeedEngine", parts: LlavaParts, settings: LoopSettings, steps: int | None = None
) -> None:
    """Save the model after ``steps`` (default: all) as a bundle; collective.

    Parts that cannot have changed are referenced, not copied.
    """
    include = find_contents(settings.config)
    tensors = gather_tensors(engine, parts, include)
    if dist.get_rank() == 0:
        training = describe_training(settings, settings.num_steps if steps is None else steps)
        files, inner = fsspec.core.url_to_fs(settings.bundle_folder)
        if "file" in files.protocol:
            save_bundle(inner, parts, tensors, include=include, training=training)
        else:
            # Tensor files are written with seeks, which object storage cannot do: write locally, then upload.
            with tempfile.TemporaryDirectory() as folder:
                new = f"{folder}/model"
                save_bundle(new, parts, tensors, include=include, training=training, place=settings.bundle_folder)
                files.put(new, inner, recursive=True)
    dist.barrier()


def find_contents(config: FinetuneConfig) -> Contents:
    """Return which parts a run's bundle holds: an adapter or the projector alone where the other parts are frozen."""
    if config.lora.lora_enable:
        return "adapter"
    # A quantised language model is frozen, and its original weights are not in memory any more.
    return "projector" if config.model.tune_mm_mlp_adapter or config.lora.bits < 16 else "all"


def describe_training(settings: LoopSettings, steps: int) -> dict[str, Any]:
    """Return the ``training`` section of a bundle's manifest: the run, its steps and hashes."""
    return {
        "run": settings.config.run.name,
        "steps": steps,
        "data_hash": settings.data_hash,
        "plan_hash": settings.plan_hash,
    }


def gather_tensors(engine: "DeepSpeedEngine", parts: LlavaParts, include: Contents) -> dict[str, torch.Tensor]:
    """Gather the tensors that a bundle needs on rank 0's CPU, one at a time; collective.

    Every rank must iterate in the same order, or the collectives of different parameters would be matched.
    """
    from deepspeed.runtime.zero import GatheredParameters

    llava = engine.module
    partitioned = engine.zero_optimization_stage() == 3
    companions = names_beside(parts)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in llava.named_parameters():
        is_trainable = include == "adapter" and parameter.requires_grad
        if include == "all" or name.startswith(companions) or is_trainable:
            with GatheredParameters([parameter], enabled=partitioned):
                if dist.get_rank() == 0:
                    tensors[name] = parameter.detach().cpu().clone()
    if include == "all":
        persistent = llava.state_dict().keys()
        tensors |= {name: buffer.cpu() for name, buffer in llava.named_buffers() if name in persistent}
    return tensors

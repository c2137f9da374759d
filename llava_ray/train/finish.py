"""The end of a run: whole tensors gathered from the engine and written as a bundle."""

import tempfile
from typing import TYPE_CHECKING, Literal

import fsspec
import torch
import torch.distributed as dist

from llava_ray.model.bundle import LlavaParts, names_beside, save_bundle
from llava_ray.train.settings import LoopSettings

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def write_bundle(engine: "DeepSpeedEngine", parts: LlavaParts, settings: LoopSettings) -> None:
    """Write the run's model; collective. Alignment, which learns the projector only, leaves the other parts out."""
    include: Literal["all", "projector"] = "projector" if settings.config.model.tune_mm_mlp_adapter else "all"
    tensors = gather_tensors(engine, names_beside(parts) if include == "projector" else ("",))
    if dist.get_rank() == 0:
        training = {
            "run": settings.config.run.name,
            "steps": settings.num_steps,
            "data_hash": settings.data_hash,
            "plan_hash": settings.plan_hash,
        }
        files, inner = fsspec.core.url_to_fs(settings.bundle_folder)
        if "file" in files.protocol:
            save_bundle(inner, parts, tensors, include=include, training=training)
        else:
            with tempfile.TemporaryDirectory() as folder:
                save_bundle(f"{folder}/model", parts, tensors, include=include, training=training)
                files.put(f"{folder}/model", inner, recursive=True)
    dist.barrier()


def gather_tensors(engine: "DeepSpeedEngine", prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Return whole tensors on rank 0's CPU, one gathered at a time; every rank must take part, in the same order."""
    from deepspeed.runtime.zero import GatheredParameters

    llava = engine.module
    partitioned = engine.zero_optimization_stage() == 3
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in llava.named_parameters():
        if name.startswith(prefixes):
            with GatheredParameters([parameter], enabled=partitioned):
                if dist.get_rank() == 0:
                    tensors[name] = parameter.detach().cpu().clone()
    tensors |= {name: buffer.cpu() for name, buffer in llava.named_buffers() if name in llava.state_dict()}
    return tensors

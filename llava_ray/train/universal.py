"""Resume with another number of workers: DeepSpeed's universal checkpoints, with two of its defects worked around."""

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import ray.train
import torch.distributed as dist

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def load_for_other_world_size(engine: "DeepSpeedEngine", folder: Path, tag: str) -> None:
    """Convert a ZeRO 1-3 checkpoint once per node, and load it into this world size. Collective."""
    from deepspeed.checkpoint import ds_to_universal

    node_rank = ray.train.get_context().get_node_rank()
    target = Path(tempfile.gettempdir()) / f"llava_ray-universal-{folder.name}-node{node_rank}"
    if ray.train.get_context().get_local_rank() == 0:
        settings = SimpleNamespace(
            input_folder=str(folder / tag),
            output_folder=str(target / tag),
            num_extract_workers=1,  # one each stays in this process; more would fork a Ray worker
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=engine.zero_optimization_stage() < 3,
        )
        ds_to_universal.main(settings)
    dist.barrier()
    # At stage 3 DeepSpeed 0.19 copies group 0's settings onto all groups and lets them share one step counter.
    optimizer = engine.optimizer.optimizer
    saved_settings = [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    engine._config.load_universal_checkpoint = True
    engine.load_checkpoint(str(target), tag=tag, load_module_strict=False)
    engine._config.load_universal_checkpoint = False
    for group, settings_before, rate in zip(
        optimizer.param_groups, saved_settings, engine.lr_scheduler.get_last_lr(), strict=True
    ):
        group.update(settings_before, lr=rate)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].clone()

"""DeepSpeed's configuration from ours: the ZeRO stage as a setting, everything else fixed."""

from typing import Any

from llava_ray.config.train import TrainConfig

FUSED_ADAM = True
"""Whether AdamW updates in one kernel: it is faster, and on GPUs holds one copy of the weights less."""


def zero_config(train: TrainConfig, *, gpu: bool = False) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a run.

    Accumulation is ours (``managed_gradient_accumulation`` off): a step has as many micro-batches as its packing
    needs. The optimizer and the schedule are given to ``deepspeed.initialize`` as objects, so parameter groups and
    the cosine survive every stage, which the original's offload configuration lost.

    On GPUs, bf16 gradients are added up in fp32, which keeps the smaller ones. On CPUs that would change the losses of
    runs that are under way by half a per cent. Below ZeRO 2 DeepSpeed has no such setting, or keeps other files for it;
    an offloaded optimiser adds up in fp32 by itself.
    """
    zero: dict[str, Any] = {
        "stage": train.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": train.zero_stage >= 2,  # refused below stage 2 with unmanaged accumulation
    }
    if train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    sums = "fp32" if gpu and train.uses_bf16 and train.zero_stage >= 2 and not train.offload_optimizer else None
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": train.max_grad_norm,
        "bf16": {"enabled": train.uses_bf16},
        "data_types": {"grad_accum_dtype": sums},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }

"""The DeepSpeed engine around the trainable parts; a frozen tower stays outside it.

DeepSpeed is imported inside the functions: only workers need it, and its import takes seconds and prints.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch.optim import AdamW

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.lora import Quantization
from llava_ray.config.train import TrainConfig
from llava_ray.errors import ConfigError
from llava_ray.model.adaptation import adapt
from llava_ray.model.assembly import LlavaParts, assemble
from llava_ray.model.freezing import TrainableCount, freeze
from llava_ray.model.network.kernels import use_kernels
from llava_ray.train.compiling import compile_blocks
from llava_ray.train.deepspeed_import import import_deepspeed
from llava_ray.train.groups import parameter_groups
from llava_ray.train.schedule import schedule
from llava_ray.train.zero import FUSED_ADAM, zero_config

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class ShardedLoading:
    """Context in which transformers partitions the weights it loads, so that no rank ever holds the whole model."""

    def __init__(self, train: TrainConfig) -> None:
        """Store the run's ZeRO settings; below stage 3 the block does nothing."""
        self.train = train
        self.config: Any = None

    def __enter__(self) -> None:
        """Activate ZeRO-3 initialisation: transformers holds a weak reference to the configuration object."""
        if self.train.zero_stage == 3:
            from transformers.integrations.deepspeed import HfDeepSpeedConfig

            self.config = HfDeepSpeedConfig(zero_config(self.train))

    def __exit__(self, *error: object) -> None:
        """Release the configuration, or every later model would be partitioned too."""
        self.config = None


def assemble_for(
    config: FinetuneConfig,
    language_model_context: AbstractContextManager[Any] | None = None,
    quantization: Quantization | None = None,
) -> LlavaParts:
    """Load the model that a run starts from. Raises ModelError; see ``assemble``."""
    return assemble(
        config.model,
        config.data.image_aspect_ratio,
        dtype=torch.bfloat16 if config.train.uses_bf16 else torch.float32,
        seed=config.train.seed,
        model_max_length=config.train.model_max_length,
        language_model_context=language_model_context,
        quantization=quantization,
    )


def assemble_trainable(config: FinetuneConfig) -> tuple[LlavaParts, list[TrainableCount]]:
    """Load the model with its adapters, freeze its parts as configured, and count what is trainable."""
    parts = assemble_for(config, ShardedLoading(config.train), config.lora.quantization)
    with ShardedLoading(config.train):  # PEFT checks for it as well
        adapt(parts, config.lora, config.train.seed)
    return parts, freeze(parts.llava, parts.tower, config.model, parts.new_token_ids)


def load_parts(
    config: FinetuneConfig, device: torch.device, say: Callable[[str], object] = lambda line: None
) -> LlavaParts:
    """Load the model, freeze its parts as configured, and move the tower to its device; ``say`` what is trainable."""
    deepspeed = import_deepspeed()
    check_bf16(config.train, device)
    transformers.utils.logging.disable_progress_bar()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where quantised weights are put as they are read
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor", FutureWarning)  # DeepSpeed's own call
    # Its new name is not there yet in the oldest transformers that we support.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing_enable", FutureWarning)
    # Its shared-memory collectives need a compiler and half a minute at first use; gloo is always available.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
    parts, trainable = assemble_trainable(config)
    say(f"Trainable: {'; '.join(map(str, trainable))}")
    kernels = use_kernels(parts.llava.language_model, config.train.use_liger_kernel, device)
    if kernels:
        say(f"Liger's kernels: {', '.join(kernels)}")
    if config.model.attn_implementation == "sdpa":
        parts.llava.attend_by_sample()
    if config.train.torch_compile:
        say(f"Compiled: {compile_blocks(parts.llava.language_model)} blocks, which takes the first steps a while")
    if config.data.vision_features == "inline":
        parts.tower.to(device)
    if config.train.gradient_checkpointing:
        parts.llava.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.model.unfreeze_mm_vision_tower:
            parts.tower.enable_checkpointing()
    parts.llava.train()
    return parts


def build_engine(parts: LlavaParts, config: FinetuneConfig, num_steps: int) -> "DeepSpeedEngine":
    """Build the engine around the trainable parts, with AdamW, the schedule and the run's ZeRO stage."""
    deepspeed = import_deepspeed()
    train = config.train
    groups = parameter_groups(parts.llava, train)
    settings: dict[str, Any] = {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "eps": train.adam_epsilon,
    }
    if train.offload_optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiled at first use, so only when configured

        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    else:
        # One pass over weights, gradients and moments, on GPUs without a copy of all of them, on CPUs in a sixth of the
        # time; losses differ by 2e-7. A resumed run keeps what its checkpoint says.
        optimizer = AdamW(groups, fused=FUSED_ADAM, **settings)
    engine, *_ = deepspeed.initialize(
        model=parts.llava,
        optimizer=optimizer,
        lr_scheduler=lambda wrapped: schedule(wrapped, train, num_steps),
        config=zero_config(train, gpu=torch.cuda.is_available()),
        dist_init_required=False,
    )
    return engine


def check_bf16(train: TrainConfig, device: torch.device) -> None:
    """Raise ConfigError where a GPU cannot compute in bfloat16; it would be emulated, many times slower."""
    if train.uses_bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"train.bf16 = true, but {torch.cuda.get_device_name(device)} has no bfloat16 (it came with compute "
            "capability 8.0); set train.bf16 = false or choose another GPU (cluster.accelerator_type)"
        )

"""Settings of the optimisation."""

from typing import Literal, Self

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from llava_ray.config.preference import PairObjectiveName
from llava_ray.config.schema import ConfigSection, Fraction

# Settings that may be "auto" and are decided as a run begins.
AUTOMATIC_SETTINGS = ("train.bf16", "train.tokens_per_micro_batch")


class TrainConfig(ConfigSection):
    """Optimisation of the parameters."""

    objective: Literal["cross_entropy", "grpo"] | PairObjectiveName = "cross_entropy"
    """The loss: "cross_entropy" of the records' answers; from pairs of answers ([preference], docs/preferences.md)
    "dpo", "ipo", "hinge", "robust", "dpo_norm" (averages over tokens), "simpo", "orpo"; or "grpo" ([grpo]), which
    samples answers and learns from their rewards."""
    num_train_epochs: PositiveInt = 1
    """Passes over the data."""
    max_steps: PositiveInt | None = None
    """Stop after so many steps; the learning-rate schedule ends there too."""
    global_batch_size: PositiveInt = 128
    """Samples in a step over all workers (LLaVA: per-device batch x devices x accumulation)."""
    model_max_length: PositiveInt = 2048
    """Longest sample in tokens, image tokens included."""
    tokens_per_micro_batch: PositiveInt | Literal["auto"] | None = None
    """Tokens in a packed row; default model_max_length. "auto" is the longest, up to 16,384, that the workers' GPUs are
    estimated to have memory for: long rows save GPUs from waiting for one another."""
    learning_rate: PositiveFloat = 2e-5
    """Peak learning rate."""
    mm_projector_lr: PositiveFloat | None = None
    """Peak learning rate of the projector; default learning_rate."""
    mm_vision_tower_lr: PositiveFloat | None = None
    """Peak learning rate of the tower (model.unfreeze_mm_vision_tower); default learning_rate."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay, of matrices only: biases and norms never decay."""
    adam_beta1: Fraction = 0.9
    """AdamW's decay of the first moment."""
    adam_beta2: Fraction = 0.999
    """AdamW's decay of the second moment."""
    adam_epsilon: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps with linear warm-up of the learning rate."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "warmup_stable_decay"] = "cosine"
    """Shape of the learning-rate schedule after the warm-up; "warmup_stable_decay" holds the rate, and lets it fall to
    zero over the last three tenths of the steps."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    bf16: bool | Literal["auto"] = True
    """Compute in bfloat16 with fp32 master weights; "auto" does so where the workers' GPUs have it or their processor
    multiplies it faster, which is measured."""
    tf32: bool = True
    """Allow TensorFloat-32 on NVIDIA GPUs."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass."""
    use_liger_kernel: bool | Literal["auto"] = "auto"
    """Compute norms, rotary embeddings and gated MLPs of the language model with Liger's kernels; "auto" does so on
    NVIDIA GPUs where liger-kernel is installed (extra gpu). May be changed when a run is resumed."""
    torch_compile: bool = False
    """Compile the language model's blocks (torch.compile). It takes minutes at every start, so measure whether it pays;
    not with gradient_checkpointing or zero_stage = 3. May be changed when a run is resumed."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage: partitions 1 optimiser states, 2 + gradients, 3 + parameters."""
    offload_optimizer: bool = False
    """Offload the optimiser states to CPU memory (ZeRO 1-3 on GPUs)."""
    seed: NonNegativeInt = 42
    """Seed of the sample order, of new parameters and of dropout."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss is not finite stops the run, or is skipped: weights and optimiser stay as they are. Ten such
    steps in a row stop the run all the same. May be changed when a run is resumed."""
    fetch_loss_steps: PositiveInt | Literal["auto"] = "auto"
    """Steps between two looks at the losses, for which the host of a GPU waits until all steps are computed: so much
    later a loss that is not finite, or Ctrl-C, ends the run. "auto" is 10 on GPUs, 1 on CPUs; 1 with
    on_nonfinite = "skip". A checkpoint looks first."""
    save_steps: PositiveInt = 500
    """Steps between resumable checkpoints; one is also saved at the end."""
    save_total_limit: PositiveInt = 1
    """Number of checkpoints to keep."""
    group_by_modality_length: bool | None = None
    """LLaVA's flag; not needed: packing leaves no padding to save."""

    @property
    def uses_bf16(self) -> bool:
        """Return whether to compute in bfloat16; "auto" has been decided before anything asks."""
        return self.bf16 is True

    @property
    def row_length(self) -> int:
        """Return the tokens in a packed row."""
        length = self.tokens_per_micro_batch
        return length if isinstance(length, int) else self.model_max_length

    @model_validator(mode="after")
    def whole_blocks_are_compiled(self) -> Self:
        """Reject compiling where torch cannot: within checkpoints, and weights that ZeRO 3 gathers."""
        if self.torch_compile and self.gradient_checkpointing:
            raise ValueError(
                "torch_compile = true with gradient_checkpointing = true: torch compiles nothing inside a checkpoint; "
                "set one of them to false"
            )
        if self.torch_compile and self.zero_stage == 3:
            raise ValueError(
                "torch_compile = true with zero_stage = 3: the compiler cannot look through weights that are gathered "
                "layer by layer; set zero_stage = 2 or torch_compile = false"
            )
        return self

    @model_validator(mode="after")
    def rows_hold_samples(self) -> Self:
        """Reject rows shorter than the longest sample."""
        if self.row_length < self.model_max_length:
            raise ValueError(
                f"tokens_per_micro_batch = {self.row_length} is below model_max_length = {self.model_max_length}: "
                "a sample must fit into one row; raise the first or lower the second"
            )
        return self

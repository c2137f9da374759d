"""All settings of a fine-tuning run and of a data preparation; LLaVA's own names wherever LLaVA has one."""

from typing import Self

from pydantic import model_validator

from llava_ray.config.data import DataConfig
from llava_ray.config.grpo import GrpoConfig, check_grpo
from llava_ray.config.held_out import HeldOutConfig, check_selection, has_held_out
from llava_ray.config.lora import LoraConfig
from llava_ray.config.mixtures import check_run_sources
from llava_ray.config.model import ModelConfig
from llava_ray.config.preference import WithPreferences
from llava_ray.config.run import ClusterConfig, RunConfig, TrackingConfig
from llava_ray.config.schema import ConfigSection
from llava_ray.config.train import TrainConfig


class FinetuneConfig(WithPreferences):
    """All settings of a fine-tuning run."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    grpo: GrpoConfig = GrpoConfig()
    held_out: HeldOutConfig = HeldOutConfig()
    run: RunConfig = RunConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def sources_fit(self) -> Self:
        """Reject sources that do not fit the run, and scores of held-out samples that nobody evaluates."""
        check_run_sources(self.data, self.train)
        check_selection(self.held_out, self.data)
        return self

    @property
    def evaluates(self) -> bool:
        """Return whether there are held-out samples, of the run or of a source."""
        return has_held_out(self.held_out, self.data)

    @model_validator(mode="after")
    def answers_need_whole_weights(self) -> Self:
        """Reject held-out answers where no worker has the whole model."""
        if self.evaluates and self.held_out.num_answers and self.train.zero_stage == 3:
            raise ValueError(
                "held_out.num_answers needs the whole model in each worker, which train.zero_stage = 3 takes apart: "
                "set held_out.num_answers = 0 (the held-out loss stays), or train.zero_stage = 2"
            )
        return self

    @model_validator(mode="after")
    def rollouts_fit(self) -> Self:
        """Reject what does not fit an objective of sampled answers."""
        check_grpo(self.grpo, self.train, self.data)
        return self

    @model_validator(mode="after")
    def offload_needs_zero(self) -> Self:
        """Reject an offload that DeepSpeed would ignore."""
        if self.train.offload_optimizer and self.train.zero_stage == 0:
            raise ValueError("train.offload_optimizer needs train.zero_stage 1, 2 or 3")
        return self

    @model_validator(mode="after")
    def adapter_fits(self) -> Self:
        """Reject an adapter of which nothing would be trained, and a quantised base that cannot be trained."""
        still = [key for key in ("tune_mm_mlp_adapter", "freeze_backbone") if getattr(self.model, key)]
        if self.lora.lora_enable and still:
            raise ValueError(
                f"lora.lora_enable with model.{still[0]} contradict each other: drop one (with an adapter the language "
                "model's own weights never learn)"
            )
        if self.lora.bits < 16 and not (self.lora.lora_enable or still):
            raise ValueError(
                f"lora.bits = {self.lora.bits}: quantised weights cannot learn; set lora.lora_enable = true (QLoRA) or "
                "lora.bits = 16"
            )
        if self.lora.bits < 16 and self.train.zero_stage == 3:
            raise ValueError(
                f"lora.bits = {self.lora.bits} with train.zero_stage = 3: ZeRO 3 cannot partition quantised weights; "
                "set train.zero_stage = 2 (each worker then holds the quantised base), or lora.bits = 16"
            )
        return self

    @model_validator(mode="after")
    def tower_learns_in_the_workers(self) -> Self:
        """Reject a trainable tower outside the train workers, and a learning rate for a frozen one."""
        if self.model.unfreeze_mm_vision_tower and self.data.vision_features != "inline":
            raise ValueError(
                f"data.vision_features = {self.data.vision_features!r} takes features from a frozen tower, but "
                "model.unfreeze_mm_vision_tower lets it learn: set 'inline'"
            )
        if self.train.mm_vision_tower_lr is not None and not self.model.unfreeze_mm_vision_tower:
            raise ValueError("train.mm_vision_tower_lr has no effect without model.unfreeze_mm_vision_tower = true")
        return self

    @model_validator(mode="after")
    def canvases_are_used(self) -> Self:
        """Reject canvases without anyres."""
        if self.model.image_grid_pinpoints is not None and self.data.image_aspect_ratio != "anyres":
            raise ValueError("model.image_grid_pinpoints has no effect without data.image_aspect_ratio = 'anyres'")
        return self


class PrepareConfig(ConfigSection):
    """All settings of a data preparation."""

    data: DataConfig
    run: RunConfig = RunConfig()
    cluster: ClusterConfig = ClusterConfig()

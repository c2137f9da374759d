"""Settings of a run's model: where its parts are from, and which of them learn."""

from typing import Literal, Self

from pydantic import field_validator, model_validator

from llava_ray.config.geometry import GeometrySettings
from llava_ray.config.schema import ConfigSection

# Settings that name a model or a part of one: a folder, a file or a hub id.
MODEL_PATHS = ("model.model_name_or_path", "model.model_base", "model.vision_tower", "model.pretrain_mm_mlp_adapter")


class _ModelSources(ConfigSection):
    """Where a model's parts are from."""

    model_name_or_path: str
    """The language model (hub id or folder), or a LLaVA to start from: a llava_ray bundle or any published layout."""
    model_base: str | None = None
    """Language model under an adapter or a projector-only folder that does not name it, or that has moved."""
    vision_tower: str | None = None
    """CLIP, SigLIP, SigLIP 2 or DINOv2 (hub id or folder). A bundle includes its own."""
    version: str = "v1"
    """Conversation template by LLaVA's name, or "chat_template" for the tokenizer's own."""


class ModelConfig(GeometrySettings, _ModelSources):
    """Which parts make the model, and which of them learn."""

    unfreeze_mm_vision_tower: bool = False
    """Train the tower too."""
    pretrain_mm_mlp_adapter: str | None = None
    """Projector to start from: a bundle, or LLaVA's mm_projector.bin."""
    tune_mm_mlp_adapter: bool = False
    """Train the projector only (alignment, stage 1)."""
    freeze_backbone: bool = False
    """Freeze the language model, its head included."""
    freeze_mm_mlp_adapter: bool = False
    """Freeze the projector."""
    freeze_embeddings: bool = False
    """Freeze the token embeddings (and the head where it is tied to them)."""
    attn_implementation: Literal["sdpa", "masked_sdpa", "eager"] = "sdpa"
    """Attention of the language model in training: "sdpa" computes each sample of a packed row by itself (on recent
    GPUs in bf16 with Flash Attention), "masked_sdpa" the whole row under a mask, "eager" so too, without SDPA."""

    @field_validator("attn_implementation", mode="before")
    @classmethod
    def attention_exists(cls, value: object) -> object:
        """Reject former values with what to set for them."""
        if value in ("flash_attention_2", "flex_attention"):
            raise ValueError(
                'no longer supported; set attn_implementation = "sdpa", which attends within each sample of a row and '
                "uses Flash Attention on GPUs that have it"
            )
        return value

    @model_validator(mode="after")
    def something_learns(self) -> Self:
        """Reject freezing switches that leave nothing to train or contradict each other."""
        if self.tune_mm_mlp_adapter and self.freeze_mm_mlp_adapter:
            raise ValueError("tune_mm_mlp_adapter and freeze_mm_mlp_adapter contradict each other: drop one")
        if self.tune_mm_mlp_adapter and self.unfreeze_mm_vision_tower:
            raise ValueError(
                "tune_mm_mlp_adapter (the projector only) and unfreeze_mm_vision_tower contradict each other: drop "
                "one; freeze_backbone = true learns tower and projector"
            )
        if self.freeze_backbone and self.freeze_mm_mlp_adapter and not self.unfreeze_mm_vision_tower:
            raise ValueError("freeze_backbone with freeze_mm_mlp_adapter leaves nothing to learn: drop one")
        return self

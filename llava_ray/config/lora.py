"""Settings of adapters and quantised language models, under LLaVA's names."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from llava_ray.config.schema import ConfigSection

Bits = Literal[4, 8, 16]


class Quantization(ConfigSection):
    """Quantisation by bitsandbytes of a language model whose own weights are frozen."""

    bits: Literal[4, 8]
    """Bits per weight."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type; 8 bits have one type only."""
    double_quant: bool = True
    """Whether the 4-bit blocks' scales are quantised too."""


class LoraConfig(ConfigSection):
    """A LoRA adapter, trained in place of the language model's own weights; its base may be quantised."""

    lora_enable: bool = False
    """Train a low-rank adapter (https://arxiv.org/abs/2106.09685); the language model's own weights stay frozen."""
    lora_r: PositiveInt = 64
    """Rank."""
    lora_alpha: PositiveFloat = 16
    """The adapter's output is scaled by alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Dropout before the adapter."""
    lora_bias: Literal["none", "all", "lora_only"] = "none"
    """Biases to train as well: none, all of the language model's, or those of the layers that have an adapter."""
    lora_target_modules: tuple[str, ...] | None = None
    """Linear layers with an adapter, by last or whole name; default: every one of the language model but its head.
    The projector's and the tower's only if named with their part: "projector.0", "vision_tower.encoder…"."""
    use_dora: bool = False
    """DoRA: train each row's magnitude separately from its direction (https://arxiv.org/abs/2402.09353)."""
    use_rslora: bool = False
    """rsLoRA: scale by alpha / sqrt(r) instead (https://arxiv.org/abs/2312.03732)."""
    bits: Bits = 16
    """Bits of the base's matrices: 16 leaves them as they are, 8 or 4 (QLoRA, https://arxiv.org/abs/2305.14314) need
    bitsandbytes. Projector, tower, embeddings and head are never quantised."""
    double_quant: bool = True
    """With 4 bits: quantise the blocks' scales too (double quantisation)."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """With 4 bits: the data type."""

    @property
    def quantization(self) -> Quantization | None:
        """Return the quantisation of the base, or None."""
        if self.bits == 16:
            return None
        if self.bits == 8:
            return Quantization(bits=8)
        return Quantization(bits=4, quant_type=self.quant_type, double_quant=self.double_quant)

    @field_validator("lora_target_modules")
    @classmethod
    def some_target(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """Reject an empty list, which would leave nothing to train."""
        if value is not None and not value:
            raise ValueError("an empty list leaves nothing to train: leave it out to adapt every Linear but the head")
        return value

    @model_validator(mode="after")
    def switches_have_an_adapter(self) -> Self:
        """Reject settings that would silently have no effect."""
        for key in ("use_dora", "use_rslora", "lora_target_modules"):
            if getattr(self, key) and not self.lora_enable:
                raise ValueError(f"{key} has no effect without lora_enable = true")
        return self

"""The settings of an Encoder, which travel to every task, and the encoder that each process builds of them."""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from llava_ray.config.sections import DataConfig, TrainConfig
from llava_ray.data.examples import Encoder
from llava_ray.images.tokens import ImageTokens

if TYPE_CHECKING:
    from llava_ray.model.blueprint import Blueprint


@dataclass(frozen=True)
class EncoderSettings:
    """The settings of an Encoder, small enough to send to every task, which loads only the tokenizer."""

    model_name_or_path: str
    version: str
    image_tokens: ImageTokens
    mm_use_im_start_end: bool
    mm_use_im_patch_token: bool
    model_max_length: int
    on_too_long: Any

    @classmethod
    def of(cls, blueprint: "Blueprint", data: DataConfig, train: TrainConfig) -> "EncoderSettings":
        """Build the settings from a model and a run's sections."""
        config = blueprint.config
        return cls(
            blueprint.tokenizer_source.name,
            config.version,
            blueprint.image_tokens,
            config.mm_use_im_start_end,
            config.mm_use_im_patch_token,
            train.model_max_length,
            data.on_too_long,
        )


@lru_cache(maxsize=2)
def load_encoder(settings: EncoderSettings) -> Encoder:
    """Build the encoder, once per process: the tokenizer is slow to load."""
    from llava_ray.model.formats.sources import find_source  # torch and transformers
    from llava_ray.model.formats.vocabulary import load_text_side

    source = find_source(settings.model_name_or_path, "language model", weights=False)
    tokenizer, _, template = load_text_side(
        source.folder,
        settings.version,
        start_end=settings.mm_use_im_start_end,
        patch=settings.mm_use_im_patch_token,
    )
    return Encoder(tokenizer, template, settings.image_tokens, settings.model_max_length, settings.on_too_long)

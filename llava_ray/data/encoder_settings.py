"""The settings of an Encoder, which travel to every task, and the encoder that each process builds of them."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from llava_ray.config.data import DataConfig
from llava_ray.config.sources import SourceConfig
from llava_ray.config.train import TrainConfig
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

    def for_source(self, source: SourceConfig) -> "EncoderSettings":
        """Return the settings for a source of a mixture, with its own template and length rule where it has them."""
        return replace(
            self,
            version=source.version or self.version,
            model_max_length=source.model_max_length or self.model_max_length,
            on_too_long=source.on_too_long or self.on_too_long,
        )

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


@lru_cache(maxsize=32)
def load_encoder(settings: EncoderSettings) -> Encoder:
    """Build the encoder, once per process; those of a mixture that differ only in their limits share a tokenizer."""
    tokenizer, template = _load_text(
        settings.model_name_or_path, settings.version, settings.mm_use_im_start_end, settings.mm_use_im_patch_token
    )
    return Encoder(tokenizer, template, settings.image_tokens, settings.model_max_length, settings.on_too_long)


@lru_cache(maxsize=8)
def _load_text(folder: str, version: str, start_end: bool, patch: bool) -> tuple[Any, Any]:
    """Load a tokenizer, which is slow, and the template."""
    from llava_ray.model.formats.sources import find_source  # torch and transformers
    from llava_ray.model.formats.vocabulary import load_text_side

    source = find_source(folder, "language model", weights=False)
    tokenizer, _, template = load_text_side(source.folder, version, start_end=start_end, patch=patch)
    return tokenizer, template

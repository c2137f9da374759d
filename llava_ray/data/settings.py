"""Settings of the stream's stages and of the workers at its end."""

from dataclasses import dataclass, field
from typing import TypedDict

from llava_ray.config.sections import DataConfig, ModelConfig
from llava_ray.data.encoder_settings import EncoderSettings
from llava_ray.data.row_assignment import SampleCost
from llava_ray.images.geometry import ImageSpec
from llava_ray.images.tokens import ImageTokens


class FeatureForm(TypedDict):
    """Dtype and shape (p, v) of the features in a cell of the stream."""

    bf16: bool
    num_features: int
    width: int


@dataclass(frozen=True)
class StreamSettings:
    """The settings of the stream's stages, sent to every task."""

    prepared_path: str
    shard_names: tuple[str, ...]
    encoder: EncoderSettings
    model: ModelConfig
    image_spec: ImageSpec
    image_tokens: ImageTokens
    mm_hidden_size: int
    row_length: int
    data: DataConfig
    bf16: bool
    vision_gpus: int
    vision_threads: int = 1
    """Compute threads of a tower that fills the feature cache before training."""
    cost: SampleCost = field(default_factory=SampleCost)
    """The time that a sample takes, by which rows are dealt to ranks."""
    reference: str | None = None
    """Folder of the reference's log-probabilities of each preference (see ``reference``)."""
    features: str | None = None
    """Entry of the feature cache to read instead of images (see ``feature_cache``)."""

    @property
    def feature_form(self) -> FeatureForm:
        """Return dtype and shape of the features in a cell."""
        return {"bf16": self.bf16, "num_features": self.image_tokens.num_features, "width": self.mm_hidden_size}

"""Settings of the stream's stages and of the workers at its end."""

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TypedDict

from llava_ray.config.data import DataConfig
from llava_ray.config.model import ModelConfig
from llava_ray.data.encoder_settings import EncoderSettings
from llava_ray.data.reference_file import ReferenceFiles
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
    reference: ReferenceFiles | None = None
    """The reference's log-probabilities of each preference, where the objective needs them."""
    features: str | None = None
    """Entry of the feature cache to read instead of images (see ``feature_cache``)."""
    name: str | None = None
    """Of a source of a mixture: its name, which stands before the ids of its samples."""
    sources: tuple["StreamSettings", ...] = ()
    """Of a mixture: the settings of each source, whose folder, encoder and features its samples come from."""

    def find_shard(self, shard: int) -> "ShardPlace":
        """Return whose shard one of all sources' shards is; they are numbered one source after the other."""
        if not self.sources:
            return ShardPlace(0, self, shard)
        number = bisect_right(self._first_shards, shard) - 1
        return ShardPlace(number, self.sources[number], shard - self._first_shards[number])

    @cached_property
    def _first_shards(self) -> list[int]:
        """Return the number of each source's first shard, and of the first after all."""
        return list(accumulate((len(source.shard_names) for source in self.sources), initial=0))[:-1]

    @property
    def is_cached(self) -> bool:
        """Return whether features are read from the cache instead of images."""
        return self.features is not None or any(source.features for source in self.sources)

    @property
    def feature_form(self) -> FeatureForm:
        """Return dtype and shape of the features in a cell."""
        return {"bf16": self.bf16, "num_features": self.image_tokens.num_features, "width": self.mm_hidden_size}


@dataclass(frozen=True)
class ShardPlace:
    """One shard: its source's number (0 without a mixture) and settings, and its own number in that source."""

    source: int
    settings: StreamSettings
    shard: int

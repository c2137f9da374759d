"""Settings of a run's data."""

from typing import Literal, Self

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from llava_ray.config.preference import RecordKind
from llava_ray.config.schema import ConfigSection, Fraction
from llava_ray.config.sources import SourceConfig, check_names

MAX_IMAGE_PIXELS = 178_956_970  # Pillow's own bomb limit


class DataConfig(ConfigSection):
    """The samples, and how they reach the model."""

    data_path: str = ""
    """LLaVA JSON or JSONL, Parquet, WebDataset tars, or a prepared folder; local or any fsspec URL. Required without
    data.sources."""
    sources: tuple[SourceConfig, ...] = ()
    """Instead of data_path, several sources with their shares of an epoch: [[data.sources]] tables of a recipe (keys
    below), or a JSON list of them."""
    epoch_samples: PositiveInt | None = None
    """Samples of an epoch of data.sources with weights; default: the most with which none of these is drawn more than
    once."""
    image_folder: str | None = None
    """Folder of relative image paths; default: the folder of the data."""
    kind: RecordKind = "auto"
    """What the records are: conversations to learn, or preferences (a question with a chosen and a rejected answer).
    "auto" follows train.objective."""
    cache_dir: str = "runs/cache"
    """Folder of prepared shards and token lengths, keyed by content: written once, shared by all runs."""
    image_aspect_ratio: Literal["square", "pad", "anyres"] = "square"
    """"square" is the tower's own resize and centre crop, "pad" first makes the image square, "anyres" cuts it into
    several views (model.image_grid_pinpoints, model.mm_patch_merge_type)."""
    on_too_long: Literal["truncate", "split", "reject"] = "truncate"
    """A sample over train.model_max_length is truncated (never inside an image), split at a turn, or rejected. One
    with an image that alone is longer is always rejected."""
    max_rejected: Fraction = 0.01
    """Share of rows that may be rejected before the run stops."""
    max_image_pixels: PositiveInt = MAX_IMAGE_PIXELS
    """Larger images are rejected by their header, before decoding (default: Pillow's own bomb limit)."""
    max_samples: PositiveInt | None = None
    """Use only the first so many records: for trying things out."""
    samples_per_shard: PositiveInt = 2048
    """Maximum samples in a shard."""
    shard_size_mb: PositiveInt = 64
    """Maximum MB of images in a shard."""
    shuffle_window: NonNegativeInt = 4
    """Shards whose samples are shuffled together; each shard is read once an epoch. 0 keeps the order of the file, for
    a curriculum."""
    vision_features: Literal["inline", "streamed", "cached"] = "inline"
    """Run the frozen tower in the train worker, stream its features from an actor pool, or compute them once and store
    them in data.cache_dir for every run with the same data and tower."""
    num_vision_actors: PositiveInt = 1
    """Size of that pool; each actor uses a GPU where the cluster has them."""
    feature_cache_gb: PositiveFloat = 100.0
    """Maximum GB of all cached features: more is rejected before anything is written, and the least recently
    used entries are deleted to make room."""
    num_decode_cpus: PositiveFloat = 0.5
    """CPUs that one image decoder reserves."""
    num_decoders: PositiveInt | None = None
    """Maximum decoders, started on demand. Default: as many as fit on half of the CPUs available
    for decoding when the run starts."""
    lazy_preprocess: bool | None = None
    """LLaVA's flag; not needed: nothing is preprocessed ahead."""

    @property
    def kind_of_records(self) -> Literal["instruction", "preferences"]:
        """Return what the records are; "auto" has been decided where a run's objective is known."""
        return "instruction" if self.kind == "auto" else self.kind

    @model_validator(mode="after")
    def data_are_named(self) -> Self:
        """Reject no data, and sources that contradict each other."""
        if not self.data_path and not self.sources:
            raise PydanticCustomError("missing", "Field required", {"key": "data_path"})
        if self.sources and self.data_path:
            raise ValueError("data_path and sources are both given: drop one, or make data_path a source")
        if self.sources and self.max_samples is not None:
            raise ValueError("max_samples has no effect with sources: set it in each source")
        check_names(self.sources)
        if self.epoch_samples is not None and not any(source.weight for source in self.sources):
            missing = "a source that has a weight" if self.sources else "data.sources"
            raise ValueError(f"epoch_samples has no effect without {missing}: leave it out")
        return self

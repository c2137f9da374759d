"""What `preview` can be told."""

from dataclasses import dataclass
from typing import Literal

from llava_ray.errors import ConfigError


@dataclass(frozen=True)
class PreviewSettings:
    """Show what a model will see of some conversations, before any training."""

    data: str
    """LLaVA JSON or JSONL, Parquet, WebDataset tars, or a folder that `prepare` wrote."""
    tokenizer: str | None = None
    """Folder of a tokenizer: shows ids and labels, and opens no image."""
    model: str | None = None
    """A LLaVA of any layout, or a plain language model with --vision_tower: shows images and losses too."""
    version: str | None = None
    """Conversation template; a bundle brings its own, and most published models are known."""
    image_folder: str | None = None
    """Where relative image paths start; default: beside the data."""
    image_aspect_ratio: Literal["square", "pad", "anyres"] | None = None
    """Default: the model's, otherwise "square"."""
    model_max_length: int | None = None
    """Longer samples are cut as in training; default: the model's, or nothing is cut."""
    model_base: str | None = None
    """The language model under an adapter or a projector, where the folder only names it or it has moved."""
    vision_tower: str | None = None
    """The tower of a plain language model, or of a folder that only names it."""
    max_samples: int | None = None
    """Look at the first so many records; default: 200 for the report, all with --json."""
    output: str = "runs/preview"
    """Folder of report.html."""
    json: bool = False
    """Print one JSON line per conversation, in the order of the data, instead of a report."""

    def __post_init__(self) -> None:
        """Refuse limits that leave nothing."""
        for name, value in (("max_samples", self.max_samples), ("model_max_length", self.model_max_length)):
            if value is not None and value < 1:
                raise ConfigError(f"--{name} {value}: expected at least 1; leave it out for no limit of your own")

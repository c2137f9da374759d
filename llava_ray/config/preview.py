"""Settings of a preview."""

from dataclasses import dataclass
from typing import Literal

from llava_ray.errors import ConfigError


@dataclass(frozen=True)
class PreviewSettings:
    """Show conversations as a model will see them, before any training."""

    data: str
    """LLaVA JSON or JSONL, Parquet, WebDataset tars, or a prepared folder."""
    tokenizer: str | None = None
    """Folder of a tokenizer: shows ids and labels, and opens no image."""
    model: str | None = None
    """A LLaVA of any layout, or a plain language model with --vision_tower: shows images and losses too."""
    version: str | None = None
    """Conversation template; a bundle records its own, and those of most published models are built in."""
    image_folder: str | None = None
    """Folder of relative image paths; default: the folder of the data."""
    image_aspect_ratio: Literal["square", "pad", "anyres"] | None = None
    """LLaVA's image_aspect_ratio; default: the model's, otherwise "square"."""
    model_max_length: int | None = None
    """Truncate longer samples as in training; default: the model's limit, or none."""
    model_base: str | None = None
    """The language model under an adapter or a projector, where the folder only names it or it has moved."""
    vision_tower: str | None = None
    """The tower of a plain language model, or of a folder that only names it."""
    max_samples: int | None = None
    """Preview only the first so many records; default: 200 for the report, all with --json."""
    output: str = "runs/preview"
    """Folder of report.html."""
    json: bool = False
    """Print one JSON line per conversation, in the order of the data, instead of a report."""

    def __post_init__(self) -> None:
        """Reject limits that leave nothing."""
        for name, value in (("max_samples", self.max_samples), ("model_max_length", self.model_max_length)):
            if value is not None and value < 1:
                raise ConfigError(f"--{name} {value}: expected at least 1; leave it out for no limit of your own")

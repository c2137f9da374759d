"""Settings of a preview."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llava_ray.config.data import DataConfig
from llava_ray.config.mixtures import source_data
from llava_ray.config.toml_files import read_toml_file
from llava_ray.errors import ConfigError

_RECIPE = ".toml"


@dataclass(frozen=True)
class PreviewSettings:
    """Show conversations as a model will see them, before any training."""

    data: str
    """LLaVA JSON or JSONL, Parquet, WebDataset tars, a prepared folder, or a run's recipe (.toml)."""
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
    source: str | None = None
    """The source of a recipe's mixture to preview, by name."""
    output: str = "runs/preview"
    """Folder of report.html."""
    json: bool = False
    """Print one JSON line per conversation, in the order of the data, instead of a report."""

    def __post_init__(self) -> None:
        """Reject limits that leave nothing."""
        for name, value in (("max_samples", self.max_samples), ("model_max_length", self.model_max_length)):
            if value is not None and value < 1:
                raise ConfigError(f"--{name} {value}: expected at least 1; leave it out for no limit of your own")
        if self.source is not None and not self.data.endswith(_RECIPE):
            raise ConfigError(f"--source {self.source}: only a recipe has sources; give one as --data RECIPE.toml")


def open_recipe(settings: PreviewSettings) -> PreviewSettings:
    """Return the settings with the data, template and limits of a recipe where ``data`` is one; flags win over it.

    Raises ConfigError for a recipe that cannot be read, or a mixture of which no source is named.
    """
    if not settings.data.endswith(_RECIPE):
        return settings
    recipe = read_toml_file(Path(settings.data), "recipe")
    data = DataConfig.parsed(recipe.get("data") or {}, settings.data)
    own = data
    found: dict[str, Any] = {
        key: _look_up(recipe, *key.split(".")) for key in ("model.version", "train.model_max_length")
    }
    if data.sources:
        names = [source.name for source in data.sources]
        if settings.source not in names:
            raise ConfigError(f"{settings.data} is a mixture: give --source with one of {', '.join(names)}")
        number = names.index(settings.source)
        own, source = source_data(data, number), data.sources[number]
        found = {"model.version": source.version or found["model.version"]} | {
            "train.model_max_length": source.model_max_length or found["train.model_max_length"]
        }
    elif settings.source is not None:
        raise ConfigError(f"--source {settings.source}: {settings.data} has no data.sources; leave it out")
    return replace(
        settings,
        data=own.data_path,
        source=None,
        image_folder=settings.image_folder or own.image_folder,
        version=settings.version or found["model.version"],
        model_max_length=settings.model_max_length or found["train.model_max_length"],
        max_samples=settings.max_samples or own.max_samples,
    )


def _look_up(recipe: Mapping[str, Any], section: str, key: str) -> Any:
    """Return a recipe's setting; None where it has none."""
    values = recipe.get(section)
    return values.get(key) if isinstance(values, Mapping) else None

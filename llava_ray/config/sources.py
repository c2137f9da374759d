"""One source of a mixture: a ``[[data.sources]]`` table of a recipe, or of the flag ``--data.sources``."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, StringConstraints, model_validator

from llava_ray.config.preference import RecordKind
from llava_ray.config.schema import ConfigSection
from llava_ray.errors import ConfigError
from llava_ray.reading import describe_error, short_repr

# No slash: it separates a source's name from a sample's id in the ledger, and from a metric's name.
SourceName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,47}$")]
# What a run's identity does not depend on: where a source is, and what is only looked at.
SOURCE_PATHS = ("data_path", "image_folder")
LOOKED_AT = ("held_out", "held_out_images")
_MEASURES = ("weight", "epochs", "samples")
_MAX_SOURCES = 64  # their metrics of a step are one row of a file


class SourceConfig(ConfigSection):
    """One source of a mixture (``[[data.sources]]``): exactly one of weight, epochs and samples says how much of it."""

    name: SourceName
    """Name in metrics and before the samples' ids in the ledger; unique."""
    data_path: Annotated[str, Field(min_length=1)]
    """As data.data_path."""
    image_folder: str | None = None
    """Folder of relative image paths; default: data.image_folder, otherwise the folder of the data."""
    weight: PositiveFloat | None = None
    """Share of an epoch, relative to the weights of other sources; they share what sources with epochs or samples
    leave."""
    epochs: PositiveFloat | None = None
    """Passes over the source in an epoch, also fractions."""
    samples: PositiveInt | None = None
    """Samples in an epoch, repeated if the source has fewer."""
    kind: RecordKind = "auto"
    """"instruction" or "preferences"; default: data.kind."""
    version: str | None = None
    """Conversation template; default: model.version."""
    on_too_long: Literal["truncate", "split", "reject"] | None = None
    """Default: data.on_too_long."""
    model_max_length: PositiveInt | None = None
    """Longest sample in tokens; default and maximum: train.model_max_length."""
    max_samples: PositiveInt | None = None
    """Use only the first so many records."""
    held_out: str | None = None
    """Held-out samples of this source, evaluated with held_out.num_samples and held_out.num_answers."""
    held_out_images: str | None = None
    """Folder of their relative image paths; default: image_folder."""

    @model_validator(mode="after")
    def one_measure(self) -> Self:
        """Reject no measure or several, and settings without effect."""
        given = [name for name in _MEASURES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given) or 'none'} given; expected one of {', '.join(_MEASURES)}")
        if self.held_out_images is not None and self.held_out is None:
            raise ValueError("held_out_images has no effect without held_out")
        return self


def describe_source(number: int, source: SourceConfig) -> str:
    """Return how messages name a source: its key and its name."""
    return f"data.sources.{number} ({source.name})"


def check_names(sources: Sequence[SourceConfig]) -> None:
    """Reject more sources than a run takes, and two of one name. Raises ValueError."""
    if len(sources) > _MAX_SOURCES:
        raise ValueError(f"{len(sources):,} sources; expected at most {_MAX_SOURCES:,}")
    names: dict[str, int] = {}
    for number, source in enumerate(sources):
        if source.name in names:
            raise ValueError(
                f"data.sources.{names[source.name]} and data.sources.{number} are both named {source.name!r}; "
                "give each a name of its own"
            )
        names[source.name] = number


def split_sources_flag(flags: Sequence[str]) -> tuple[list[str], list[Any] | None]:
    """Split ``--data.sources JSON`` off dotted flags; its tables are to be checked as those of a recipe are.

    Raises ConfigError.
    """
    others, sources, waiting = [], None, list(flags)
    while waiting:
        flag, equals, value = waiting.pop(0).partition("=")
        if flag != "--data.sources":
            others.append(f"{flag}{equals}{value}")
        elif not equals and not waiting:
            raise ConfigError("--data.sources needs a value: a JSON list of tables")
        else:
            sources = read_sources_flag(value if equals else waiting.pop(0))
    return others, sources


def read_sources_flag(text: str) -> list[Any]:
    """Parse the value of ``--data.sources``: a JSON list of tables. Raises ConfigError."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--data.sources {short_repr(text)} is no JSON ({describe_error(error)}); {_FORM}") from error
    if not isinstance(values, list) or not all(isinstance(value, Mapping) for value in values):
        raise ConfigError(f"--data.sources {short_repr(text)}: {_FORM}")
    return values


_FORM = """give a list of tables, such as '[{"name": "a", "data_path": "a.json", "weight": 1}]', or use a recipe"""


def write_sources_flag(sources: Sequence[SourceConfig]) -> str:
    """Return sources as JSON text that ``read_sources_flag`` reads."""
    return json.dumps([source.model_dump(mode="json", exclude_defaults=True) for source in sources])

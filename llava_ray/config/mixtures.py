"""The sources of a mixture: ``[[data.sources]]`` of a recipe, each with its share of an epoch and rules of its own."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, StringConstraints, model_validator

from llava_ray.config.preference import PAIR_OBJECTIVES, RecordKind
from llava_ray.config.schema import ConfigSection
from llava_ray.errors import ConfigError
from llava_ray.reading import describe_error, short_repr

if TYPE_CHECKING:
    from llava_ray.config.sections import DataConfig, FinetuneConfig

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


def check_sources(data: "DataConfig") -> None:
    """Reject sources that contradict each other or settings of the whole data. Raises ValueError."""
    if len(data.sources) > _MAX_SOURCES:
        raise ValueError(f"{len(data.sources):,} sources; expected at most {_MAX_SOURCES:,}")
    if data.data_path:
        raise ValueError("data_path and sources are both given: drop one, or make data_path a source")
    if data.max_samples is not None:
        raise ValueError("max_samples has no effect with sources: set it in each source")
    names: dict[str, int] = {}
    for number, source in enumerate(data.sources):
        if source.name in names:
            raise ValueError(
                f"data.sources.{names[source.name]} and data.sources.{number} are both named {source.name!r}; "
                "give each a name of its own"
            )
        names[source.name] = number
    if data.epoch_samples is not None and not any(source.weight for source in data.sources):
        raise ValueError("epoch_samples has no effect without a source that has a weight: leave it out")


def check_run_sources(config: "FinetuneConfig") -> None:
    """Reject sources that do not fit the run's rows or objective. Raises ValueError."""
    train: Any = config.train
    objective = train.objective
    kinds = []
    for number, source in enumerate(config.data.sources):
        name = describe_source(number, source)
        if (source.model_max_length or 0) > train.model_max_length:
            raise ValueError(
                f"{name}: model_max_length = {source.model_max_length} is above train.model_max_length = "
                f"{train.model_max_length}; lower the first or raise the second"
            )
        kinds.append(config.data.kind if source.kind == "auto" else source.kind)
        if kinds[-1] == "preferences" and objective not in PAIR_OBJECTIVES:
            raise ValueError(
                f"{name}: kind = 'preferences' with train.objective = {objective!r}, which learns from no pairs; "
                f"choose an objective over pairs ({', '.join(sorted(PAIR_OBJECTIVES))}), or leave the source out"
            )
    if kinds and objective in PAIR_OBJECTIVES and "preferences" not in kinds:
        raise ValueError(
            f"train.objective = {objective!r} learns from pairs, but no source has kind = 'preferences'; add one"
        )


def source_data(data: "DataConfig", number: int, **changes: Any) -> "DataConfig":
    """Return the settings of one source's data, as they would be of a run on it alone, with ``changes``."""
    source = data.sources[number]
    own = {
        "data_path": source.data_path,
        "image_folder": source.image_folder or data.image_folder,
        "kind": data.kind if source.kind == "auto" else source.kind,
        "on_too_long": source.on_too_long or data.on_too_long,
        "max_samples": source.max_samples,
        "sources": (),
        "epoch_samples": None,
    }
    return data.replaced(own | changes)


def named_places(data: "DataConfig") -> dict[str, str | None]:
    """Return the paths of all data that a run learns from or is judged by, by their dotted keys."""
    if not data.sources:
        return {"data.data_path": data.data_path, "data.image_folder": data.image_folder}
    places = {"data.image_folder": data.image_folder}
    for number, source in enumerate(data.sources):
        for key in ("data_path", "image_folder", "held_out", "held_out_images"):
            places[f"data.sources.{number}.{key}"] = getattr(source, key)
    return places


def learnt_paths(data: "DataConfig") -> dict[str, str]:
    """Return the path of each source by its dotted key: one, ``data.data_path``, where there is no mixture."""
    if not data.sources:
        return {"data.data_path": data.data_path}
    return {f"data.sources.{number}.data_path": source.data_path for number, source in enumerate(data.sources)}


def held_out_paths(data: "DataConfig") -> dict[str, str]:
    """Return the path of each source's held-out samples by its dotted key."""
    named = {f"data.sources.{number}.held_out": source.held_out for number, source in enumerate(data.sources)}
    return {key: path for key, path in named.items() if path is not None}


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

"""Recipes of sweeps: a run's sections plus ``[sweep]`` and ``[space]``; and the recipe of the best trial."""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_ray import invocation
from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.recipes import load_recipe, read_toml, settings_hash
from llava_ray.config.shipped_recipes import find_recipe, list_recipes
from llava_ray.config.space import Space, SweepConfig
from llava_ray.errors import ConfigError
from llava_ray.reading import MAX_SHOWN

_MAX_CORNERS = 10_000


def load_sweep(arguments: Sequence[str]) -> tuple[SweepConfig, Space]:
    """Load a sweep's recipe and flags; check that every corner of its space is a valid run.

    Raises ConfigError as ``load_recipe`` does.
    """
    if not arguments or arguments[0].startswith("-"):
        if "--help" in arguments:
            load_recipe(SweepConfig, arguments)
        raise ConfigError(
            f"{invocation.command('sweep')} needs a recipe with a [space]; shipped ones are "
            f"{', '.join(list_recipes('sweep'))}"
        )
    recipe = find_recipe(arguments[0], "sweep")
    arguments = [recipe, *arguments[1:]]
    space = Space.parsed({"dimensions": read_toml(recipe).get("space", {})}, recipe)
    config = load_recipe(SweepConfig, arguments, ignore=("space",))
    if config.run.name == f"{Path(recipe).stem}-{settings_hash(config)}":  # given by nobody: the space counts too
        key = settings_hash(space)
        config = config.replaced({"run.name": f"{config.run.name}-{key[:4]}"})
    _check_corners(space, recipe)
    for settings in corners(space):
        try:
            config.base.replaced(settings)
        except ConfigError as error:
            raise ConfigError(f"{recipe}: the space holds settings that are invalid for a run: {error}") from error
    return config, space


def _check_corners(space: Space, recipe: str) -> None:
    """Raise ConfigError for a space whose conditions combine to more settings than can be checked."""
    for key, dimension in space.dimensions.items():
        number = len(dimension.corners) * math.prod(len(values) for values in dimension.when.values())
        if number > _MAX_CORNERS:
            raise ConfigError(
                f"{recipe}: space.{key[:MAX_SHOWN]} has {number:,} combinations of its values and conditions, expected "
                f"at most {_MAX_CORNERS:,}; name fewer of them in when."
            )


def corners(space: Space) -> Iterator[dict[str, Any]]:
    """Yield settings that cover every corner of every dimension, with the first values of the others."""
    first = {key: dimension.corners[0] for key, dimension in space.dimensions.items()}
    for key, dimension in space.dimensions.items():
        conditions = [[(other, value) for value in values] for other, values in dimension.when.items()]
        for value, *chosen in itertools.product(dimension.corners, *conditions):
            wanted = first | dict(chosen) | {key: value}
            yield {name: wanted[name] for name, part in space.dimensions.items() if part.matters(wanted)}


def as_toml(config: FinetuneConfig, comment: str) -> str:
    """Return a recipe that reproduces ``config``, without default values."""
    lines = [f"# {line}" for line in comment.splitlines()]
    for section, values in config.model_dump(mode="json", exclude_defaults=True).items():
        # Strings, numbers, lists and booleans have the same syntax in JSON and TOML.
        lines += ["", f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"

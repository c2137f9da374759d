"""Settings sampled from a space: a grid, random draws, or Optuna's suggestions. Independent of Ray."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.schema import flat_settings
from llava_ray.config.space import Dimension, SearchConfig, Space
from llava_ray.errors import ConfigError

TrialSettings = dict[str, Any]
_SIGNIFICANT = 3  # digits of a drawn number: a sweep is not more precise


class OptunaTrial(Protocol):
    """The part of an Optuna trial that is used here."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float:
        """Suggest a number."""

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        """Suggest one of several texts."""


def list_settings(space: Space, search: SearchConfig, base: FinetuneConfig) -> list[TrialSettings]:
    """Return the distinct settings of a grid or of random draws, with the recipe's own first if configured.

    Raises ConfigError if the space has fewer distinct settings than requested.
    """
    own = [default_settings(space, base)] if search.include_default else []
    found = {settings_key(settings): settings for settings in own}
    drawn = list_grid(space) if search.method == "grid" else draw_settings(space, search.search_seed)
    wanted = math.inf if search.method == "grid" else search.num_trials
    for settings in itertools.islice(drawn, None if search.method == "grid" else 100 * search.num_trials):
        if len(found) == wanted:
            break
        found.setdefault(settings_key(settings), settings)
    if search.method == "random" and len(found) < search.num_trials:
        raise ConfigError(
            f"the space has only {len(found)} different settings, sweep.num_trials asks for {search.num_trials}: "
            "lower it, or search by method = 'grid'"
        )
    return list(found.values())


def default_settings(space: Space, base: FinetuneConfig) -> TrialSettings:
    """Return the recipe's own values along the space's dimensions."""
    own = flat_settings(base)
    return {key: own[key] for key, dimension in space.dimensions.items() if dimension.matters(own)}


def is_inside(space: Space, settings: TrialSettings) -> bool:
    """Return whether settings lie inside the space."""
    for key, value in settings.items():
        dimension = space.dimensions[key]
        if dimension.choice is not None and value not in dimension.choice:
            return False
        if dimension.bounds is not None and not dimension.bounds[0] <= value <= dimension.bounds[1]:
            return False
    return True


def settings_key(settings: TrialSettings) -> str:
    """Return a key that is equal for equal settings: 1 and 1.0, list and tuple."""
    return repr(sorted((key, float(v) if type(v) in (int, float) else _plain(v)) for key, v in settings.items()))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def list_grid(space: Space) -> Iterator[TrialSettings]:
    """Yield every combination, without dimensions whose condition is not met."""
    yield from _combined(list(space.dimensions.items()), {})


def _combined(rest: Sequence[tuple[str, Dimension]], settings: TrialSettings) -> Iterator[TrialSettings]:
    if not rest:
        yield settings
        return
    (key, dimension), *others = rest
    values = list_points(dimension) if dimension.matters(settings) else [None]
    for value in values:
        yield from _combined(others, settings | ({key: value} if dimension.matters(settings) else {}))


def list_points(dimension: Dimension) -> list[Any]:
    """Return a dimension's values in a grid."""
    if dimension.choice is not None:
        return list(dimension.choice)
    low, high = dimension.bounds or (0.0, 0.0)
    spaced = np.geomspace if dimension.log_uniform else np.linspace
    return [_rounded(value) for value in spaced(low, high, dimension.num_points).tolist()]


def draw_settings(space: Space, seed: int) -> Iterator[TrialSettings]:
    """Yield independent draws without end; deterministic for a seed."""
    generator = np.random.default_rng(seed)
    while True:
        settings: TrialSettings = {}
        for key, dimension in space.dimensions.items():
            # Always drawn, so that a condition does not shift the draws of other dimensions.
            value = _drawn_value(dimension, float(generator.random()))
            if dimension.matters(settings):
                settings[key] = value
        yield settings


def _drawn_value(dimension: Dimension, share: float) -> Any:
    """Return the value at ``share`` (0 to 1) of a dimension."""
    if dimension.choice is not None:
        return dimension.choice[int(share * len(dimension.choice))]
    low, high = dimension.bounds or (0.0, 0.0)
    if dimension.log_uniform:
        return _rounded(low * (high / low) ** share)
    return _rounded(low + share * (high - low))


@dataclass(frozen=True)
class Suggest:
    """Optuna's define-by-run function, with conditions; picklable."""

    space: Space

    def __call__(self, trial: OptunaTrial) -> TrialSettings:
        """Suggest each dimension whose condition is met."""
        settings: TrialSettings = {}
        for key, dimension in self.space.dimensions.items():
            if not dimension.matters(settings):
                continue
            if dimension.choice is not None:
                # Optuna accepts texts and numbers only; a list of layers is neither.
                names = [repr(value) for value in dimension.choice]
                settings[key] = dimension.choice[names.index(trial.suggest_categorical(key, names))]
            else:
                low, high = dimension.bounds or (0.0, 0.0)
                value = trial.suggest_float(key, low, high, log=bool(dimension.log_uniform))
                settings[key] = min(max(_rounded(value), low), high)
        return settings


def _rounded(value: float) -> float:
    """Round a number to its significant digits."""
    return float(f"{value:.{_SIGNIFICANT}g}")

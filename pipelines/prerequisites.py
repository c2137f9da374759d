"""What has to be run before a recipe: which of the shipped ones makes a model that is not there yet."""

import tomllib
from collections.abc import Mapping
from pathlib import Path

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.model import MODEL_PATHS
from llava_ray.errors import ConfigError
from llava_ray.invocation import command, recipe_argument

_RECIPES = Path(__file__).parent / "recipes"
# What is made by a command that is no recipe: the beginning of the path, and the command.
_MADE_BY = {
    "runs/cache/quickstart/words-language-model": "quickstart_sweep",
    "runs/cache/quickstart/asked": "quickstart_improve",
    "runs/cache/quickstart/held_out": "quickstart_improve",
    "runs/quickstart/early": "quickstart_improve",
    "runs/cache/quickstart": "quickstart",
    "runs/quickstart": "quickstart",
}


def missing_models(config: FinetuneConfig) -> dict[str, str]:
    """Return for each model that is not there and that a command of ours makes, by its key, that command."""
    named = {key: getattr(config.model, key.removeprefix("model.")) for key in MODEL_PATHS}
    found = {key: find_maker(path) for key, path in named.items() if path and not Path(path).exists()}
    return {key: maker for key, maker in found.items() if maker}


def check_prerequisites(config: FinetuneConfig, missing: Mapping[str, str]) -> None:
    """Raise ConfigError that says what to run first."""
    for key, maker in missing.items():
        path = getattr(config.model, key.partition(".")[2])
        raise ConfigError(f"{key} = {path!r} is not there yet: run {maker} first, which makes it")


def find_maker(path: str) -> str | None:
    """Return the command that makes a folder; None if none of ours does."""
    for start, name in _MADE_BY.items():
        if Path(path).is_relative_to(start):
            return command(name)
    for recipe in sorted(_RECIPES.glob("*/*.toml")):
        run = tomllib.loads(recipe.read_text(encoding="utf-8")).get("run", {})
        if run.get("name") and Path(path) == Path(run.get("storage_path", "runs"), run["name"], "model"):
            return command("finetune", recipe_argument(recipe.parent.name, recipe.stem))
    return None

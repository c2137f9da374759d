"""Prerequisites of recipes: the shipped recipe or command that produces a missing model."""

import tomllib
from collections.abc import Mapping
from pathlib import Path

from llava_ray.config.sections import MODEL_PATHS, FinetuneConfig
from llava_ray.errors import ConfigError

_RECIPES = Path(__file__).parent / "recipes"
# Outputs of commands that are no recipes: path prefix and command.
_MADE_BY = {
    "runs/cache/quickstart/words-language-model": "python pipelines/quickstart_sweep.py",
    "runs/cache/quickstart": "python pipelines/quickstart.py",
    "runs/quickstart": "python pipelines/quickstart.py",
}


def missing_models(config: FinetuneConfig) -> dict[str, str]:
    """Return, by key, the commands that produce a run's missing models."""
    named = {key: getattr(config.model, key.removeprefix("model.")) for key in MODEL_PATHS}
    found = {key: find_maker(path) for key, path in named.items() if path and not Path(path).exists()}
    return {key: command for key, command in found.items() if command}


def check_prerequisites(config: FinetuneConfig, missing: Mapping[str, str]) -> None:
    """Check that no model of a run has to be produced first. Raises ConfigError with the command."""
    for key, command in missing.items():
        path = getattr(config.model, key.partition(".")[2])
        raise ConfigError(f"{key} = {path!r} is not there yet: run {command} first, which makes it")


def find_maker(path: str) -> str | None:
    """Return the command that produces a folder, or None."""
    for start, command in _MADE_BY.items():
        if Path(path).is_relative_to(start):
            return command
    for recipe in sorted(_RECIPES.glob("*/*.toml")):
        run = tomllib.loads(recipe.read_text(encoding="utf-8")).get("run", {})
        if run.get("name") and Path(path) == Path(run.get("storage_path", "runs"), run["name"], "model"):
            return f"python pipelines/finetune.py pipelines/recipes/{recipe.relative_to(_RECIPES)}"
    return None

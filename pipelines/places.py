"""Checks of a command's paths, before slow imports and starts."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path

from llava_ray.config.data import DataConfig
from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.mixtures import named_places
from llava_ray.config.model import MODEL_PATHS
from llava_ray.config.space import Space
from llava_ray.errors import ConfigError
from llava_ray.reading import short_repr

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")  # owner/name, or a name alone

_HUB_URL = re.compile(rf"hf:/{{1,2}}{_HUB_ID.pattern}(@[^\s@]+)?")  # with one slash once it was a Path


def check_run_places(config: FinetuneConfig, space: Space | None = None) -> None:
    """Check that the models and data of a run or sweep exist. Raises ConfigError."""
    check_run_models(config, space)
    check_data_places(config.data)
    check_files({"held_out.path": config.held_out.path, "held_out.images": config.held_out.images})


def check_run_models(config: FinetuneConfig, space: Space | None = None) -> None:
    """Check that the models of a run or sweep exist. Raises ConfigError."""
    check_models({key: getattr(config.model, key.removeprefix("model.")) for key in MODEL_PATHS})
    for key, dimension in (space.dimensions if space else {}).items():
        if key in MODEL_PATHS:
            for value in dimension.choice or ():
                check_models({f"space.{key}": str(value) if value else None})


def check_data_places(data: DataConfig) -> None:
    """Check that the data of a run exist. Raises ConfigError."""
    check_files(named_places(data))


def check_models(named: Mapping[str, str | None]) -> None:
    """Check that a model, by its key, is a folder, a file or a possible hub id. Raises ConfigError."""
    for key, name in named.items():
        if name is None or _HUB_URL.fullmatch(name) or exists(name):
            continue
        if "://" in name or name.startswith("hf:"):
            raise ConfigError(
                f"{key} = {short_repr(name)}: models are read from folders that every node sees, or by hub id "
                "(org/name, or hf://org/name@revision); copy it to a folder and give its path"
            )
        if not _HUB_ID.fullmatch(name):
            raise ConfigError(f"{key} = {short_repr(name)}: nothing is there{_near(name)}")
        if "/" in name and exists(name.partition("/")[0]):
            raise ConfigError(f"{key} = {short_repr(name)}: nothing is there{_near(name)} (hf://{name} is on the hub)")


def check_files(named: Mapping[str, str | None]) -> None:
    """Check that a local file or folder, by its key, exists. Raises ConfigError."""
    for key, name in named.items():
        if name is not None and "://" not in name and "*" not in name and not exists(name):
            raise ConfigError(f"{key} = {short_repr(name)}: nothing is there{_near(name)}")


def check_export(model: Path, output: Path) -> None:
    """Check that the model exists and the export's folder does not. Raises ConfigError."""
    check_models({"the model": str(model)})
    if exists(str(output)) and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is there already; an export overwrites nothing. Choose another folder.")


def exists(name: str) -> bool:
    """Return whether a file or folder exists; False for invalid names."""
    try:
        return Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, the home of nobody
        return False


def _near(name: str) -> str:
    """Return a hint for a missing path: a similar name, or its existing part."""
    try:
        path = Path(name).expanduser().absolute()
        there = next(parent for parent in path.parents if parent.is_dir())
        wanted = path.relative_to(there).parts[0]
        alike = difflib.get_close_matches(wanted, [entry.name for entry in there.iterdir()], n=1)
    except (OSError, ValueError, RuntimeError):
        return "; check the spelling"
    if alike and alike[0] != wanted:
        return f"; did you mean {str(there / alike[0])!r}?"
    return f"; {str(there)!r} holds no {short_repr(wanted)}"

"""The recipes that are installed with the commands, found by name: ``finetune/llava_v1_5_7b_lora`` or its last part."""

import difflib
from pathlib import Path

from llava_ray import invocation
from llava_ray.errors import ConfigError
from llava_ray.reading import MAX_SHOWN, short_repr

_FOLDER = Path(__file__).parents[2] / "pipelines/recipes"
_TYPED_FOLDER = "pipelines/recipes/"  # how a clone's recipes are named from its root
_SUFFIX = ".toml"

_OF_A_RUN = ("finetune", "pretrain", "quickstart")
# A command → the stages whose recipes it takes; commands that are missing here take none.
_STAGES = {
    "finetune": _OF_A_RUN,
    "prepare": _OF_A_RUN,
    "evaluate": ("evaluate",),
    "review": ("review",),
    "preferences": ("preferences",),
    "improve": ("improve",),
    "sweep": ("sweep",),
}


def find_recipe(given: str, command: str) -> str:
    """Return the path of the recipe that ``given`` names to a command: a file that exists, or a shipped recipe's name.

    Raises ConfigError for a name that several recipes have, or none.
    """
    if _exists(Path(given)):
        return given
    name = given.removeprefix(_TYPED_FOLDER).removesuffix(_SUFFIX)
    names = list_recipes(command)
    found = [one for one in names if name in (one, one.partition("/")[2])]
    if len(found) == 1:
        return str(_FOLDER / f"{found[0]}{_SUFFIX}")
    if found:
        raise ConfigError(f"recipe {short_repr(given)} may be {' or '.join(found)}: name it with its stage")
    raise ConfigError(_describe_unknown(given, name, names, command))


def list_recipes(command: str) -> list[str]:
    """Return the shipped recipes that a command takes, as stage/name."""
    return [
        f"{stage}/{path.stem}" for stage in _STAGES.get(command, ()) for path in sorted(_FOLDER.glob(f"{stage}/*.toml"))
    ]


def _describe_unknown(given: str, name: str, names: list[str], command: str) -> str:
    """Say that neither a file nor a recipe is called so, and what the recipes are called."""
    by_spelling = {spelling: one for one in names for spelling in (one, one.partition("/")[2])}
    near = difflib.get_close_matches(name[:MAX_SHOWN], by_spelling, n=3)
    alike = list(dict.fromkeys(by_spelling[spelling] for spelling in near))
    hint = f"did you mean {' or '.join(alike)}? " if alike else ""
    return (
        f"no recipe {short_repr(given)}: no such file, and no shipped recipe of that name; {hint}"
        f"{invocation.command(command)} takes {', '.join(names) or 'none'}, or the path of a TOML file"
    )


def _exists(path: Path) -> bool:
    """Tell whether there is anything, also for names that nothing can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False

"""How commands are called where this process was started, so that messages name them as they can be typed there."""

import os
import re

STARTED_AS_VARIABLE = "LLAVA_RAY_STARTED_AS"  # an environment variable, because workers and actors inherit those
SCRIPT, MODULE, CONSOLE_SCRIPT = "script", "module", "console_script"

_SCRIPT_IN_TEXT = re.compile(r"python pipelines/(\w+)\.py")
_RECIPE_IN_TEXT = re.compile(r"pipelines/recipes/(\w+)/(\w+)\.toml")


def command(name: str, *words: str) -> str:
    """Return a command and the words after it: ``llava-ray export merge`` or ``python pipelines/export.py merge``.

    A process that was started otherwise, such as a notebook, is told the console script.
    """
    return " ".join([_program(name), *words])


def _program(name: str) -> str:
    """Return what starts a command."""
    form = os.environ.get(STARTED_AS_VARIABLE)
    if form == SCRIPT:
        return f"python pipelines/{name}.py"
    return f"{'python -m llava_ray' if form == MODULE else 'llava-ray'} {name.replace('_', ' ')}"


def recipe_argument(stage: str, name: str) -> str:
    """Return how a shipped recipe is named on a command line: by its path in a clone, by its name elsewhere."""
    return (
        f"pipelines/recipes/{stage}/{name}.toml" if os.environ.get(STARTED_AS_VARIABLE) == SCRIPT else f"{stage}/{name}"
    )


def as_started(text: str) -> str:
    """Return a text with the scripts and recipes that it names called as they can be typed here."""
    text = _SCRIPT_IN_TEXT.sub(lambda found: command(found[1]), text)
    return _RECIPE_IN_TEXT.sub(lambda found: recipe_argument(found[1], found[2]), text)

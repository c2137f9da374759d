"""Judges' prompts out of benchmark authors' scripts: theirs to the letter, and not copied."""

import ast
from pathlib import Path

from evals.files import read_utf8
from llava_ray.errors import DataError


def read_text_constant(folder: Path, script: str, name: str) -> str | None:
    """Return a text that a script in the folder assigns to a name, without running it; None without the script.

    Raises DataError for a script without that text.
    """
    path = next((place for place in (folder / script, folder / "eval" / script) if place.is_file()), None)
    if path is None:
        return None
    try:
        tree = ast.parse(read_utf8(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is no Python script: {error}; obtain it again, or remove it.") from error
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            named = any(isinstance(target, ast.Name) and target.id == name for target in statement.targets)
            if named and isinstance(statement.value.value, str):
                return statement.value.value
    raise DataError(f"{path} assigns no text to {name!r}, the judge's prompt; obtain it again, or remove it.")

"""The console script ``llava-ray``: finds the command that is named first and hands it the rest of the line."""

import difflib
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_ray import invocation
from llava_ray.errors import ConfigError, LlavaRayError
from llava_ray.own_packages import check_own_packages
from llava_ray.reading import short_repr

# In the order in which a newcomer needs them. The words stand here so that --help imports no command.
COMMANDS = {
    "quickstart": "Train a small real LLaVA on this machine; `quickstart sweep` and `quickstart improve` go on.",
    "prepare": "Check raw records and write them as Parquet shards, once for every run that follows.",
    "preview": "Show what a model will see of your data, before any training.",
    "finetune": "Align or tune a LLaVA by recipe; --dry-run says beforehand whether it fits.",
    "chat": "Talk with a LLaVA of any layout in the terminal.",
    "serve": "Serve models: OpenAI's API and a chat page.",
    "evaluate": "Evaluate on benchmarks, score answer files, compare two results.",
    "review": "Have answers reviewed by a judge behind an API, within a budget.",
    "preferences": "Sample answers, tell the better of two by a judge or a rule, and write preferences.",
    "improve": "Improve a model in rounds: preferences of its own answers, tuning on them, a held-out test.",
    "sweep": "Search a space of settings with many runs.",
    "export": "Inspect a model folder or bring it into another layout.",
}
_AFTER_QUICKSTART = ("sweep", "improve")  # pipelines of their own
_USAGE_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line, by default the process's own; exit with 1 and one line for what a user can fix."""
    started_as_module = Path(sys.argv[0]).name == "__main__.py"
    os.environ[invocation.STARTED_AS_VARIABLE] = invocation.MODULE if started_as_module else invocation.CONSOLE_SCRIPT
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_help())  # noqa: T201
        sys.exit(0 if given else _USAGE_ERROR)
    if given == ["--version"]:
        print(f"llava_ray {importlib.metadata.version('llava_ray')}")  # noqa: T201
        return
    try:
        name, rest = _find_command(given)
        check_own_packages()
    except LlavaRayError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    _dispatch(name, rest)


def _find_command(given: Sequence[str]) -> tuple[str, list[str]]:
    """Return the pipeline that a command line names, and its arguments. Raises ConfigError."""
    name, *rest = given
    if name == "quickstart" and rest and rest[0] in _AFTER_QUICKSTART:
        return f"quickstart_{rest[0]}", rest[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"no command {short_repr(name)}; {hint}There are {', '.join(COMMANDS)}.")
    return name, rest


def _dispatch(name: str, arguments: Sequence[str]) -> None:
    """Run a pipeline's command, imported by name: ``llava_ray`` does not depend on ``pipelines``."""
    runner = importlib.import_module("pipelines.command")
    pipeline = importlib.import_module(f"pipelines.{name}")
    run = getattr(pipeline, "main_with_exit_code", pipeline.main)  # review says how far it came
    stopped = getattr(pipeline, "WHEN_STOPPED", runner.RESUMABLE)
    runner.run_command(run, arguments, when_stopped=stopped)


def _help() -> str:
    """Return the usage and a line for each command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    program = invocation.command("").rstrip()
    return "\n".join(
        [
            f"usage: {program} [--version] COMMAND …",
            "",
            "LLaVA's visual instruction tuning, Ray-native, end to end.",
            "",
            *lines,
            "",
            f"{program} COMMAND --help lists what a command takes.",
        ]
    )

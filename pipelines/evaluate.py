#!/usr/bin/env python
"""Evaluate a LLaVA on benchmarks, score existing answers, compare two results.

python pipelines/evaluate.py run RECIPE --evaluate.model_path MODEL
python pipelines/evaluate.py run --evaluate.model_path MODEL --evaluate.benchmarks gqa=data/gqa pope=data/pope
python pipelines/evaluate.py run … --dry-run     # questions, batches, memory, time; starts nothing
python pipelines/evaluate.py score --benchmark pope --profile llava --data data/pope --answers answers.jsonl --json
python pipelines/evaluate.py compare runs/one/pope runs/two/pope
"""

from collections.abc import Callable, Sequence

import tyro

from llava_ray.config.booleans import find_boolean_parameters, strip_boolean_values
from llava_ray.invocation import as_started, command
from pipelines import evaluate_commands as commands
from pipelines.command import run_command, spaced

_TOOLS: dict[str, Callable[..., object]] = {
    "run": commands.run_with_settings,
    "score": commands.run_score,
    "compare": commands.run_compare,
}


def main(arguments: Sequence[str]) -> object:
    """Run the subcommand of the first argument: ``run`` takes a recipe, the tools plain arguments."""
    if arguments[:1] == ["run"]:
        return commands.run(arguments[1:])
    spelt = strip_boolean_values(arguments, find_boolean_parameters(*_TOOLS.values()))
    return tyro.extras.subcommand_cli_from_dict(
        _TOOLS, args=spelt, prog=command("evaluate"), description=as_started(spaced(__doc__)), use_underscores=True
    )


if __name__ == "__main__":
    run_command(main)

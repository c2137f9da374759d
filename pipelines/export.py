#!/usr/bin/env python
"""Convert a model to another layout, export a part of it, or inspect a folder.

python pipelines/export.py inspect runs/tune/model
python pipelines/export.py hub runs/tune/model exported --vocabulary padded
python pipelines/export.py hub runs/quickstart/model exported --transformers_only     # a DINOv2 tower, as it is
python pipelines/export.py make-delta runs/tune/model delta --model_base vicuna-7b-v1.5
python pipelines/export.py original llava-1.5-7b-hf llava-v1.5-7b --version v1
python pipelines/export.py gguf runs/tune/model exported --type q8_0                  # for llama.cpp
python pipelines/export.py merge runs/lora/model merged
"""

from collections.abc import Callable, Sequence

import tyro

from llava_ray.config.booleans import find_boolean_parameters, strip_boolean_values
from llava_ray.invocation import as_started, command
from pipelines import export_commands as commands
from pipelines.command import run_command, spaced

WHEN_STOPPED = "Stopped; nothing was written."
SUBCOMMANDS: dict[str, Callable[..., None]] = {
    "inspect": commands.run_inspect,
    "hub": commands.hub,
    "original": commands.original,
    "gguf": commands.gguf,
    "bundle": commands.bundle,
    "projector": commands.projector,
    "adapter": commands.adapter,
    "merge": commands.run_merge,
    "consolidate": commands.run_consolidate,
    "make-delta": commands.run_make_delta,
    "apply-delta": commands.run_apply_delta,
}


def main(arguments: Sequence[str]) -> None:
    """Run the subcommand of the first argument."""
    spelt = strip_boolean_values(arguments, find_boolean_parameters(*SUBCOMMANDS.values()))
    tyro.extras.subcommand_cli_from_dict(
        SUBCOMMANDS, args=spelt, prog=command("export"), description=as_started(spaced(__doc__)), use_underscores=True
    )


if __name__ == "__main__":
    run_command(main, when_stopped=WHEN_STOPPED)

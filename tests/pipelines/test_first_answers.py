"""Help and typing mistakes are answered at once: before anything that takes seconds to import."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SECONDS = 2.0
SLOW_IMPORTS = ("torch", "ray", "transformers", "mlflow", "deepspeed", "gradio", "openai", "peft")

# Arguments that a command answers without work: help, a misspelt flag, key, recipe or subcommand.
ANSWERED_AT_ONCE = {
    "chat": [["--help"], ["--promt", "x"], ["model", "--max_new_tokens", "0"]],
    "evaluate": [
        *[["--help"], ["scoer"], ["score", "--help"], ["compare", "--hlp"]],
        *[["run", "--help"], ["run", "nope.toml"], ["run", "--evaluate.model_pat", "x"]],
    ],
    "export": [["--help"], ["inspekt", "x"], ["hub", "--help"], ["merge", "--outputt", "x"]],
    "finetune": [
        *[["--help"], ["nope.toml"], ["{quickstart}/tune.toml", "--train.learning_rat", "1"]],
        *[["{quickstart}/tune.toml", "--help"], ["{quickstart}/tune.toml", "--train.zero_stage", "9"], []],
    ],
    "preferences": [["--help"], ["nope.toml"], ["--preferences.modls", "x"], ["faithfulness"]],
    "prepare": [["--help"], ["nope.toml"], ["--data.data_pat", "x"], []],
    "preview": [["--help"], ["--dat", "x"], ["--data", "x", "--max_samples", "0"]],
    "quickstart": [["--help"], ["--train.learning_rat", "1"]],
    "quickstart_sweep": [["--help"], ["--sweep.num_trialz", "1"]],
    "quickstart_improve": [["--help"], ["--improve.roundz", "1"]],
    "improve": [["--help"], ["nope.toml"], ["--improve.benchmrk", "x=y"], []],
    "review": [["--help"], ["nope.toml"], ["--judge.modle", "x"], ["summarize", "--help"]],
    "serve": [["--help"], [], ["modle=x"], ["--modle", "x"], ["model=x", "max_num_seqs=many"], ["nope.yaml"]],
    "sweep": [["--help"], ["nope.toml"], ["{sweep}/quickstart.toml", "--sweep.num_trialz", "1"], []],
}
RECIPES = {name: str(ROOT / "pipelines/recipes" / name) for name in ("quickstart", "sweep")}

RUN_ALL = """
import contextlib, importlib, io, json, sys
main = importlib.import_module(f"pipelines.{sys.argv[1]}").main
from llava_ray.errors import LlavaRayError
for arguments in json.loads(sys.argv[2]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main(arguments)
            raise AssertionError(f"{arguments} was not refused")
        except (SystemExit, LlavaRayError) as error:
            said.write(str(error))
    assert len(said.getvalue()) > 20, arguments
print(*sys.modules)
"""


@pytest.mark.parametrize("command", ANSWERED_AT_ONCE)
def test_help_and_mistakes_are_answered_before_anything_slow_is_imported(command, tmp_path):
    asked = [[word.format(**RECIPES) for word in words] for words in ANSWERED_AT_ONCE[command]]
    program = [sys.executable, "-c", RUN_ALL, command, json.dumps(asked)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert not set(SLOW_IMPORTS) & set(ran.stdout.split())
    # Processor time, of all the answers together: other work on the machine does not count.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < SECONDS


def test_every_command_is_among_them():
    commands = {path.stem for path in (ROOT / "pipelines").glob("*.py") if "run_command(" in path.read_text()}
    assert commands - {"command"} == set(ANSWERED_AT_ONCE)

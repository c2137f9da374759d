"""The console script: what it dispatches to, what it answers itself, and whose packages it runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_ray import command_line, invocation, own_packages
from llava_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]
SLOW_IMPORTS = ("torch", "ray", "transformers", "mlflow", "deepspeed", "gradio", "openai", "peft")

RUN_ALL = """
import contextlib, io, json, sys
from llava_ray.command_line import main
said = []
for arguments in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main(arguments)
        except SystemExit as left:
            out.write("" if isinstance(left.code, int) else str(left.code))
    said.append(out.getvalue())
print(json.dumps({"said": said, "modules": list(sys.modules)}))
"""


@pytest.fixture(autouse=True)
def started_as(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what a command line notes in the environment inside the test."""
    monkeypatch.setenv(invocation.STARTED_AS_VARIABLE, invocation.CONSOLE_SCRIPT)


def run_all(*command_lines: list[str]) -> tuple[list[str], set[str]]:
    """Return what each command line says, and all modules that a new process has imported for them."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-c", RUN_ALL, json.dumps(command_lines)]
    ran = subprocess.run(program, capture_output=True, text=True, cwd=ROOT.parent, env=environment, check=True)
    found = json.loads(ran.stdout)
    return found["said"], set(found["modules"])


def test_help_version_and_a_typo_import_nothing_that_takes_time() -> None:
    said, modules = run_all(["--help"], [], ["finetun"], ["--version"], ["--hlp"], ["quickstart_sweep"])
    assert not modules & {*SLOW_IMPORTS, "pydantic", "tyro", "numpy", "evals", "pipelines"}
    assert all(f"  {name} " in said[0] for name in command_line.COMMANDS)
    assert said[1] == said[0]
    assert "no command 'finetun'; did you mean 'finetune'? There are quickstart, prepare," in said[2]
    assert said[3].startswith("llava_ray ")
    assert "no command '--hlp'" in said[4]
    assert "did you mean 'quickstart'?" in said[5]


def test_commands_answer_help_and_mistakes_before_anything_slow_is_imported() -> None:
    lora = "llava_v1_5_7b_lora"
    said, modules = run_all(
        ["finetune", "--help"],
        ["finetune", lora, "--help"],
        ["finetune", lora, "--train.learning_rat", "1"],
        ["quickstart", "sweep", "--sweep.num_trialz", "1"],
        ["review", "summarize", "--help"],
        ["evaluate", "--help"],
        ["export", "--help"],
        ["serve", "--help"],
        ["serve", "modle=x"],
    )
    assert not modules & set(SLOW_IMPORTS)
    assert "usage: llava-ray finetune [RECIPE]" in said[0]
    assert "learning_rate" in said[1]
    assert "did you mean 'train.learning_rate'?" in said[2]
    assert "did you mean 'sweep.num_trials'?" in said[3]
    assert "usage: llava-ray review summarize" in said[4]
    assert "llava-ray evaluate score --benchmark pope" in said[5]
    assert "llava-ray export inspect runs/tune/model" in said[6]
    assert "llava-ray serve model=runs/quickstart/model" in said[7]
    assert "did you mean 'model'?" in said[8]
    assert not any("pipelines/" in text for text in said)


def test_python_m_says_so() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-m", "llava_ray", "--help"]
    ran = subprocess.run(program, capture_output=True, text=True, cwd=ROOT.parent, env=environment, check=True)
    assert ran.stdout.startswith("usage: python -m llava_ray [--version] COMMAND")


def test_every_pipeline_is_a_command() -> None:
    scripts = {path.stem for path in (ROOT / "pipelines").glob("*.py") if "    run_command(" in path.read_text()}
    assert scripts - {"quickstart_sweep", "quickstart_improve"} == set(command_line.COMMANDS)


@pytest.fixture
def other_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the front of the path, as PYTHONPATH or another environment's would be."""
    for name in ("evals", "pipelines"):
        monkeypatch.delitem(sys.modules, name, raising=False)  # find_spec asks those that are imported
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["evals", "pipelines"])
def test_a_package_of_the_same_name_is_told_by_its_file(name: str, other_folder: Path) -> None:
    own_packages.check_own_packages()
    (other_folder / name).mkdir()
    file = other_folder / name / "__init__.py"
    file.write_text("from .api import CompletionFn\n")
    with pytest.raises(ConfigError, match="two packages share the name") as caught:
        own_packages.check_own_packages()
    assert str(file) in str(caught.value)
    assert "environment of its own" in str(caught.value)
    assert ("OpenAI" in str(caught.value)) == (name == "evals")
    with pytest.raises(SystemExit, match="two packages share the name"):  # before any of it is imported
        command_line.main(["evaluate", "--help"])
    assert name not in sys.modules


def test_a_package_that_was_overwritten_in_place_or_is_gone_is_told(
    other_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("llava_ray", "evals", "pipelines"):
        (other_folder / name).mkdir()
        (other_folder / name / "__init__.py").write_text((ROOT / name / "__init__.py").read_text())
    monkeypatch.setattr("llava_ray.__file__", str(other_folder / "llava_ray/__init__.py"))
    own_packages.check_own_packages()
    (other_folder / "evals/__init__.py").write_text("from .api import CompletionFn\n")
    with pytest.raises(ConfigError, match="two packages share the name 'evals'"):
        own_packages.check_own_packages()
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ConfigError, match=r"install llava_ray again: pip install --force-reinstall"):
        own_packages.check_own_packages()

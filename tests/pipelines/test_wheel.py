"""The wheel, installed beside the dependencies and nothing of the repository: it holds commands and recipes."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from benchmark_files import write_benchmark

from evals.catalogue import make_benchmark

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SLOW_IMPORTS = {"torch", "ray", "transformers", "mlflow"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel, and the dependencies of this one."""
    folder = tmp_path_factory.mktemp("bare") / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    python = folder / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True, timeout=300)
    [site] = folder.glob("lib/python*/site-packages")
    # A path in a .pth file comes last, and what .pth files there name, such as the repository, does not come at all.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin"


def run(bare: Path, folder: Path, *words: str, code: int = 0) -> str:
    """Run the console script in a folder; return what it printed."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "LLAVA_RAY_STARTED_AS")}
    program = [str(bare / "llava-ray"), *words]
    ran = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == code, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def test_it_holds_the_commands_the_recipes_and_the_types_and_no_pictures(wheel: Path) -> None:
    assert wheel.name.startswith("llava_ray-0.2.0-")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    own = {name for name in names if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in own} == {"llava_ray", "evals", "pipelines"}
    assert {"llava_ray/py.typed", "llava_ray/report/template.html", "llava_ray/data/chunks.py"} <= own
    sources = ROOT / "pipelines"
    assert {str(path.relative_to(ROOT)) for path in sources.glob("recipes/*/*.toml")} <= own
    assert {str(path.relative_to(ROOT)) for path in sources.glob("*.py")} <= own
    assert {Path(name).suffix for name in own} <= {".py", ".toml", ".html", ".md", ".typed"}


def test_help_and_version_import_nothing_slow_and_nothing_of_the_repository(bare: Path, tmp_path: Path) -> None:
    help_text = run(bare, tmp_path, "--help")
    assert help_text.startswith("usage: llava-ray [--version] COMMAND")
    assert run(bare, tmp_path, "--version") == "llava_ray 0.2.0\n"
    code = (
        "import contextlib, json, sys\nfrom llava_ray.command_line import main\n"
        "for words in (['--help'], ['finetune', 'llava_v1_5_7b_lora', '--help']):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(sys.stderr):\n        main(words)\n"
        "print(json.dumps({name: getattr(module, '__file__', None) for name, module in sys.modules.items()}))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    program = [str(bare / "python"), "-c", code]
    ran = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    modules = json.loads(ran.stdout)
    assert not SLOW_IMPORTS & set(modules)
    ours = {name: file for name, file in modules.items() if name.split(".")[0] in ("llava_ray", "evals", "pipelines")}
    assert ours
    assert all(str(file).startswith(str(bare.parent)) for file in ours.values())


def test_answers_are_scored_a_model_is_inspected_and_a_run_is_described(bare: Path, tmp_path: Path) -> None:
    data = write_benchmark("pope", tmp_path / "pope")
    answers = tmp_path / "answers.jsonl"
    asked = make_benchmark("pope").read(data)
    answers.write_text("".join(json.dumps({"question_id": q.id, "text": q.truths[0]}) + "\n" for q in asked))
    flags = ["--benchmark", "pope", "--data", str(data), "--answers", str(answers), "--json"]
    scored = json.loads(run(bare, tmp_path, "evaluate", "score", *flags))
    assert (scored["benchmark"], scored["num_scored"], scored["missing"]) == ("pope", len(asked), 0)

    found = json.loads(run(bare, tmp_path, "export", "inspect", str(ROOT / "tests/golden/v15_mlp_pad"), "--json"))
    assert found["kind"] == "original LLaVA"

    described = run(bare, tmp_path, "finetune", "llava_v1_5_7b_lora", "--dry-run")
    assert "mlp2x_gelu" in described
    assert "First llava-ray finetune pretrain/llava_v1_5_7b, which makes runs/" in described
    assert not (tmp_path / "runs").exists()


def test_mistakes_name_the_command_that_was_typed(bare: Path, tmp_path: Path) -> None:
    said = run(bare, tmp_path, "finetune", "llava_v1_5_7b_lroa", code=1)
    assert said.startswith("ConfigError: no recipe 'llava_v1_5_7b_lroa'")
    assert "did you mean finetune/llava_v1_5_7b_lora" in said
    said = run(bare, tmp_path, "finetune", "quickstart/tune", "--dry-run", code=1)
    assert "run llava-ray quickstart first, which makes it" in said
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals/__init__.py").write_text("")
    program = [
        str(bare / "python"),
        "-m",
        "llava_ray",
        "evaluate",
        "--help",
    ]  # the folder that it starts in comes first
    ran = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False, env={"PATH": os.defpath})
    assert ran.returncode == 1
    assert f"'evals' is {tmp_path}/evals/__init__.py, which is not llava_ray's" in ran.stderr

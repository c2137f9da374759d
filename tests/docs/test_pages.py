"""The pages of the documentation: generated ones are what the code says, and every command on every page runs."""

import importlib
import importlib.util
import json
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pages import DOCS, PAGES, ROOT, Command, read_commands, write_project

COMMANDS = [command for page in PAGES for command in read_commands(page)]
PIPELINES = {path.stem for path in (ROOT / "pipelines").glob("*.py")} | {"serve"}
WITH_RECIPE = {
    "finetune": ("pretrain", "finetune", "quickstart"),
    "sweep": ("sweep",),
    "review": ("review",),
    "preferences": ("preferences",),
    "improve": ("improve",),
}


def _our_command(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return which of our commands a line starts, with its arguments."""
    if words[:1] == ("llava-ray",):
        return words[1], list(words[2:])
    script = re.fullmatch(r"pipelines/(\w+)\.py", words[1]) if words[0] == "python" and len(words) > 1 else None
    return (script[1], list(words[2:])) if script else None


def _job_of(words: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the command that a job runs."""
    return words[words.index("--") + 1 :] if words[:3] == ("ray", "job", "submit") else None


OURS = [(c, found) for c in COMMANDS if (found := _our_command(_job_of(c.words) or c.words))]
EXECUTED = {
    (c.words, "dry-run" in c.kinds): (c, *found)
    for c, found in OURS
    if found[0] not in ("serve", "quickstart") and not c.kinds & {"ray", "extension"}
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "name", "arguments"), EXECUTED.values(), ids=[str(c) for c, *_ in EXECUTED.values()]
)
def test_our_commands_run(command, name, arguments, project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    arguments = _with_recipe(name, arguments)
    if "dry-run" in command.kinds and _has_dry_run(name, arguments) and "--dry-run" not in arguments:
        arguments.append("--dry-run")
    importlib.import_module(f"pipelines.{name}").main(arguments)
    assert "".join(capsys.readouterr())


def _has_dry_run(name: str, arguments: list[str]) -> bool:
    return name in ("finetune", "sweep", "review", "preferences", "improve") or (
        name == "evaluate" and arguments[0] == "run"
    )


def _with_recipe(name: str, arguments: list[str]) -> list[str]:
    """Put a shipped recipe's path in place of its name, as the console command does."""
    position = 1 if name == "evaluate" and arguments[0] == "run" else 0
    stages = ("evaluate",) if position else WITH_RECIPE.get(name, ())
    given = arguments[position]
    if given.startswith("-") or Path(given).exists() or given == "summarize":
        return arguments
    found = [ROOT / "pipelines/recipes" / f"{path}.toml" for path in (given, *(f"{stage}/{given}" for stage in stages))]
    there = [str(path) for path in found if path.is_file()]
    assert not stages or len(there) == 1, f"{given}: {there}"
    return [*arguments[:position], *there, *arguments[position + 1 :]] if there else arguments


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_commands_that_need_ray(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    for command, (name, arguments) in OURS:
        if "ray" in command.kinds:
            importlib.import_module(f"pipelines.{name}").main(arguments)
            assert capsys.readouterr().out, str(command)


@pytest.mark.slow
def test_the_notebook_runs_from_the_first_cell_to_the_last(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    cells = json.loads((DOCS / "notebooks/first_model.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for number, source in enumerate(code):
        exec(compile(source, f"cell {number}", "exec"), names)
    assert names["result"]["num_scored"] + names["result"]["unparsed"] == 2
    assert [sample.id for sample in names["samples"]] == ["red", "blue"]
    assert all(sample.loss > 0 for sample in names["samples"])
    assert not any(cell.get("outputs") for cell in cells), "clear the outputs before you commit"


def _make(words: Sequence[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words[1:]) <= set(targets)


def _pip(words: Sequence[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[1] == "install"
    for name in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(name.split(",")) <= extras.keys()


def _paths(words: Sequence[str]) -> None:
    """Check that files of the repository that a command names are there."""
    for word in words:
        if re.match(r"(clusters|pipelines|tests|docs)/", word):
            assert (ROOT / word).exists(), word


def _python(words: Sequence[str]) -> None:
    _paths(words)
    assert words[1].endswith(".py") or words[1:3] in (("-m", "pytest"), ("-m", "venv"))


def _serve(words: Sequence[str]) -> None:
    from llava_ray import deployments
    from llava_ray.deployments.settings import ServeSettings

    _paths(words)
    if words[0] == "serve" and (words[1] == "deploy" or words[2].endswith(".yaml")):
        return
    settings = [word for word in words if "=" in word]
    ServeSettings.parsed(dict(word.split("=", 1) for word in settings))
    if words[0] == "serve":
        module, _, name = words[2].partition(":")
        assert module == "llava_ray.deployments"
        assert callable(getattr(deployments, name))


def _curl(words: Sequence[str]) -> None:
    from llava_ray.deployments.http.adapter_routes import LoadRequest, UnloadRequest
    from llava_ray.deployments.http.schema import ChatRequest

    kinds = {"load_lora_adapter": LoadRequest, "unload_lora_adapter": UnloadRequest, "completions": ChatRequest}
    kinds[words[1].rpartition("/")[2]].model_validate(json.loads(words[words.index("-d") + 1]))


def _marked(words: Sequence[str], command: Command) -> None:
    """Commands that reach a cluster or a cloud say so."""
    _paths(words)
    assert "cloud" in command.kinds or words[:3] == ("ray", "job", "submit"), str(command)


OTHERS: dict[str, Callable[..., None]] = {
    "make": _make,
    "pip": _pip,
    "python": _python,
    "python3.11": _python,
    "serve": _serve,
    "curl": _curl,
    "pytest": _paths,
    "prometheus": _paths,
    "promtool": _paths,
    "mlflow": lambda words: None,
    "source": lambda words: None,
    "export": lambda words: None,
    "pre-commit": lambda words: None,
}


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_other_commands_are_as_their_programs_take_them(command):
    words = command.words
    ours = _our_command(words)
    if ours:
        assert ours[0] in PIPELINES
        if ours[0] == "serve":
            _serve(words)
    elif words[0] in ("ray", "kubectl", "docker") or words[:2] == ("serve", "deploy"):
        _marked(words, command)
    else:
        OTHERS[words[0]](words if "extension" not in command.kinds else words[:3])  # its files come with the steps


def test_every_console_command_is_on_the_pages():
    command_line = pytest.importorskip("llava_ray.command_line")
    assert {name for _, (name, _) in OURS} - {"quickstart_sweep", "quickstart_improve"} == set(command_line.COMMANDS)


def test_there_are_commands_on_the_pages():
    assert len(COMMANDS) > 60
    assert {"README.md", "data.md", "serving.md"} <= {command.page for command in COMMANDS}


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["docs_generate"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["settings.md", "commands.md"])
def test_generated_pages_are_what_the_code_says(page, generate):
    text = generate.PAGES[page]()
    assert (DOCS / page).read_text(encoding="utf-8") == text, "run python docs/generate.py"


def test_every_page_is_in_the_navigation():
    import yaml

    found: list[str] = []

    def collect(node: object) -> None:
        if isinstance(node, str):
            found.append(node)
        elif isinstance(node, dict | list):
            for item in node.values() if isinstance(node, dict) else node:
                collect(item)

    collect(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(found) == sorted(path.name for path in DOCS.glob("*.md"))


def test_links_and_pictures_of_the_readme_are_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    places = re.findall(r"\]\(([^)#]+)", text) + re.findall(r'src="([^"]+)"', text)
    assert places
    for place in places:
        assert "://" in place or (ROOT / place).exists(), place
    assert len(text.encode()) <= 10_240

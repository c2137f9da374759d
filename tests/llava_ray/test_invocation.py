"""Messages name commands as the process was started."""

import ast
import re
from pathlib import Path

import pytest

from llava_ray import invocation
from llava_ray.invocation import as_started, command, recipe_argument

ROOT = Path(__file__).parents[2]
TEXT = "python pipelines/quickstart_sweep.py, python pipelines/finetune.py pipelines/recipes/pretrain/x_7b.toml --a"


@pytest.mark.parametrize(
    ("started_as", "export", "recipe", "text"),
    [
        ("script", "python pipelines/export.py merge", "pipelines/recipes/pretrain/x_7b.toml", TEXT),
        (
            "module",
            "python -m llava_ray export merge",
            "pretrain/x_7b",
            "python -m llava_ray quickstart sweep, python -m llava_ray finetune pretrain/x_7b --a",
        ),
        (
            "console_script",
            "llava-ray export merge",
            "pretrain/x_7b",
            "llava-ray quickstart sweep, llava-ray finetune pretrain/x_7b --a",
        ),
        (None, "llava-ray export merge", "pretrain/x_7b", None),
        ("{nonsense}", "llava-ray export merge", "pretrain/x_7b", None),
    ],
)
def test_by_how_the_process_was_started(started_as, export, recipe, text, monkeypatch):
    monkeypatch.delenv(invocation.STARTED_AS_VARIABLE, raising=False)
    if started_as is not None:
        monkeypatch.setenv(invocation.STARTED_AS_VARIABLE, started_as)
    assert command("export", "merge") == export
    assert recipe_argument("pretrain", "x_7b") == recipe
    assert text is None or as_started(TEXT) == text


def test_no_message_spells_a_script_out():
    """Texts in the code, but docstrings: scripts' own say how they are called, settings' are shown in help."""
    allowed = {"llava_ray/invocation.py", "llava_ray/log_file.py"}
    scripts = "|".join(sorted(path.stem for path in (ROOT / "pipelines").glob("*.py")))
    found = []
    for package in ("llava_ray", "evals", "pipelines"):
        for path in sorted((ROOT / package).rglob("*.py")):
            place, source = str(path.relative_to(ROOT)), path.read_text()
            if not re.search(rf"({scripts})\.py\b", source):
                continue
            tree = ast.parse(source)
            docstrings = {
                id(node.body[0].value)
                for node in ast.walk(tree)
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
                and node.body
                and isinstance(node.body[0], ast.Expr)
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                    spelt = re.search(rf"\b(?:pipelines/)?(?:{scripts})\.py\b", node.value)
                    if spelt and place not in allowed:
                        found.append(f"{place}:{node.lineno}: {spelt[0]}")
    assert not found

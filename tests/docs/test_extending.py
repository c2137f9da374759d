"""Someone who does only what extending.md says gets a projector type, a template and a benchmark that work."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import make_tokenizer
from pages import DOCS, ROOT, read_commands
from samples import write_samples

PAGE = (DOCS / "extending.md").read_text(encoding="utf-8")
# A mark, then a fenced block whose content is indented like its fence, in a list.
STEP = re.compile(
    r'^ *<!-- (insert|replace|create): (\S+)(?: (?:before )?"([^\n]*)")? -->\n( *)(`{3,})\w+\n(.*?)^\4\5$',
    re.MULTILINE | re.DOTALL,
)
COPIED = ("llava_ray", "evals", "pipelines", "tests", "docs")


def apply_steps(text: str, root: Path) -> int:
    """Carry out the steps of a part of the page; return how many there were."""
    steps = STEP.findall(text)
    for action, name, anchor, indent, _, block in steps:
        content = "".join(line.removeprefix(indent) for line in block.splitlines(keepends=True))
        path = root / name
        if action == "create":
            assert not path.exists()
            path.write_text(content, encoding="utf-8")
            continue
        before = path.read_text(encoding="utf-8")
        assert before.count(anchor) == 1, f"{name}: {anchor!r} is there {before.count(anchor)} times"
        new = content + anchor if action == "insert" else content.removesuffix("\n")
        path.write_text(before.replace(anchor, new), encoding="utf-8")
    return len(steps)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository in which the page's steps have been carried out."""
    root = tmp_path_factory.mktemp("copy") / "repository"
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__", "results", "*.png") if name != "tests" else None
        shutil.copytree(ROOT / name, root / name, ignore=ignored, symlinks=True)
    for name in ("pyproject.toml", "Makefile", "README.md"):
        shutil.copy(ROOT / name, root)
    assert apply_steps(PAGE, root) == 12
    return root


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_the_steps_of_the_page(number, repository, tmp_path_factory):
    command = [c for c in read_commands(DOCS / "extending.md") if "extension" in c.kinds][number]
    words = [sys.executable, *command.words[1:]]
    folder = repository
    if "pytest" not in words:
        folder = tmp_path_factory.mktemp("project")
        make_tokenizer(folder / "DIR")
        write_samples(folder, 12).rename(folder / "mix.json")
        words[1] = str(repository / words[1])
    variables = os.environ | {"PYTHONPATH": str(repository)}
    done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    if "pytest" in words:
        assert re.search(r"\d+ passed", done.stdout)
    else:
        assert "12 conversations, 0 rejected" in done.stderr


def test_every_section_has_three_steps():
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    assert len(sections) == 6
    for section in sections:
        assert re.findall(r"^(\d)\. ", section, re.MULTILINE) == ["1", "2", "3"], section[:40]

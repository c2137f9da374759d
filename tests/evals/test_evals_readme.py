"""What evals/README.md shows of each benchmark is there, and its example runs."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from benchmark_files import write_benchmark

from evals.catalogue import BENCHMARKS
from pipelines.evaluate import main

README = (Path(__file__).resolve().parents[2] / "evals" / "README.md").read_text(encoding="utf-8")
SECTION = re.compile(r"^## [^\n]*\(`(\w+)`\)\n\n```\n(.*?)```\n\n```bash\n(.*?)```", re.MULTILINE | re.DOTALL)
SECTIONS = {name: (tree, example) for name, tree, example in SECTION.findall(README)}


def test_every_benchmark_has_its_section() -> None:
    assert SECTIONS.keys() == BENCHMARKS.keys()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_folder_and_the_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree, example = SECTIONS[name]
    write_benchmark(name, tmp_path / "data" / name)
    root, *files = tree.splitlines()
    for file in files:
        assert (tmp_path / root.strip() / file.removesuffix("…").strip()).is_file(), file
    monkeypatch.chdir(tmp_path)
    *preparing, command = [line for line in example.replace("\\\n", " ").splitlines() if line]
    for line in preparing:
        subprocess.run(line, shell=True, check=True)
    main(command.split()[2:])
    found = json.loads(capsys.readouterr().out)
    told = [found[key] for key in ("benchmark", "num_scored", "extra", "missing")]
    assert told == [name, 1, 0, found["num_questions"] - 1]

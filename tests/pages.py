"""The pages of the documentation as tests read them: their commands, and a folder in which these run."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmark_files import WRITERS, write_benchmark
from fakes import make_language_model, make_tokenizer, make_vision_tower
from originals import copy_golden
from review_files import write_lines, write_review_files
from samples import write_samples

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# evals/README.md has a test of its own, clusters/README.md is among the pages as cluster-files.md.
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(set(DOCS.glob("*.md")) - {DOCS / "benchmark-files.md"})]

KINDS = {"run", "dry-run", "ray", "gpu", "cloud", "verify", "extension", "needs quickstart"}
_QUOTED = re.compile(r"^ *````markdown\n.*?^ *````$", re.MULTILINE | re.DOTALL)  # pages shown inside a page
_BLOCK = re.compile(r"(?:^ *<!-- test: ([^>\n]*) -->\n)?^( *)```bash\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One command of a page, with the kinds that the mark above its block names."""

    page: str
    kinds: frozenset[str]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)[:90]}"


def read_commands(page: Path) -> Iterator[Command]:
    """Yield the commands of every bash block of a page."""
    for mark, _, block in _BLOCK.findall(_QUOTED.sub("", page.read_text(encoding="utf-8"))):
        kinds = frozenset(kind.strip() for kind in mark.split(",") if kind.strip())
        assert kinds <= KINDS, f"{page.name}: {mark}"
        for words in _split(block):
            yield Command(page.name, kinds, words)


def _split(block: str) -> Iterator[tuple[str, ...]]:
    """Yield the words of each command of a block; a quotation or a backslash goes on over a line's end."""
    pending = ""
    for line in block.splitlines():
        pending += line
        if pending.rstrip().endswith("\\"):
            pending = pending.rstrip()[:-1] + " "
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # an open quotation
            pending += "\n"
            continue
        pending = ""
        if words:
            yield tuple(word for word in words if word != "&")
    assert not pending, pending


def write_project(folder: Path) -> Path:
    """Write all files that the pages name, with tiny models in place of real ones."""
    from llava_ray.config.model import ModelConfig
    from llava_ray.model.assembly import assemble
    from llava_ray.model.saving import save_bundle
    from pipelines import export

    for name in ("pipelines", "clusters", "docs"):
        (folder / name).symlink_to(ROOT / name)
    write_samples(folder, 12)
    (folder / "data.json").rename(folder / "mix.json")
    shutil.copy(folder / "images/0001.jpg", folder / "photo.jpg")
    make_tokenizer(folder / "DIR")
    (folder / "RECIPE").symlink_to(ROOT / "pipelines/recipes/finetune/llava_v1_5_7b.toml")

    cache = folder / "runs/cache/quickstart"
    base, tower = make_language_model(folder / "BASE"), make_vision_tower(folder / "tower")
    small, dino = (
        make_language_model(cache / "smollm2-135m-4l"),
        make_vision_tower(cache / "dinov2-small-8l-56px", "dinov2"),
    )
    ours = assemble(ModelConfig(model_name_or_path=str(base), vision_tower=str(tower)), "square")
    save_bundle(folder / "MODEL", ours)
    layer = {"mm_vision_select_layer": -1}
    theirs = assemble(ModelConfig(model_name_or_path=str(small), vision_tower=str(dino), **layer), "square")
    for name in ("words/model", "model"):
        save_bundle(folder / "runs/quickstart" / name, theirs)
    (cache / "words-language-model").symlink_to(small)

    golden = copy_golden("lora", folder / "golden")
    published = {"lora": "llava-v1.5-7b-lora", "base": "vicuna-7b-v1.5", "tower": "clip-vit-large-patch14-336"}
    for part, name in published.items():
        (folder / name).symlink_to(golden / part)
    export.main(["hub", str(folder / "MODEL"), str(folder / "llava-1.5-7b-hf")])

    for name in WRITERS:
        write_benchmark(name, folder / "data" / name)
    _write_answers(folder)
    return folder


def _write_answers(folder: Path) -> None:
    """Write answers, questions and reviews under the names that the pages use."""
    write_lines(folder / "answers.jsonl", [{"question_id": "random/1", "text": "Yes"}])
    write_lines(folder / "answers_llava_bench.jsonl", [{"question_id": 0, "text": "It is red.", "model_id": "ours"}])
    write_lines(folder / "answers_mm_vet.jsonl", [{"question_id": "v1_0", "text": "red", "model_id": "ours"}])
    write_lines(folder / "answers_mmhal.jsonl", [{"question_id": 0, "text": "It is red.", "model_id": "ours"}])
    write_lines(folder / "answers_objects.jsonl", [{"question_id": 9, "text": "A red dog.", "model_id": "ours"}])
    write_review_files(folder, 6, ("one", "two", "three"))
    (folder / "gpt4.jsonl").rename(folder / "answers_gpt4.jsonl")
    rule = {"role": "Assistant", "prompt": "Rate both answers with two numbers on one line."}
    kinds = ("conv", "detail", "complex")
    rules = {kind: rule for kind in ("default", *kinds, *(f"llava_bench_{kind}" for kind in kinds))}
    (folder / "rule.json").write_text(json.dumps(rules))
    rows = [{"question_id": n, "tuple": [8, 6 + n], "category": "conv"} for n in range(2)]
    write_lines(folder / "gpt4_text_theirs.jsonl", rows)

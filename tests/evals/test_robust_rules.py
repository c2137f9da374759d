"""The vectors that stand in each benchmark's docstring are what its robust rule does."""

import ast
import re

import pytest
from hallucination_files import RELATED, SYNONYMS

from evals.answers import RecordedJudge
from evals.benchmark import Benchmark, Grade, Question
from evals.benchmarks.llava_bench import LLaVABench
from evals.benchmarks.mm_vet import MMVet
from evals.benchmarks.mmhal_bench import MMHalBench
from evals.benchmarks.object_halbench import ObjectHalBench
from evals.catalogue import BENCHMARKS, make_benchmark
from evals.coco_objects import CocoImage, build_object_vocabulary
from evals.matching.amber_objects import AmberWords
from llava_ray.errors import ConfigError

LINE = re.compile(r"""^ {8}('.*'|".*") \| (?:(.*?) \| )?(.+)$""", re.MULTILINE)
OPTIONS = re.compile(r"\(options ([^)]*?)(?: where the truth is a letter|; a truth.*)?\)", re.DOTALL)
OWN = [name for name, kind in BENCHMARKS.items() if kind.__base__ is Benchmark]  # others have the rule of their base
PAIRS = ("hot dog", "tennis racket", "wine glass", "dining table", "coffee table")
VOCABULARY = build_object_vocabulary(SYNONYMS.splitlines(), PAIRS)


def vectors(kind: type[Benchmark]) -> list[tuple[str, str, str]]:
    return [(ast.literal_eval(said), truth, wanted) for said, truth, wanted in LINE.findall(kind.__doc__ or "")]


CASES = [(name, *vector) for name in OWN for vector in vectors(BENCHMARKS[name])]


def question(kind: type[Benchmark], truth: str) -> Question:
    options = OPTIONS.search(kind.__doc__ or "")
    lettered = options is not None and re.fullmatch("[A-Z]", truth) is not None
    humans = [
        word for part in truth.split(", ") for word in [part.partition("*")[0]] * int(part.partition("*")[2] or 1)
    ]
    return Question(
        "1",
        "What?",
        truths=tuple(humans) if "*" in truth else (truth,),
        options=tuple(options[1].split(", ")) if options and lettered else (),
        group="figure",
        facts={"answer_ids": list(range(len(humans))), "rule": "exact", "context": "", **object_facts(truth)},
    )


def object_facts(truth: str) -> dict[str, object]:
    """What the benchmarks of hallucinated objects know of an image, with the objects of a vector's truth in it."""
    names = set(truth.split(", "))
    words = AmberWords(RELATED, frozenset({"orange", "light"}))
    amber = {"words": words, "objects": sorted(names & RELATED.keys()), "imagined": ()}
    image = CocoImage("a.jpg", names & VOCABULARY.objects.keys())
    return {"image": image, "vocabulary": VOCABULARY, "prompt": "{question}{answer}{}{}{}{}", "contents": "", **amber}


def graded(kind: type[Benchmark], said: str, truth: str) -> Grade:
    if kind in (LLaVABench, MMVet, MMHalBench, ObjectHalBench):
        return kind().grade(question(kind, truth or "right"), "an answer", "robust", RecordedJudge({"1": said}))
    return kind().grade(question(kind, truth), said, "robust")


@pytest.mark.parametrize(("name", "said", "truth", "wanted"), CASES)
def test_robust_vectors_of_the_docstrings(name: str, said: str, truth: str, wanted: str) -> None:
    grade = graded(BENCHMARKS[name], said, truth)
    if wanted in ("unparsed", "failed"):
        assert (grade.state, grade.score) == (wanted, 0)
    elif name == "llava_bench":
        assert grade.parsed == wanted.replace(",", "")
    else:
        assert grade.state == "scored"
        assert grade.score == pytest.approx(float(wanted), abs=1e-4)


@pytest.mark.parametrize("name", OWN)
def test_every_docstring_says_how_to_obtain_the_data_and_has_ten_vectors(name: str) -> None:
    kind = BENCHMARKS[name]
    assert "Obtain: " in (kind.__doc__ or "")
    assert len(vectors(kind)) >= 10
    if name != "custom":
        assert "llava" in (kind.__doc__ or "")


def test_names_are_forgiving_and_unknown_ones_are_not() -> None:
    assert make_benchmark("MMBench-CN").name == "mmbench_cn"
    assert make_benchmark("ScienceQA").name == "science_qa"
    assert make_benchmark("MMBench-v1.1").name == "mmbench_v11"
    with pytest.raises(ConfigError, match="no benchmark 'imagenet'; expected one of vqav2, gqa"):
        make_benchmark("imagenet")

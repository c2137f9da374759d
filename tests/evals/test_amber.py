"""AMBER: the authors' counting of objects and of "no" on vectors of their rule; damaged folders are named."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmark_files import write_benchmark
from hallucination_files import RELATED

from evals.answers import Answer, read_answers
from evals.benchmark import Graded
from evals.benchmarks.amber import AMBERDiscriminative, AMBERGenerative
from evals.matching import noun_tools
from evals.matching.amber_objects import AmberWords, count_amber_objects, find_plain_nouns
from evals.matching.object_counts import ObjectCounts
from evals.scoring import score_answers, summarize_result
from llava_ray.errors import DataError

WORDS = AmberWords(RELATED, frozenset({"orange", "light"}))


def counted(nouns: str, truth: Sequence[str], imagined: Sequence[str], *same: tuple[str, str]) -> ObjectCounts:
    pairs = [*same, *((b, a) for a, b in same)]
    return count_amber_objects(
        nouns.split(), truth, imagined, WORDS, lambda noun, word: noun == word or (noun, word) in pairs
    )


def test_counts_by_the_authors_rule() -> None:
    there, imagined = ("sky", "beach", "dog"), ("person", "cat")
    # sand goes with beach, orange is safe, hat is no word of the vocabulary, cat and people are imagined.
    found = counted("dog sand orange hat cat people zebra", there, imagined)
    assert found == ObjectCounts(6, ("cat", "people", "zebra"), 2, 3, 2, 2)
    # Near words are right, and cover the object that they are near to; they are looked up among imagined ones too.
    assert counted("zebra", there, imagined, ("zebra", "dog")) == ObjectCounts(1, (), 1, 3, 0, 2)
    assert counted("zebra", there, imagined, ("zebra", "dog"), ("zebra", "cat")) == ObjectCounts(1, (), 1, 3, 1, 2)
    # "ground" goes with both and covers the first; "forest" goes with tree, and is found before the object itself.
    assert counted("ground", ("beach", "grass"), ()) == ObjectCounts(1, (), 1, 2, 0, 0)
    assert counted("tree leave", ("tree", "forest"), ()) == ObjectCounts(2, (), 2, 2, 0, 0)
    assert counted("dog dog", ("dog", "dog"), ()) == ObjectCounts(2, (), 1, 2, 0, 0)
    assert counted("", there, imagined) == ObjectCounts(0, (), 0, 3, 0, 2)


@pytest.mark.parametrize(
    ("text", "nouns"),
    [
        ("Two dogs and a cat", "dog cat"),
        ("People on the sand", "people sand"),
        ("The man can watch TV", "man TV"),
        ("Cans and a watch", "can watch"),
        ("leaves, forests", "leave forest"),
        ("The dogged zebras", "zebra"),
        ("a tree-lined beach", "tree beach"),
    ],
)
def test_nouns_of_our_own_rule(text: str, nouns: str) -> None:
    assert find_plain_nouns(text, WORDS.vocabulary) == nouns.split()


def test_figures_of_descriptions(tmp_path: Path) -> None:
    questions = AMBERGenerative().read(write_benchmark("amber_generative", tmp_path))
    said = tmp_path / "said.json"
    responses = [
        {"id": 1, "response": "A dog on the sand, and a cat."},
        {"id": 2, "response": "A man on the ground under the sky."},
    ]
    said.write_text(json.dumps(responses))
    found = summarize_result(score_answers(AMBERGenerative(), questions, read_answers(said), "robust"))
    # Mentions: dog, sand, cat | man, ground, sky: cat and sky are not there.
    assert found["figures"]["CHAIR"] == pytest.approx(100 / 3, abs=1e-3)
    assert found["score"] == pytest.approx(200 / 3, abs=1e-3)
    assert found["figures"]["Hal"] == 100
    assert found["figures"]["Cover"] == 80  # beach and dog of 3, man and grass of 2
    assert found["figures"]["Cog"] == 50  # cat of person and cat, sky of dog and sky
    assert [json.loads(row) for row in [AMBERGenerative().submit(questions, {"1": "a"})["amber_generative.json"]]] == [
        [{"id": 1, "response": "a"}, {"id": 2, "response": ""}]
    ]


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put stand-ins for NLTK and spaCy in place: a tagger of capital letters, vectors of first letters."""

    class Token(str):
        def similarity(self, other: str) -> float:
            return 0.9 if self[0] == other[0] else 0.8

    nltk = SimpleNamespace(
        word_tokenize=str.split, pos_tag=lambda words: [(word, "NNS" if word[0] != "x" else "VB") for word in words]
    )
    stem = SimpleNamespace(WordNetLemmatizer=lambda: SimpleNamespace(lemmatize=lambda word: word.removesuffix("s")))
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    monkeypatch.setitem(sys.modules, "nltk.stem", stem)
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=lambda name: Token))
    for cached in (noun_tools._parse, noun_tools._load_model, noun_tools._lemmatise):
        cached.cache_clear()


def test_the_official_rule_asks_the_authors_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question = AMBERGenerative().read(write_benchmark("amber_generative", tmp_path))[0]
    install(monkeypatch)
    grade = AMBERGenerative().grade(question, "dogs xsky television zebra bush", "official")
    # "bush" is near to "beach"; "television" is near to nothing, since 0.8 is not above 0.8.
    assert json.loads(str(grade.parsed))["hallucinated"] == ["television", "zebra"]
    assert grade.score == 0
    for cached in (noun_tools._parse, noun_tools._load_model, noun_tools._lemmatise):
        cached.cache_clear()


def test_the_official_rule_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question = AMBERGenerative().read(write_benchmark("amber_generative", tmp_path))[0]
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(
        DataError, match=r"needs nltk, which is not installed here: pip install nltk .*--profile robust"
    ):
        AMBERGenerative().grade(question, "A dog", "official")

    def lacks(text: str) -> list[str]:
        raise LookupError("Resource punkt_tab not found")

    monkeypatch.setitem(sys.modules, "nltk", SimpleNamespace(word_tokenize=lacks, pos_tag=list))
    with pytest.raises(DataError, match=r"needs NLTK's data.*nltk\.downloader punkt_tab"):
        AMBERGenerative().grade(question, "A dog", "official")

    def missing(name: str) -> None:
        raise OSError("E050")

    noun_tools._load_model.cache_clear()
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=missing))
    with pytest.raises(DataError, match=r"needs spaCy's model en_core_web_lg.*spacy download en_core_web_lg"):
        noun_tools.are_similar("dog", "puppy")


def test_no_is_the_positive_answer() -> None:
    # (truth, said): of 4 "no" truths 2 are found; of 3 "no" answers 2 are right.
    pairs = [
        ("no", "no"),
        ("no", "no"),
        ("no", "yes"),
        ("no", None),
        ("yes", "yes"),
        ("yes", "no"),
        *[("yes", "yes")] * 2,
    ]
    rows = [
        Graded(str(n), float(said == truth), said, "scored" if said else "unparsed", truth, ("existence",))
        for n, (truth, said) in enumerate(pairs)
    ]
    total = AMBERDiscriminative().add_up(rows, "official")
    figures = [total.metrics[key] for key in ("accuracy", "precision", "recall", "F1")]
    assert figures == pytest.approx([62.5, 200 / 3, 50, 400 / 7])
    assert total.headline == total.categories["existence"].value == pytest.approx(400 / 7)
    nothing = AMBERDiscriminative().add_up([Graded("1", 0, "yes", "scored", "no", ("relation",))], "official")
    assert (nothing.headline, nothing.metrics["precision"], nothing.metrics["relation recall"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("answer", "official", "robust"),
    [
        ("Yes", "yes", "yes"),
        ("No", "no", "no"),
        ("no", None, "no"),
        ("Yes.", None, "yes"),
        ("No, it is not.", None, "no"),
    ],
)
def test_only_the_bare_words_are_answers_to_the_authors(
    tmp_path: Path, answer: str, official: str | None, robust: str
) -> None:
    question = AMBERDiscriminative().read(write_benchmark("amber_discriminative", tmp_path))[0]
    assert AMBERDiscriminative().grade(question, answer, "official").parsed == official
    assert AMBERDiscriminative().grade(question, answer, "robust").parsed == robust


def test_dimensions_and_submission(tmp_path: Path) -> None:
    questions = AMBERDiscriminative().read(write_benchmark("amber_discriminative", tmp_path))
    said = {question.id: f"{question.truths[0].capitalize()}, I think." for question in questions}
    found = score_answers(AMBERDiscriminative(), questions, [Answer(*pair) for pair in said.items()], "robust")
    assert {name: one.num for name, one in found.total.categories.items()} == {
        **{"attribute": 4, "attribute state": 2, "attribute number": 1, "attribute action": 1},
        **{"existence": 1, "relation": 2},
    }
    rows = json.loads(
        AMBERDiscriminative().submit(questions, said | {"1011": "It depends."})["amber_discriminative.json"]
    )
    assert rows[:2] == [{"id": 1005, "response": "No"}, {"id": 1006, "response": "Yes"}]
    assert rows[-1] == {"id": 1011, "response": "It depends."}


def test_queries_are_found_in_any_of_the_official_files(tmp_path: Path) -> None:
    folder = write_benchmark("amber_generative", tmp_path)
    for name in ("generative", "discriminative"):
        (folder / f"data/query/query_{name}.json").unlink()
    assert (len(AMBERGenerative().read(folder)), len(AMBERDiscriminative().read(folder))) == (2, 7)
    every = json.loads((folder / "data/query/query_all.json").read_text())
    (folder / "data/query/query_all.json").unlink()
    for name, start, end in (("existence", 6, 7), ("relation", 7, 9)):
        (folder / f"data/query/query_discriminative-{name}.json").write_text(json.dumps(every[start:end]))
    assert [question.id for question in AMBERDiscriminative().read(folder / "data")] == ["1009", "1010", "1011"]


def change(folder: Path, name: str, edit: Any) -> None:
    content = json.loads((folder / "data" / name).read_text())
    edit(content)
    (folder / "data" / name).write_text(json.dumps(content))


DAMAGE: dict[str, tuple[Any, str]] = {
    "no annotations": (lambda f: (f / "data/annotations.json").unlink(), "has no annotations.json"),
    "no vocabulary": (lambda f: (f / "data/relation.json").unlink(), "has no relation.json"),
    "no safe words": (lambda f: (f / "data/safe_words.txt").unlink(), "has no safe_words.txt"),
    "a query without annotation": (
        lambda f: change(f, "annotations.json", lambda c: c.pop(1)),
        "no annotation of 1 of the 2 queries in query_generative.json: '2'",
    ),
    "a query twice": (
        lambda f: change(f, "query/query_generative.json", lambda c: c.append(c[0])),
        "query '1' occurs more than once",
    ),
    "an object without words": (
        lambda f: change(f, "relation.json", lambda c: c.pop("beach")),
        "question 1 has 'beach', which relation.json lacks",
    ),
    "nothing there": (
        lambda f: change(f, "annotations.json", lambda c: c[0].update(truth=[])),
        "question 1 has no object that is there",
    ),
    "no list of words": (
        lambda f: change(f, "annotations.json", lambda c: c[0].update(hallu="cat")),
        "question 1 has 'cat' where a list of words should be",
    ),
    "queries of the other task": (
        lambda f: change(f, "annotations.json", lambda c: c[0].update(type="relation")),
        "disagree on which queries are generative",
    ),
    "a vocabulary of another kind": (
        lambda f: change(f, "relation.json", lambda c: c.update(dog="puppy")),
        "relation.json is no object of lists of words",
    ),
    "an id that is no number": (
        lambda f: change(f, "query/query_generative.json", lambda c: c[0].update(id="a")),
        "the ids 'a' are no numbers",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_named_with_a_remedy(tmp_path: Path, name: str) -> None:
    damage, told = DAMAGE[name]
    damage(write_benchmark("amber_generative", tmp_path))
    with pytest.raises(DataError, match=told):
        AMBERGenerative().read(tmp_path)


def test_an_annotation_of_no_known_kind_is_named(tmp_path: Path) -> None:
    folder = write_benchmark("amber_discriminative", tmp_path)
    change(folder, "annotations.json", lambda c: c[2].update(truth="maybe"))
    with pytest.raises(DataError, match="question 1005 has type 'discriminative-attribute-state' and truth 'maybe'"):
        AMBERDiscriminative().read(folder)

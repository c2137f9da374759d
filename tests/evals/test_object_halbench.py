"""Object HalBench: lists of objects by the authors' rule and by ours, figures; damaged folders are named."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmark_files import write_benchmark

from evals.answers import Answer, RecordedJudge, read_answers
from evals.benchmark import Grade, Profile, Question
from evals.benchmarks.object_halbench import ObjectHalBench, object_request
from evals.comparison import StoredResult, compare_results
from evals.hallucination_replies import parse_object_list, parse_object_list_loosely
from evals.matching import noun_tools
from evals.scoring import score_answers, summarize_result
from llava_ray.errors import DataError

LONG = "An answer of many words."


@pytest.mark.parametrize(
    ("reply", "official", "robust"),
    [
        ('["dog", "cat"]', ["dog", "cat"], ["dog", "cat"]),
        ("[]", [], []),
        ('Here they are:\n["dog"]', ["dog"], ["dog"]),
        ('["dog"] is all.', None, ["dog"]),
        ('```json\n["dog"]\n```', None, ["dog"]),
        ('<think>["cat"]</think>["dog"]', None, ["dog"]),
        ('["dog"] ["dog"]', None, ["dog"]),
        ('["dog"] or ["cat"]', None, None),
        ('{"objects": ["dog"]}', None, ["dog"]),
        ("['dog']", None, None),
        ("[1, 2]", None, None),
        ('"dog"', None, None),
        ("no objects", None, None),
        ("", None, None),
    ],
)
def test_lists_of_objects(reply: str, official: list[str] | None, robust: list[str] | None) -> None:
    assert (parse_object_list(reply), parse_object_list_loosely(reply)) == (official, robust)


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    return ObjectHalBench().read(write_benchmark("object_halbench", tmp_path))


def grade(question: Question, listed: list[str], profile: Profile = "robust", answer: str = LONG) -> dict[str, Any]:
    found = ObjectHalBench().grade(question, answer, profile, RecordedJudge({question.id: json.dumps(listed)}))
    return dict(json.loads(str(found.parsed))) | {"score": found.score}


@pytest.mark.parametrize(
    ("listed", "mentioned", "wrong"),
    [
        (["dog", "frisbee"], 2, []),
        (["dogs", "dog", "the dog"], 1, []),  # one name counts once
        (["puppy", "dog"], 2, []),
        (["hot", "dog"], 1, []),  # two names are not one
        (["hot dog"], 1, ["hot dog"]),
        (["baby elephant"], 1, ["elephant"]),
        (["wooden kitchen table"], 1, ["table"]),
        (["table (wooden)"], 1, ["table"]),
        (["cat on the table"], 2, ["cat", "table"]),
        (["toilet", "seat"], 1, ["toilet"]),
        (["sky", "grass"], 0, []),
        ([], 0, []),
    ],
)
def test_names_by_our_own_rule(questions: list[Question], listed: list[str], mentioned: int, wrong: list[str]) -> None:
    found = grade(questions[0], listed)  # a dog and a frisbee are there
    assert (found["mentioned"], found["hallucinated"], found["present"]) == (mentioned, wrong, 2)
    assert found["score"] == float(not wrong)


def test_figures_leave_out_answers_that_name_no_object(questions: list[Question]) -> None:
    listed = {"9": ["dog", "cat", "frisbee"], "25": ["sky"], "30": ["person"]}
    judge = RecordedJudge({name: json.dumps(names) for name, names in listed.items()})
    answers = [Answer(name, LONG) for name in listed]
    found = summarize_result(score_answers(ObjectHalBench(), questions, answers, "robust", judge))
    assert found["score"] == 50  # of two that name objects, one is right
    assert found["figures"] == {
        "response_hallucination": 50,
        "object_hallucination": 25,
        "object_recall": 50,  # dog, frisbee of 2; none of dog, couch; person of dog, person
        "answers with objects": 2,
    }
    others = RecordedJudge({name: '["dog"]' for name in listed})
    both = [score_answers(ObjectHalBench(), questions, answers, "robust", one) for one in (judge, others)]
    compared = compare_results(*(StoredResult(summarize_result(one), one.rows) for one in both))
    assert compared["difference"] == compared["first"] - compared["second"] == -50  # as the headlines are
    failing = RecordedJudge({"9": '["dog"]', "25": "None.", "30": '["dog"]'})
    found = summarize_result(score_answers(ObjectHalBench(), questions, answers, "robust", failing))
    assert (found["score"], found["computed_score"], found["failed"]) == (None, 100, 1)
    gone = summarize_result(score_answers(ObjectHalBench(), questions, answers[:2], "robust", judge))
    assert (gone["computed_score"], gone["missing"]) == (0, 1)


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put stand-ins for NLTK and spaCy in place: words are lemmas without s; nouns are all but "a" and "wooden"."""

    def parse(text: str) -> list[Any]:
        words = text.lower().split()
        return [
            SimpleNamespace(lemma_=word.removesuffix("s"), tag_="JJ" if word in ("a", "wooden") else "NN")
            for word in words
        ]

    caches = (noun_tools._parse, noun_tools._load_model, noun_tools._lemmatise)
    stem = SimpleNamespace(WordNetLemmatizer=lambda: SimpleNamespace(lemmatize=lambda word: word.removesuffix("s")))
    nltk = SimpleNamespace(word_tokenize=lambda text: text.replace(".", " .").split())
    for name, module in (("nltk", nltk), ("nltk.stem", stem), ("spacy", SimpleNamespace(load=lambda name: parse))):
        monkeypatch.setitem(sys.modules, name, module)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize(
    ("listed", "mentioned", "wrong"),
    [
        (["dogs", "frisbee"], 2, []),
        (["wooden table"], 1, ["table"]),
        (["wooden kitchen table"], 0, []),  # "kitchen table" is no word of the vocabulary
        (["large hot dogs"], 1, ["hot dog"]),
        (["dog", "dogs"], 1, []),
    ],
)
def test_names_by_the_authors_rule(
    questions: list[Question], listed: list[str], mentioned: int, wrong: list[str]
) -> None:
    found = grade(questions[0], listed, "official")
    assert (found["mentioned"], found["hallucinated"], found["present"]) == (mentioned, wrong, 2)


@pytest.mark.usefixtures("tools")
def test_short_answers_name_nothing_to_the_authors(questions: list[Question]) -> None:
    assert grade(questions[0], ["cat"], "official", "A black cat")["mentioned"] == 0
    assert grade(questions[0], ["cat"], "robust", "A black cat")["hallucinated"] == ["cat"]
    judge = RecordedJudge({"9": "No list."})
    assert ObjectHalBench().grade(questions[0], LONG, "official", judge) == Grade(0.0, None, "failed")


def test_the_request_has_question_and_answer_once(tmp_path: Path, questions: list[Question]) -> None:
    asked = object_request(questions[0], "A {question} dog.")
    assert asked.count("Please describe the image.") == 1
    assert "A {question} dog." in asked
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/eval_gpt_obj_halbench.py").write_text('prompt_template = """Q {question} A {answer}"""\n')
    theirs = ObjectHalBench().read(tmp_path)[0]
    assert object_request(theirs, "A dog.") == "Q Please describe the image. A A dog."


def test_images_are_in_the_file_or_beside_it(tmp_path: Path, questions: list[Question]) -> None:
    assert isinstance(questions[0].images[0], bytes)
    assert questions[2].images[0] == tmp_path / "val2014/COCO_val2014_000000000030.jpg"
    submitted = ObjectHalBench().submit(questions, {"9": "A dog."})["obj_halbench_answer.jsonl"]
    (tmp_path / "said.jsonl").write_bytes(submitted)
    assert read_answers(tmp_path / "said.jsonl")[0] == Answer("9", "A dog.")


def edit_rows(folder: Path, edit: Any) -> None:
    path = folder / "data/obj_halbench_300_with_image.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    edit(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


DAMAGE: dict[str, tuple[Any, str]] = {
    "no questions": (
        lambda f: (f / "data/obj_halbench_300_with_image.jsonl").unlink(),
        "has no obj_halbench_300_with_image.jsonl",
    ),
    "no synonyms": (lambda f: (f / "data/synonyms_refine.txt").unlink(), "synonyms_refine.txt.*RLHF-V/RLHF-V"),
    "an image twice": (lambda f: edit_rows(f, lambda rows: rows.append(rows[0])), "image_id '9' occurs more than once"),
    "an unknown image": (lambda f: edit_rows(f, lambda rows: rows[0].update(image_id=7)), "for 1 of 3 questions: 7"),
    "an id that is no number": (lambda f: edit_rows(f, lambda rows: rows[0].update(image_id="x")), "'x' is no COCO id"),
    "an image that is none": (lambda f: edit_rows(f, lambda rows: rows[0].update(image="?")), "row '9' is not base64"),
    "a prompt without places": (
        lambda f: (f / "eval_gpt_obj_halbench.py").write_text("prompt_template = 'List.'"),
        "lacks {question} or {answer}",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_named_with_a_remedy(tmp_path: Path, name: str) -> None:
    damage, told = DAMAGE[name]
    damage(write_benchmark("object_halbench", tmp_path))
    with pytest.raises(DataError, match=told):
        ObjectHalBench().read(tmp_path)

"""CHAIR: the authors' words, counts and figures on vectors of their rule; damaged folders are named."""

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import write_benchmark
from hallucination_files import SYNONYMS

from evals.answers import Answer, read_answers
from evals.benchmark import Graded, Profile, Question, join_grade
from evals.benchmarks.chair import CHAIR
from evals.catalogue import make_benchmark
from evals.coco_objects import CocoImage, build_object_vocabulary
from evals.matching.object_words import split_words, to_singular
from evals.scoring import score_answers, summarize_result
from llava_ray.errors import DataError

PAIRS = ("tennis racket", "wine glass", "hot dog", "bow tie", "traffic light")
WORDS = build_object_vocabulary(SYNONYMS.splitlines(), PAIRS)


@pytest.mark.parametrize(
    ("text", "authors", "robust"),
    [
        ("A dog and two Cats.", "dog cat", "dog cat"),
        ("People with knives", "person knife", "people knife"),
        ("Two men, women and children", "man woman child", "man woman children"),
        ("A baby elephant", "elephant", "elephant"),
        ("A baby, elephants", "baby elephant", "baby elephant"),
        ("adult cats", "cat", "cat"),
        ("passenger trains", "train", "train"),
        ("A passenger. Trains", "passenger train", "passenger train"),
        ("a bow tie", "tie", "tie"),
        ("wine glasses", "wine glass", "wine glass"),
        ("two hot dogs", "hot dog", "hot dog"),
        ("a hot, dog", "dog", "dog"),
        ("The toilet has a seat", "toilet", "toilet"),
        ("a toilet seat", "toilet", "toilet"),
        ("a seat by the door", "seat", "seat"),
        ("buses", "bus", "bus"),
        ("a bus", "", "bus"),
        ("a tennis racket", "racket", "tennis racket"),
        ("tabbies and ostriches", "tabby ostrich", "tabby ostrich"),
        ("the dog's cat isn't here", "dog cat", "dog cat"),
        ("a dog-cat", "", "dog cat"),
        ("(dog) “cat” dog/cat", "dog cat", "dog cat dog cat"),
        ("dogged, catlike, doghouse", "", ""),
        ("", "", ""),
    ],
)
def test_words_of_the_authors_rule_and_of_ours(text: str, authors: str, robust: str) -> None:
    found = {
        literally: " ".join(word for word, _ in WORDS.find(text, literally=literally)) for literally in (True, False)
    }
    assert (found[True], found[False]) == (authors, robust)


@pytest.mark.parametrize(
    ("plural", "singular"),
    [
        *(
            ("dogs", "dog"),
            ("buses", "bus"),
            ("airbus", "airbu"),
            ("glass", "glas"),
            ("glasses", "glass"),
            ("ponies", "pony"),
        ),
        *(("knives", "knife"), ("gloves", "glove"), ("calves", "calf"), ("collies", "collie"), ("oxen", "ox")),
        *(("women", "woman"), ("grandchildren", "grandchild"), ("geese", "goose"), ("mice", "mouse"), ("kine", "cow")),
        *(("scissors", "scissors"), ("skis", "ski"), ("benches", "bench"), ("toothbrushes", "toothbrush"), ("s", "s")),
    ],
)
def test_singulars_are_those_of_the_authors_library(plural: str, singular: str) -> None:
    assert to_singular(plural) == singular


def test_marks_divide_words() -> None:
    assert split_words("A man's dog isn't on the--couch... yes!") == [
        *("a", "man", "'s", "dog", "is", "n't", "on", "the", ".", "couch", ".", "yes", "!"),
    ]


def rows(said: dict[int, str], profile: Profile) -> list[Graded]:
    there = {9: {"dog", "frisbee"}, 25: {"dog"}, 30: {"dog", "person"}}
    captions = {9: [], 25: ["A puppy on a sofa."], 30: []}
    found = []
    for number, text in said.items():
        facts = {"image": CocoImage("a.jpg", there[number], captions[number]), "vocabulary": WORDS}
        question = Question(str(number), "?", truths=("x",), cluster=str(number), facts=facts)
        found.append(join_grade(question, CHAIR().grade(question, text, profile)))
    return found


SAID = {9: "A dog and a cat with a frisbee, dogs.", 25: "A sofa.", 30: "A woman, a boy and their elephants and cats."}


@pytest.mark.parametrize("profile", ["llava", "official", "robust"])
def test_chairs_counts_descriptions_and_chairi_mentions(profile: Profile) -> None:
    # Mentions: dog, cat, frisbee, dog | sofa | woman, boy, elephant, cat: 9, of which cat, elephant, cat are not there.
    total = CHAIR().add_up(rows(SAID, profile), profile)
    assert total.metrics["CHAIRs"] == pytest.approx(200 / 3)
    assert total.metrics["CHAIRi"] == pytest.approx(300 / 9)
    # Named of those there: dog, frisbee | couch of dog, couch | person of dog, person.
    assert total.metrics["recall"] == pytest.approx(400 / 6)
    assert total.headline == pytest.approx(100 / 3)


def test_silence_is_no_hallucination_to_the_authors_and_no_answer_to_us() -> None:
    official, robust = (CHAIR().add_up(rows({9: " ", 25: "A dog."}, name), name) for name in ("official", "robust"))
    assert (official.headline, official.metrics["CHAIRs"], official.metrics["CHAIRi"]) == (100, 0, 0)
    assert (robust.headline, robust.metrics["CHAIRs"], robust.metrics["CHAIRi"]) == (50, 0, 0)
    assert CHAIR().add_up(rows({9: "Nothing."}, "official"), "official").metrics["CHAIRi"] is None


def test_a_missing_answer_counts_as_wrong_and_as_no_hallucination(tmp_path: Path) -> None:
    questions = CHAIR().read(write_benchmark("chair", tmp_path))
    found = summarize_result(
        score_answers(CHAIR(), questions, [Answer("9", "A dog."), Answer("25", "A cat.")], "robust")
    )
    assert (found["score"], found["missing"], found["figures"]["CHAIRs"]) == (None, 1, 50)
    assert "1 of 3 questions have no score" in found["withheld"]


def test_captions_add_objects_and_the_authors_captions_file_is_understood(tmp_path: Path) -> None:
    questions = CHAIR().read(write_benchmark("chair", tmp_path))
    assert [q.truths[0] for q in questions] == ["dog, frisbee", "couch, dog", "dog, person"]
    assert questions[0].images == (tmp_path / "val2014/COCO_val2014_000000000009.jpg",)
    file = tmp_path / "captions.json"
    said = {str(n): {"image_id": n, "caption": "A dog.", "CIDEr": 1.0} for n in (9, 25, 30)}
    file.write_text(json.dumps({"overall": {"CIDEr": 1.0}, "imgToEval": said}))
    assert score_answers(CHAIR(), questions, read_answers(file), "official").score == 100
    named = [Answer("COCO_val2014_000000000009.jpg", "A dog."), Answer("COCO_val2014_000000000025", "A dog.")]
    assert score_answers(CHAIR(), questions, named, "official").num_scored == 2


def test_image_ids_choose_the_images(tmp_path: Path) -> None:
    folder = write_benchmark("chair", tmp_path)
    (folder / "image_ids.json").write_text("[30, 9]")
    assert [question.id for question in CHAIR().read(folder)] == ["30", "9"]


def change(folder: Path, name: str, edit: Any) -> None:
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))


CAPTIONS, INSTANCES = "annotations/captions_val2014.json", "annotations/instances_val2014.json"
DAMAGE: dict[str, tuple[Any, str]] = {
    "no synonyms": (lambda f: (f / "synonyms.txt").unlink(), "synonyms.txt.*LisaAnne/Hallucination"),
    "no captions": (lambda f: (f / CAPTIONS).unlink(), "has no captions_val2014.json"),
    "no instances": (lambda f: (f / INSTANCES).unlink(), "has no instances_val2014.json"),
    "empty synonyms": (lambda f: (f / "synonyms.txt").write_text("\n"), "synonyms.txt is empty"),
    "a class without synonyms": (
        lambda f: change(f, INSTANCES, lambda c: c["categories"][1].update(name="okapi")),
        "lack COCO's 'okapi'",
    ),
    "an unknown category": (
        lambda f: change(f, INSTANCES, lambda c: c["annotations"][0].update(category_id=77)),
        "unknown category 77",
    ),
    "an image without captions": (
        lambda f: change(f, CAPTIONS, lambda c: c["annotations"].pop()),
        "no image with captions for 1 of 3 questions: 30",
    ),
    "an id that is no number": (
        lambda f: change(f, CAPTIONS, lambda c: c["images"][0].update(id="nine")),
        "the id 'nine' is no COCO id",
    ),
    "other json": (lambda f: (f / CAPTIONS).write_text("[1]"), "is this the official file"),
    "a foreign image id": (lambda f: (f / "image_ids.json").write_text("[9, 77]"), "for 1 of 2 questions: 77"),
    "an image id twice": (lambda f: (f / "image_ids.json").write_text("[9, 9]"), "'9' occurs more than once"),
    "ids that are none": (lambda f: (f / "image_ids.json").write_text('{"a": 1}'), "expected a list of COCO image ids"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_named_with_a_remedy(tmp_path: Path, name: str) -> None:
    damage, told = DAMAGE[name]
    damage(write_benchmark("chair", tmp_path))
    with pytest.raises(DataError, match=f"(?s){told}"):
        CHAIR().read(tmp_path)


@pytest.mark.parametrize("name", ["chair", "amber_generative"])
def test_our_own_rule_reads_plain_text(name: str, tmp_path: Path) -> None:
    """What a model thinks first is no description, and full-width letters are letters."""
    benchmark = make_benchmark(name)
    question = benchmark.read(write_benchmark(name, tmp_path))[0]  # a dog is there, a cat is not
    plain = benchmark.grade(question, "A dog.", "robust")
    for said in ("<think>A cat?</think>A dog.", "A ｄｏｇ.", "A d\u200bog."):
        assert benchmark.grade(question, said, "robust") == plain
    assert benchmark.grade(question, "<think>A cat", "robust").state == "unparsed"

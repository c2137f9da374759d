import sys
from collections import Counter
from pathlib import Path

import pytest

from evals.answers import Answer
from evals.benchmarks.custom import Custom
from evals.scoring import score_answers
from llava_ray.errors import DataError
from llava_ray.quickstart import easy_vqa
from llava_ray.quickstart.easy_vqa import COLOUR, SHAPE, YES_NO, Count, ShapeQuestion

PICTURE = Path("0.png")


@pytest.fixture(scope="module")
def train() -> list[ShapeQuestion]:
    return easy_vqa.read_questions("train")


@pytest.fixture(scope="module")
def test() -> list[ShapeQuestion]:
    return easy_vqa.read_questions("test")


def ask(text: str, answer: str, image: Path = PICTURE, number: int = 0) -> ShapeQuestion:
    return ShapeQuestion(f"train-{number:06d}", image, text, answer, easy_vqa.KINDS[answer])


def test_both_splits_are_read_whole(train: list[ShapeQuestion], test: list[ShapeQuestion]) -> None:
    assert (len(train), len({question.image for question in train})) == (38_575, 4_000)
    assert (len(test), len({question.image for question in test})) == (9_673, 1_000)
    assert Counter(question.kind for question in train)[YES_NO] == 28_407
    assert {question.image.parent for question in train} == {easy_vqa.image_folder("train")}
    assert train[0].image.is_file()
    assert (train[0].id, train[-1].id, test[7].id) == ("train-000000", "train-038574", "test-000007")
    assert (train[0].question, train[0].answer, train[0].kind) == ("what is the blue shape?", "rectangle", SHAPE)


@pytest.mark.parametrize(
    ("asked", "caption"),
    [
        ([("what color is the circle?", "red")], "a red circle"),
        ([("what is the blue shape?", "triangle")], "a blue triangle"),
        ([("what color is the shape?", "teal")], "a teal shape"),
        ([("what shape is present?", "circle")], "a circle"),
        ([("is there a red shape?", "yes"), ("is a circle present?", "no")], "a red shape"),
        ([("is there not a red shape?", "no"), ("is no circle present?", "no")], "a red circle"),
        ([("is no red shape present?", "yes"), ("is there not a circle?", "yes")], "a shape"),
        ([("is there a red shape?", "no")], "a shape"),
    ],
)
def test_captions_say_what_is_known_and_no_more(asked: list[tuple[str, str]], caption: str) -> None:
    assert easy_vqa.describe_scene(ask(text, answer) for text, answer in asked) == caption


def test_too_many_questions_are_refused() -> None:
    with pytest.raises(DataError, match=r"0 test questions .* expected 1 to 9673"):
        easy_vqa.test_questions(0, seed=0)
    with pytest.raises(DataError, match="no split 'val'; expected one of train, test"):
        easy_vqa.read_questions("val")


def test_the_test_sample_keeps_the_shares_of_the_kinds(test: list[ShapeQuestion]) -> None:
    sample = easy_vqa.test_questions(1_000, seed=4)
    assert Counter(question.kind for question in sample) == {YES_NO: 738, SHAPE: 130, COLOUR: 132}
    assert len({question.id for question in sample}) == 1_000
    assert set(sample) <= set(test)
    assert sample == easy_vqa.test_questions(1_000, seed=4) != easy_vqa.test_questions(1_000, seed=5)
    few = easy_vqa.test_questions(3, seed=0)  # 2.2, 0.39 and 0.40 of them
    assert Counter(question.kind for question in few) == {YES_NO: 2, COLOUR: 1}


def test_train_questions_have_as_many_of_colours_as_of_shapes() -> None:
    drawn = easy_vqa.train_questions(400, seed=1)
    kinds = [question.kind for question in drawn]
    assert [kinds.count(kind) for kind in ("yes/no", "shape", "colour")] == [200, 100, 100]
    assert len({question.id for question in drawn}) == 400
    assert drawn == easy_vqa.train_questions(400, seed=1) != easy_vqa.train_questions(400, seed=2)


def test_answers_are_right_but_for_case_space_and_one_period() -> None:
    asked = [ask("what color is the shape?", "red", number=number) for number in range(6)]
    asked.append(ask("is there a circle?", "yes", number=6))
    said = ["red", " Red.\n", "red..", "reddish", "blue"]
    score = easy_vqa.score_shape_answers(
        dict(zip((question.id for question in asked), said, strict=False)) | {"other": "red"}, asked
    )
    assert score.total == Count(2, 7)
    assert score.by_kind == {COLOUR: Count(2, 6), YES_NO: Count(0, 1)}
    assert score.missing == ("train-000005", "train-000006")
    assert score.total.accuracy == 2 / 7
    with pytest.raises(DataError, match="no questions to score"):
        easy_vqa.score_shape_answers({}, [])


def test_guessing_by_the_wording_alone_gets_two_thirds(test: list[ShapeQuestion]) -> None:
    blind = easy_vqa.blind_answers()
    assert len(blind) == 107
    assert (blind["is there a red shape?"], blind["is there not a red shape?"]) == ("no", "yes")
    score = easy_vqa.score_shape_answers({question.id: blind[question.question] for question in test}, test)
    assert score.total == Count(6_475, 9_673)
    assert score.by_kind[YES_NO] == Count(5_890, 7_136)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(DataError, match=r"easy-vqa cannot be imported .*llava_ray\[quickstart\]"):
        easy_vqa.read_questions("train")


def test_the_summary_sets_the_model_beside_the_blind_guess() -> None:
    conversations = easy_vqa.test_conversations(100, seed=0)
    asked = [question for conversation in conversations for question in conversation]
    right = {question.id: question.answer for question in asked}
    missed, wrong = [some[1] for some in conversations[:30]], [some[2] for some in conversations[:10]]
    said = {name: text for name, text in right.items() if name not in {q.id for q in missed}}
    summary = easy_vqa.compute_accuracies(conversations, said | {question.id: "maybe" for question in wrong})
    assert summary["held_out_accuracy"] == 260 / 300
    assert summary["num_test_questions"] == 300
    assert summary["missing_answers"] == 30
    assert 0.5 < summary["blind_accuracy"] < 0.8
    assert sum(kind["num_questions"] for kind in summary["by_kind"].values()) == 300
    places = summary["by_position"]
    assert {name: (part["model"], part["num_questions"]) for name, part in places.items()} == {
        "first": (1.0, 100),
        "second": (0.7, 100),
        "third": (0.9, 100),
    }
    blind = sum(part["blind"] for part in places.values()) / 3
    assert blind == pytest.approx(summary["blind_accuracy"])


def test_test_conversations_ask_three_different_questions_about_an_image_of_their_own() -> None:
    conversations = easy_vqa.test_conversations(400, seed=0)
    assert {len({question.id for question in some}) for some in conversations} == {3}
    assert all(len({question.image for question in some}) == 1 for some in conversations)
    assert len({some[0].image for some in conversations}) == 400
    for position in range(3):  # each kind with about its share of the whole, whatever came before
        kinds = Counter(some[position].kind for some in conversations)
        assert 0.65 < kinds[YES_NO] / 400 < 0.82
        assert min(kinds[SHAPE], kinds[COLOUR]) > 30
    assert conversations == easy_vqa.test_conversations(400, seed=0) != easy_vqa.test_conversations(400, seed=1)
    with pytest.raises(DataError, match=r"1001 test conversations .* expected 1 to 997"):
        easy_vqa.test_conversations(1001, seed=0)


def test_as_a_benchmark_of_your_own_it_scores_the_same_to_the_question(tmp_path: Path) -> None:
    asked = easy_vqa.test_questions(300, seed=1)
    forms = ("{}", " {}.\n", "{}..", "{} ", "not {}", "{}.", "")
    said = {q.id: forms[n % 7].format(q.answer.upper() if n % 2 else q.answer) for n, q in enumerate(asked) if n % 50}
    benchmark = Custom()
    questions = benchmark.read(easy_vqa.write_benchmark(tmp_path, asked))
    result = score_answers(benchmark, questions, [Answer(name, text) for name, text in said.items()], "robust")
    own = easy_vqa.score_shape_answers(said, asked)
    assert result.total.headline == pytest.approx(100 * own.total.accuracy)
    for kind, count in own.by_kind.items():
        assert result.total.categories[kind].value == pytest.approx(100 * count.accuracy)
    assert sum(row.score for row in result.rows) == own.total.num_correct
    assert result.joined.missing == own.missing
    assert questions[0].images == (asked[0].image,)

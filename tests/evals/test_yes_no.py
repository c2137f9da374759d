"""Yes and no: POPE's and MME's readings and figures on the reference vectors."""

import pytest

from evals.benchmark import Graded, Question, join_grade
from evals.benchmarks.gqa import GQA
from evals.benchmarks.hallusion_bench import HallusionBench, grade_verdict
from evals.benchmarks.mme import MME
from evals.benchmarks.pope import POPE
from evals.matching.yes_no import parse_mme, parse_pope, parse_yes_no


@pytest.mark.parametrize(
    ("text", "pope", "robust"),
    [
        ("NO", "yes", "no"),
        ("no\n", "yes", "no"),
        ("None", "yes", None),
        ("Not sure", "yes", None),
        ("It is not. Yes", "no", None),
        ("Yes. no", "yes", None),
        ("There is nothing", "yes", None),
        ("No, there is none", "no", "no"),
        ("Yes", "yes", "yes"),
        ("Yes, there is no doubt", "no", "yes"),
        ("yes and no", "no", None),
        ("I have no idea", "no", None),
        ("", "yes", None),
    ],
)
def test_pope_reads_yes_where_we_read_nothing(text: str, pope: str, robust: str | None) -> None:
    assert (parse_pope(text), parse_yes_no(text)) == (pope, robust)


def pope_rows(said: str, gold: str) -> list[Graded]:
    names = {"y": "yes", "n": "no"}
    questions = [Question(str(i), "?", truths=(names[g],), categories=("random",)) for i, g in enumerate(gold)]
    return [join_grade(q, POPE().grade(q, names[s], "llava")) for q, s in zip(questions, said, strict=True)]


def test_pope_1() -> None:
    total = POPE().add_up(pope_rows("yyynnnnn", "yynynnnn"), "llava")
    assert total.headline == pytest.approx(66.6667, abs=1e-3)
    found = [total.metrics[key] for key in ("accuracy", "precision", "recall", "f1", "yes_ratio")]
    assert found == pytest.approx([75, 66.6667, 66.6667, 66.6667, 37.5], abs=1e-3)


def test_pope_3_without_any_yes_is_zero_and_no_crash() -> None:
    total = POPE().add_up(pope_rows("nnnn", "yynn"), "robust")
    found = [total.metrics[key] for key in ("accuracy", "precision", "recall", "f1", "yes_ratio")]
    assert found == [50, 0, 0, 0, 0]
    assert total.headline == 0


def test_pope_6_the_headline_is_the_mean_of_the_splits() -> None:
    rows = []
    # Precision and recall that give the three F1 scores of the reference, by counts.
    for split, (hits, false, lost) in {"a": (3, 1, 1), "b": (1, 1, 1), "c": (4, 0, 0)}.items():
        rows += [Graded(f"{split}{i}", 1, "yes", "scored", "yes", (split,)) for i in range(hits)]
        rows += [Graded(f"{split}f{i}", 0, "yes", "scored", "no", (split,)) for i in range(false)]
        rows += [Graded(f"{split}l{i}", 0, "no", "scored", "yes", (split,)) for i in range(lost)]
    assert POPE().add_up(rows, "llava").headline == pytest.approx((75 + 50 + 100) / 3)
    assert pytest.approx(0.8598833, abs=1e-7) == (0.8717760 + 0.8628738 + 0.8450000) / 3


@pytest.mark.parametrize(
    ("text", "mme"),
    [
        ("Not really", "no"),
        ("know", "no"),
        ("Nope", "no"),
        ("eyes", "yes"),
        ("The answer is yes", None),
        ("y", "yes"),
        ("N", "no"),
        ("Yes.", "yes"),
        ("", None),
    ],
)
def test_mme_reads_four_characters(text: str, mme: str | None) -> None:
    assert parse_mme(text) == mme


def mme_rows(ability: str, images: list[list[int]]) -> list[Graded]:
    return [
        Graded(f"{ability}/{i}/{k}", right, "yes", "scored", "yes", (ability,), f"{ability}/{i}", f"{ability}/{i}")
        for i, scores in enumerate(images)
        for k, right in enumerate(scores)
    ]


def test_mme_1_to_3() -> None:
    existence = mme_rows("existence", [[1, 1], [1, 0]])
    assert MME().add_up(existence, "llava").headline == 125
    assert MME().add_up([*existence, *mme_rows("count", [[1, 0]])], "llava").headline == 175
    assert MME().add_up([*existence, *mme_rows("count", [[0, 0]])], "llava").headline == 125
    both = MME().add_up([*existence, *mme_rows("code_reasoning", [[1, 1]])], "llava")
    assert both.metrics == {"perception": 125, "cognition": 200}


@pytest.mark.parametrize(
    ("text", "truth", "llava", "robust"),
    [
        ("Yes.", "yes", 1, 1),
        ("t-shirt", "tshirt", 0, 0),
        ("t shirt", "t-shirt", 0, 0),
        (" yes", "yes", 0, 1),
        ("Left", "left", 1, 1),
        ("the left", "left", 0, 0),
        ("Two", "2", 0, 0),
    ],
)
def test_gqa(text: str, truth: str, llava: int, robust: int) -> None:
    question = Question("1", "?", truths=(truth,))
    assert GQA().grade(question, text, "llava").score == llava
    assert GQA().grade(question, text, "robust").score == robust
    assert GQA().grade(question, text, "official").score == float(text == truth)


def test_hb_1() -> None:
    # (category, set, figure, question): 1 correct, 0 incorrect, 2 unclear
    checks = {("VD", 0, 0, 0): 1, ("VD", 0, 1, 0): 1, ("VD", 0, 1, 1): 0, ("VD", 0, 0, 1): 1}
    checks |= {("VS", 1, 0, 0): 2, ("VS", 1, 1, 0): 1, ("VS", 1, 1, 1): 2}
    words = ("incorrect", "correct", "unclear")
    rows = []
    for (category, set_id, figure, number), check in checks.items():
        alone = category == "VS" and figure == 0
        question = Question(
            f"{category}_x_{set_id}_{figure}_{number}",
            "?",
            truths=("yes",),
            cluster=f"{category}_x_{set_id}",
            group="no figure" if alone else "figure",
        )
        rows.append(join_grade(question, grade_verdict(words[check], no_figure=alone)))
    total = HallusionBench().add_up(rows, "official")
    assert total.headline == pytest.approx(71.43, abs=0.01)
    assert total.metrics["fAcc"] == pytest.approx(33.33, abs=0.01)
    assert total.metrics["qAcc"] == pytest.approx(50)

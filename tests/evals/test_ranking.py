import pytest

from evals.benchmark import LETTER, Question
from evals.ranking import LogLikelihood, best_letter, candidates, shown_to_rank
from llava_ray.errors import DataError

QUESTION = Question("1", "Which?", truths=("B",), options=("a cat", "a very long dog"))


def test_letters_or_texts_are_ranked() -> None:
    assert candidates(QUESTION, "letter") == ("A", "B")
    assert candidates(QUESTION, "text") == QUESTION.options
    with pytest.raises(DataError, match="has no options to rank"):
        candidates(Question("1", "?"), "text")


def test_texts_are_not_asked_for_with_a_letter() -> None:
    question = Question("1", f"Which?\nA. a cat{LETTER}", options=("a cat",))
    assert shown_to_rank(question, "text") == "Which?\nA. a cat"
    assert shown_to_rank(question, "letter") == question.prompt


def test_length_is_no_advantage_and_equals_go_to_the_first() -> None:
    assert best_letter(QUESTION, [LogLikelihood(-4, 2), LogLikelihood(-6, 4)]) == "B"
    assert best_letter(QUESTION, [LogLikelihood(-2, 1), LogLikelihood(-4, 2)]) == "A"
    with pytest.raises(DataError, match="1 likelihoods for 2 options"):
        best_letter(QUESTION, [LogLikelihood(-1, 1)])

import pytest

from evals.benchmark import LETTER, Question
from evals.ranking import LogLikelihood, find_best_letter, list_candidates, ranking_prompt
from llava_ray.errors import DataError

QUESTION = Question("1", "Which?", truths=("B",), options=("a cat", "a very long dog"))


def test_letters_or_texts_are_ranked() -> None:
    assert list_candidates(QUESTION, "letter") == ("A", "B")
    assert list_candidates(QUESTION, "text") == QUESTION.options
    with pytest.raises(DataError, match="has no options to rank"):
        list_candidates(Question("1", "?"), "text")


def test_texts_are_not_asked_for_with_a_letter() -> None:
    question = Question("1", f"Which?\nA. a cat{LETTER}", options=("a cat",))
    assert ranking_prompt(question, "text") == "Which?\nA. a cat"
    assert ranking_prompt(question, "letter") == question.prompt


def test_length_is_no_advantage_and_equals_go_to_the_first() -> None:
    assert find_best_letter(QUESTION, [LogLikelihood(-4, 2), LogLikelihood(-6, 4)]) == "B"
    assert find_best_letter(QUESTION, [LogLikelihood(-2, 1), LogLikelihood(-4, 2)]) == "A"
    with pytest.raises(DataError, match="1 likelihoods for 2 options"):
        find_best_letter(QUESTION, [LogLikelihood(-1, 1)])

"""A part of a benchmark does not stand beside figures of the whole."""

import pytest

from evals.answers import Answer
from evals.benchmark import Question
from evals.benchmarks.gqa import GQA
from evals.catalogue import BENCHMARKS
from evals.published import ELSEWHERE, WHOLE_SETS, comparison_note, format_count, published_scores
from evals.scoring import score_answers, summarize_result
from evals.tables import format_markdown


def result(num: int) -> dict:
    questions = [Question(str(i), "?", truths=("yes",), cluster=str(i)) for i in range(num)]
    return summarize_result(score_answers(GQA(), questions, [Answer(str(i), "yes") for i in range(num)], "robust"))


def test_twelve_questions_of_gqa_are_twelve_of_12578() -> None:
    found = result(12)
    table = format_markdown([found])
    assert (found["num_questions"], found["whole_set"]) == (12, 12_578)
    assert "| 12 of 12,578 |" in table
    assert "12 of 12,578 questions: LLaVA's scores are of the whole set" in table
    assert "62.0" not in table


def test_the_whole_set_stands_beside_what_was_published() -> None:
    table = format_markdown([result(12_578)])
    assert "| 12,578 of 12,578 |" in table
    assert "| LLaVA-1.5-7B | 62.0 |" in table
    assert "are not compared with" not in table


@pytest.mark.parametrize("name", sorted(WHOLE_SETS))
def test_figures_stand_beside_whole_sets_only(name: str) -> None:
    assert name in BENCHMARKS
    for num in WHOLE_SETS[name]:
        assert not published_scores(name, num - 1)
        assert bool(published_scores(name, num)) != bool(comparison_note(name, num) or name not in published_names())
        assert format_count(name, 3, 3) == f"3 of {max(WHOLE_SETS[name]):,}"


def test_a_figure_of_images_only_does_not_stand_beside_all_questions() -> None:
    assert list(published_scores("seed_bench", 19_242)) == ["LLaVA-1.5-7B", "LLaVA-1.5-13B", "LLaVA-1.5-7B-LoRA"]
    assert not published_scores("seed_bench", 14_233)


def published_names() -> set[str]:
    return {name for name in WHOLE_SETS if comparison_note(name, 1)}


def test_what_only_a_server_scores_has_no_figure_here() -> None:
    assert set(ELSEWHERE) == {"vqav2", "vizwiz"}
    assert comparison_note("vqav2", 214_354) == "LLaVA's scores are of test-dev2015, which only its server can score"
    assert (comparison_note("custom", 5), format_count("custom", 4, 5)) == (None, "4 of 5")

"""Requests for a judge, of answers that a benchmark's own rule hands to a language model."""

from collections.abc import Callable, Mapping, Sequence

from evals.benchmark import Question
from evals.files import as_lines

REQUESTS = "judge_requests.jsonl"


def list_judge_requests(
    questions: Sequence[Question],
    answers: Mapping[str, str],
    needs_judge: Callable[[Question, str], bool],
    request: Callable[[Question, str], str],
) -> dict[str, bytes]:
    """Build the file of requests, question_id and request, for given answers; none where no answer needs a judge."""
    rows = [
        {"question_id": question.id, "request": request(question, said)}
        for question in questions
        if (said := answers.get(question.id, "")).strip() and needs_judge(question, said)
    ]
    return {REQUESTS: as_lines(rows)} if rows else {}

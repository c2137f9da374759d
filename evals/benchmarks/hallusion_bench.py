"""HallusionBench: yes-or-no questions against language priors and visual illusions, in sets over several figures."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from evals.benchmark import (
    FAILED,
    UNPARSED,
    Benchmark,
    Grade,
    Graded,
    Judge,
    Profile,
    Question,
    Total,
    by_category,
    percentage,
    split_by,
)
from evals.files import as_json, find, need, read_json_value
from evals.matching.yes_no import parse_yes_no
from llava_ray.errors import DataError

_CORRECT, _INCORRECT, _UNCLEAR = "correct", "incorrect", "unclear"
_NO_FIGURE = "no figure"
_REQUEST = (
    "As a careful teacher, compare a prediction with the reference answer to a question. Reply with one word: correct "
    "if the prediction does not contradict the reference, incorrect if it does, unclear if the prediction does not "
    "commit itself."
)


class HallusionBench(Benchmark):
    """aAcc over questions; fAcc: all questions of a figure right; qAcc: a question right on all figures of its set.

    Obtain: https://github.com/tianyi-lab/HallusionBench. The folder holds ``HallusionBench.json`` and
    ``hallusion_bench/`` with the figures. Reviews (for the official rule) are ``{"question_id", "content"}`` lines.

    llava and official: a judge says correct, incorrect or unclear; unclear is right where a supplementary (VS) question
    comes without its figure, and such questions do not count for fAcc. robust: yes or no, see
    ``matching.yes_no``, without a judge; an unparsed answer is never right. The two are not comparable.

    Robust, answer | truth | score::

        'Yes' | yes | 1
        'No.' | no | 1
        'yes, both are equal' | yes | 1
        'No, the left one is larger.' | no | 1
        'The answer is no' | no | 1
        'YES' | no | 0
        'Yes, it is not curved.' | yes | 1
        'They look equal.' | yes | unparsed
        'I am not sure' | no | unparsed
        'yes and no' | yes | unparsed
        '' | no | unparsed
    """

    name = "hallusion_bench"
    title = "HallusionBench"
    metric = "aAcc"
    needs_judge = ("llava", "official")
    max_new_tokens = 1024

    def read(self, folder: Path) -> list[Question]:
        """Read all questions; some have no figure."""
        path = find(folder, "HallusionBench.json")
        questions = []
        for row in read_json_value(path):
            keys = ("category", "subcategory", "set_id", "figure_id", "question_id")
            category, subcategory, set_id, figure_id, question_id = (str(need(row, key, path)) for key in keys)
            has_figure = str(need(row, "visual_input", path)) != "0" and row.get("filename")
            questions.append(
                Question(
                    "_".join((category, subcategory, set_id, figure_id, question_id)),
                    need(row, "question", path),
                    (folder / row["filename"].removeprefix("./"),) if has_figure else (),
                    ("yes" if str(need(row, "gt_answer", path)) == "1" else "no",),
                    categories=(category, f"{category} {subcategory}"),
                    cluster=f"{category}_{subcategory}_{set_id}",
                    group=_NO_FIGURE if category == "VS" and figure_id == "0" else "figure",
                    facts={"row": row},
                )
            )
        return questions

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade yes or no, or have a judge grade. Raises DataError."""
        if profile == "robust":
            parsed = parse_yes_no(answer)
            return UNPARSED if parsed is None else Grade(float(parsed in question.truths), parsed)
        if judge is None:
            raise DataError(f"{self.title} needs a judge under {profile}: use --reviews FILE or --profile robust")
        details = question.facts["row"].get("gt_answer_details", question.truths[0])
        parts = f"{_REQUEST}\nQuestion: {question.prompt}\nReference: {details}\nPrediction: {answer}\nOutput:"
        reply = judge(question.id, parts)
        return FAILED if reply is None else grade_verdict(reply, no_figure=question.group == _NO_FIGURE)

    def add_up(self, rows: Sequence[Graded], profile: Profile) -> Total:
        """Return aAcc, fAcc and qAcc in per cent."""
        metrics = {
            "fAcc": _all_right([row for row in rows if row.group != _NO_FIGURE], lambda row: row.id.rpartition("_")[0]),
            "qAcc": _all_right(rows, lambda row: f"{row.cluster}_{row.id.rpartition('_')[2]}"),
        }
        return Total(percentage(rows).value, metrics, by_category(rows))

    def submit(self, questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, bytes]:
        """Build the file for the authors' evaluation.py."""
        rows = [{**q.facts["row"], "model_prediction": answers.get(q.id, "")} for q in questions]
        return {"HallusionBench_result.json": as_json(rows)}


def grade_verdict(reply: str, *, no_figure: bool) -> Grade:
    """Parse a judge's reply as the authors do: "incorrect" before "correct", anything else is unclear."""
    text = reply.lower()
    verdict = _INCORRECT if _INCORRECT in text else _CORRECT if _CORRECT in text else _UNCLEAR
    return Grade(float(verdict == _CORRECT or (verdict == _UNCLEAR and no_figure)), verdict)


def _all_right(rows: Sequence[Graded], key: Callable[[Graded], str]) -> float | None:
    """Compute the share of groups in which every answer is correct, in per cent."""
    groups = split_by(rows, key).values()
    return 100 * sum(all(row.score == 1 for row in some) for some in groups) / len(groups) if groups else None

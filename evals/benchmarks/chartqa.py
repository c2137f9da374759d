"""ChartQA: questions about charts; a number may be 5 % off (test: 1,250 human, 1,250 augmented)."""

from pathlib import Path

from evals.benchmark import SHORT, Benchmark, Grade, Judge, Profile, Question
from evals.files import find_all, need, read_json_value
from evals.matching.numbers import grade_numbers, relaxed_accuracy


class ChartQA(Benchmark):
    """Relaxed accuracy over all questions; the splits human and augmented are categories.

    Obtain: https://github.com/vis-nlp/ChartQA (ChartQA Dataset). The folder is ``test`` (or holds it):
    ``test_human.json``, ``test_augmented.json``, ``png/``.

    llava and official: the published rule, in which "1,000" is no number, "14" is not "14%", and years are numbers.
    robust: such numbers are read, years have to be exact, 0 is 0; what states no one number ("3-4", "more than 3") is
    unparsed if the truth is one.

    Robust, answer | truth | score::

        '105' | 100 | 1
        '105.1' | 100 | 0
        '95' | 100 | 1
        '0.14' | 14% | 1
        '14' | 14% | 1
        '14 %' | 14% | 1
        '1,000' | 1000 | 1
        '$1,000.' | 1000 | 1
        'yes.' | Yes | 1
        '0.0' | 0 | 1
        '0.1' | 0 | 0
        '2010' | 2015 | 0
        '2015' | 2015 | 1
        '5 million' | 5000000 | 1
        '5 million' | 5 | 0
        '-5' | 5 | 0
        'nan' | 5 | 0
        '' | 5 | unparsed
    """

    name = "chartqa"
    title = "ChartQA"
    metric = "relaxed accuracy"

    def read(self, folder: Path) -> list[Question]:
        """Read both splits, or the available one."""
        questions = []
        for path in find_all(folder, "test/test_*.json", "test_*.json"):
            split = path.stem.removeprefix("test_")
            for number, row in enumerate(read_json_value(path)):
                image = need(row, "imgname", path)
                prompt, truth = need(row, "query", path) + SHORT, str(need(row, "label", path))
                file = path.parent / "png" / image
                questions.append(Question(f"{split}/{number}", prompt, (file,), (truth,), (), (split,), image))
        return questions

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade by number or text."""
        if profile == "robust":
            return grade_numbers(answer, question.truths)
        return Grade(float(any(relaxed_accuracy(answer, truth) for truth in question.truths)), answer.strip())

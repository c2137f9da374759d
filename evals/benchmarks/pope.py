"""POPE: is an object in the image? 3 x 3,000 questions: random, popular and adversarial objects."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from evals.benchmark import (
    SHORT,
    Benchmark,
    Grade,
    Graded,
    Judge,
    MetricValue,
    Profile,
    Question,
    Total,
    grade_choice,
    split_by_category,
)
from evals.files import find_all, need, read_lines
from evals.matching.yes_no import parse_pope, parse_yes_no

_PREFIX = "coco_pope_"


class POPE(Benchmark):
    r"""Yes or no; the headline is the mean of the splits' F1, with "yes" as positive.

    Obtain: https://github.com/AoiDragon/POPE/tree/main/output/coco. The folder holds ``coco_pope_adversarial.json``,
    ``coco_pope_popular.json``, ``coco_pope_random.json`` (JSON lines; also in ``coco/``) and COCO's ``val2014/``. Ids
    are ``SPLIT/question_id``, since each file counts from 1; a bare id is understood if only one file has it. With
    LLaVA's ``llava_pope_test.jsonl`` in the folder its ids are known: they are joined by image and question, never by
    line.

    llava and official: "no" if No, no or not is a word before the first period, else yes. robust: see
    ``matching.yes_no``; an unparsed answer is no yes, so it lowers recall or accuracy but never precision.

    Robust, answer | truth | score::

        'Yes' | yes | 1
        'NO' | no | 1
        'no\n' | no | 1
        'No, there is not.' | no | 1
        'There is no snowboard.' | no | 1
        'The answer is yes' | yes | 1
        '**Yes**' | yes | 1
        'Yes, it is not red.' | yes | 1
        'None' | no | unparsed
        'There is nothing' | no | unparsed
        'Not sure' | no | unparsed
        'It is not. Yes' | yes | unparsed
        'Yes. no' | yes | unparsed
        '' | no | unparsed
    """

    name = "pope"
    title = "POPE"
    metric = "mean F1"
    is_mean = False

    def read(self, folder: Path) -> list[Question]:
        """Read the available splits."""
        llava_ids = {
            (
                need(row, "category", file),
                need(row, "image", file),
                need(row, "text", file).removesuffix(SHORT).strip().lower(),
            ): str(need(row, "question_id", file))
            for file in folder.glob("llava_pope_test.jsonl")
            for row in read_lines(file)
        }
        questions = []
        for path in find_all(folder, f"{_PREFIX}*.json", f"coco/{_PREFIX}*.json"):
            split = path.stem.removeprefix(_PREFIX)
            for row in read_lines(path):
                name, image, text = (need(row, key, path) for key in ("question_id", "image", "text"))
                llava_id = llava_ids.get((split, image, text.strip().lower()))
                file = folder / "val2014" / image
                questions.append(
                    Question(
                        f"{split}/{name}",
                        text + SHORT,
                        (file,),
                        (need(row, "label", path).lower(),),
                        categories=(split,),
                        cluster=image,
                        aliases=(llava_id,) if llava_ids and llava_id else () if llava_ids else (str(name),),
                    )
                )
        return questions

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade yes or no."""
        parsed = parse_yes_no(answer) if profile == "robust" else parse_pope(answer)
        return grade_choice(parsed, question.truths)

    def add_up(self, rows: Sequence[Graded], profile: Profile) -> Total:
        """Compute accuracy, precision, recall, F1 and the predictions' share of "yes", by split and as means."""
        splits = {name: _yes_no_metrics(some) for name, some in split_by_category(rows).items()}
        means = {key: sum(one[key] for one in splits.values()) / len(splits) for key in next(iter(splits.values()))}
        each = {f"{name} {key}": value for name, one in splits.items() for key, value in one.items() if key != "f1"}
        counts = {name: sum(name in row.categories for row in rows) for name in splits}
        return Total(
            means["f1"], means | each, {name: MetricValue(one["f1"], counts[name]) for name, one in splits.items()}
        )


def _yes_no_metrics(rows: Sequence[Graded]) -> Mapping[str, float]:
    """Compute accuracy, precision, recall, f1 and yes_ratio (of predictions) in per cent; 0 for 0/0."""
    num_yes = sum(row.parsed == "yes" for row in rows)
    hits = sum(row.parsed == "yes" and row.truth == "yes" for row in rows)
    positives = sum(row.truth == "yes" for row in rows)
    num_parsed = sum(row.parsed is not None for row in rows)
    precision, recall = _share(hits, num_yes), _share(hits, positives)
    return {
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "accuracy": _share(sum(row.parsed == row.truth for row in rows), len(rows)),
        "precision": precision,
        "recall": recall,
        "yes_ratio": _share(num_yes, num_parsed),
    }


def _share(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0

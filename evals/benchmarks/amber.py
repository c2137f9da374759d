"""AMBER: hallucination in descriptions, and in yes-or-no questions about existence, attributes and relations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.amber_files import AMBER_SOURCE, find_amber_image, need_word_list, read_amber_queries, read_amber_words
from evals.benchmark import (
    SHORT,
    UNPARSED,
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
from evals.files import as_json, list_first, need
from evals.matching.amber_objects import AmberWords, count_amber_objects, find_plain_nouns
from evals.matching.noun_tools import are_similar, describe_missing_tools, tag_nouns
from evals.matching.object_counts import read_counts, share_of
from evals.matching.plain_text import to_plain_text
from evals.matching.yes_no import parse_yes_no
from llava_ray.errors import DataError

_KINDS: Mapping[str, tuple[str, ...]] = {
    "discriminative-hallucination": ("existence",),
    "discriminative-attribute-state": ("attribute", "attribute state"),
    "discriminative-attribute-number": ("attribute", "attribute number"),
    "discriminative-attribute-action": ("attribute", "attribute action"),
    "discriminative-relation": ("relation",),
    "relation": ("relation",),
}


class AMBERGenerative(Benchmark):
    """100 - CHAIR: the share of named objects that are there; beside it CHAIR, Cover, Hal and Cog.

    CHAIR: hallucinated ones among the named objects. Cover: objects that are there and are named. Hal: descriptions
    with a hallucinated object. Cog: objects that people would imagine beside, and that are named. AMBER's own total
    score is the mean of this headline and the F1 of ``amber_discriminative``. Figures are not rounded to tenths.

    Obtain: https://github.com/junyangwang0410/AMBER and its images. The folder is the repository or its ``data/``:
    ``query/query_generative.json``, ``annotations.json``, ``relation.json``, ``safe_words.txt``, and ``image/``.

    llava and official: the authors' script, which finds nouns by NLTK's tagger and takes words for the same whose
    ``en_core_web_lg`` vectors are nearer than 0.8; both have to be installed. robust: words of AMBER's vocabulary in
    the singular, without a tagger (words such as "can" and "watch" only right after an article, a number or "with") and
    without vectors, so that of two words for one thing only those count that ``relation.json`` puts together: CHAIR is
    higher than the official one, and the two are not comparable. An empty description is unparsed.

    Robust, answer | truth | score::

        'A dog on the beach.' | dog, beach | 1
        'Dogs and sand' | dog, beach | 1
        'Two men' | man | 1
        'People walk here.' | man | 1
        'A dog and a cat.' | dog | 0
        'The dog sits under a tree.' | dog | 0
        'You can see a dog.' | dog | 1
        'A can beside a dog.' | dog | 0
        'A watch and a dog' | dog | 0
        'People sit and watch the dog.' | dog, man | 1
        'An orange light near the dog' | dog | 1
        'Nothing of note.' | dog | 1
        '' | dog | unparsed
    """

    name = "amber_generative"
    title = "AMBER (generative)"
    metric = "100 - CHAIR"
    is_mean = False
    max_new_tokens = 512

    def read(self, folder: Path) -> list[Question]:
        """Read descriptions' images with their objects."""
        words = read_amber_words(folder)
        questions = []
        for row, note, path in read_amber_queries(folder, "generative"):
            truth, imagined = (need_word_list(need(note, key, path), note, path) for key in ("truth", "hallu"))
            unknown = [name for name in (*truth, *imagined) if name not in words.related]
            if unknown or not truth:
                raise DataError(
                    f"{path}: question {note['id']} has "
                    + (f"{list_first(unknown)}, which relation.json lacks" if unknown else "no object that is there")
                    + f"; obtain both files again from {AMBER_SOURCE}."
                )
            facts = {"words": words, "objects": truth, "imagined": imagined}
            image = find_amber_image(folder, row["image"])
            questions.append(
                Question(str(row["id"]), row["query"], (image,), (", ".join(truth),), cluster=row["image"], facts=facts)
            )
        return questions

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade a description: 1 without hallucinated objects. Raises DataError without the official rule's tools."""
        facts = question.facts
        words: AmberWords = facts["words"]
        if profile != "robust":
            counts = count_amber_objects(tag_nouns(answer), facts["objects"], facts["imagined"], words, are_similar)
        elif not (plain := to_plain_text(answer)):
            return UNPARSED
        else:
            nouns = find_plain_nouns(plain, words.vocabulary)
            counts = count_amber_objects(nouns, facts["objects"], facts["imagined"], words, lambda noun, word: False)
        return Grade(float(not counts.hallucinated), counts.to_json())

    def lacks(self, profile: Profile) -> str | None:
        """Return which of the authors' tools is missing."""
        return None if profile == "robust" else describe_missing_tools("nltk", "spacy")

    def add_up(self, rows: Sequence[Graded], profile: Profile) -> Total:
        """Compute 100 - CHAIR, CHAIR, Cover, Hal and Cog in per cent."""
        counts = read_counts(rows)
        wrong = share_of(sum(len(one.hallucinated) for one in counts), sum(one.mentioned for one in counts))
        metrics = {
            "CHAIR": wrong,
            "Cover": share_of(sum(one.covered for one in counts), sum(one.present for one in counts)),
            "Hal": share_of(sum(bool(one.hallucinated) for one in counts), len(counts)),
            "Cog": share_of(sum(one.imagined for one in counts), sum(one.expected for one in counts)),
        }
        return Total(None if wrong is None else 100 - wrong, metrics)

    def submit(self, questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, bytes]:
        """Build the file for the authors' inference.py."""
        return {"amber_generative.json": as_json(_responses(questions, answers))}


class AMBERDiscriminative(Benchmark):
    """F1 with "no" as the positive answer; beside it accuracy, precision and recall, of all and by dimension.

    The dimensions are existence, attribute (state, number, action) and relation. AMBER's own total score is the mean of
    this headline and 100 - CHAIR of ``amber_generative``. Figures are not rounded to tenths.

    Obtain: https://github.com/junyangwang0410/AMBER and its images. The folder is the repository or its ``data/``:
    ``query/query_discriminative.json``, ``annotations.json`` and ``image/``.

    llava and official: only "Yes" and "No", to the letter, are answers; any other text is wrong. robust: see
    ``matching.yes_no``; an unparsed answer is wrong, and no "no". The submission has Yes or No where that can be read.

    Robust, answer | truth | score::

        'Yes' | yes | 1
        'No' | no | 1
        'no.' | no | 1
        'YES!' | yes | 1
        'No, the sky is gloomy.' | no | 1
        'Yes, it is.' | no | 0
        'The answer is yes' | yes | 1
        'There is no dog.' | no | 1
        'It is sunny.' | yes | unparsed
        'yes and no' | yes | unparsed
        'Not sure' | no | unparsed
        '' | no | unparsed
    """

    name = "amber_discriminative"
    title = "AMBER (discriminative)"
    metric = "F1"
    is_mean = False

    def read(self, folder: Path) -> list[Question]:
        """Read yes-or-no questions."""
        questions = []
        for row, note, path in read_amber_queries(folder, "discriminative"):
            kind, truth = str(need(note, "type", path)), str(need(note, "truth", path)).lower()
            if kind not in _KINDS or truth not in ("yes", "no"):
                raise DataError(
                    f"{path}: question {note['id']} has type {kind!r} and truth {truth!r}; expected yes or no of one "
                    f"of {', '.join(_KINDS)}. Obtain it again from {AMBER_SOURCE}."
                )
            image = find_amber_image(folder, row["image"])
            questions.append(
                Question(
                    str(row["id"]), row["query"] + SHORT, (image,), (truth,), (), _KINDS[kind], cluster=row["image"]
                )
            )
        return questions

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade yes or no."""
        parsed = parse_yes_no(answer) if profile == "robust" else {"Yes": "yes", "No": "no"}.get(answer)
        return grade_choice(parsed, question.truths)

    def add_up(self, rows: Sequence[Graded], profile: Profile) -> Total:
        """Compute F1, accuracy, precision and recall of "no" in per cent, of all and by dimension."""
        everything = _no_metrics(rows)
        dimensions = {name: _no_metrics(some) for name, some in split_by_category(rows).items()}
        each = {f"{name} {key}": value for name, one in dimensions.items() for key, value in one.items() if key != "F1"}
        counts = {name: len(some) for name, some in split_by_category(rows).items()}
        categories = {name: MetricValue(one["F1"], counts[name]) for name, one in dimensions.items()}
        return Total(everything["F1"], everything | each, categories)

    def submit(self, questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, bytes]:
        """Build the file for the authors' inference.py."""
        said = {name: (parse_yes_no(text) or text).capitalize() for name, text in answers.items()}
        return {"amber_discriminative.json": as_json(_responses(questions, said))}


def _no_metrics(rows: Sequence[Graded]) -> dict[str, float]:
    """Compute accuracy, and precision, recall and F1 of "no", in per cent; 0 for 0/0."""
    hits = sum(row.parsed == "no" and row.truth == "no" for row in rows)
    precision = share_of(hits, sum(row.parsed == "no" for row in rows)) or 0.0
    recall = share_of(hits, sum(row.truth == "no" for row in rows)) or 0.0
    return {
        "F1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "accuracy": share_of(sum(row.parsed == row.truth for row in rows), len(rows)) or 0.0,
        "precision": precision,
        "recall": recall,
    }


def _responses(questions: Sequence[Question], answers: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"id": int(q.id), "response": answers.get(q.id, "")} for q in questions]

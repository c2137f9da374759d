"""The interface of benchmarks: images, prompts, grading and aggregation, independent of any model.

A benchmark reads its official files into questions, grades one answer at a time under a scorer profile, and adds
grades up. The caller provides the answers; two benchmarks also need a judge, which is an argument.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

Profile = Literal["llava", "official", "robust"]
"""The scoring rule: LLaVA's (parity with its tables), the benchmark authors' script, or ours, which never guesses."""

_State = Literal["scored", "unparsed", "missing", "failed"]
"""``unparsed``: the rule finds no answer in the text (it scores 0). ``failed``: the judge gave no score."""

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTER_CN = "\n请直接回答选项字母。"
LETTER_PRO = "\nAnswer with the option letter from the given choices directly."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Judge(Protocol):
    """A grader of free text: a model behind an API, or recorded reviews."""

    def __call__(self, question_id: str, request: str) -> str | None:
        """Return the reply to a request about one question, or None without one."""
        ...


@dataclass(frozen=True)
class Question:
    """One question of a benchmark."""

    id: str
    prompt: str
    """The whole text of the prompt: context, question, options, instruction."""
    images: tuple[Path | bytes, ...] = ()
    """Files or encoded images, in order; scoring does not need the files."""
    truths: tuple[str, ...] = ()
    """Correct answers (letters where there are options); none where only a server has them."""
    options: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    """Categories in which it is counted too."""
    cluster: str = ""
    """The unit of correlated questions (mostly an image): they are not independent in statistics."""
    group: str = ""
    """Questions that are scored together: an image's two questions in MME, a question's rotations in MMBench."""
    aliases: tuple[str, ...] = ()
    """Other ids in LLaVA's answers: an id, or an id, a newline and the question in lower case."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Data for the benchmark's own rules."""


@dataclass(frozen=True)
class Grade:
    """The score of an answer, 0 to 1, and its parsed form (None: unparsed)."""

    score: float
    parsed: str | None
    state: _State = "scored"


UNPARSED = Grade(0.0, None, "unparsed")
FAILED = Grade(0.0, None, "failed")
MISSING = Grade(0.0, None, "missing")


@dataclass(frozen=True)
class Graded:
    """A grade with the fields for aggregation, so that stored results can be compared without the benchmark's data."""

    id: str
    score: float
    parsed: str | None
    state: _State
    truth: str
    categories: tuple[str, ...] = ()
    cluster: str = ""
    group: str = ""


@dataclass(frozen=True)
class MetricValue:
    """The value of a metric over ``num`` questions; None if it is undefined."""

    value: float | None
    num: int


@dataclass(frozen=True)
class Total:
    """Aggregated grades: the headline, other metrics, and values by category."""

    headline: float | None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    categories: Mapping[str, MetricValue] = field(default_factory=dict)


class Benchmark(ABC):
    """A benchmark. Subclasses' docstrings say how to obtain the data, and list test vectors of the robust rule."""

    name: ClassVar[str]
    title: ClassVar[str]
    metric: ClassVar[str] = "accuracy"
    maximum: ClassVar[float] = 100.0
    category_maximum: ClassVar[float] = 100.0
    needs_judge: ClassVar[tuple[Profile, ...]] = ()
    """Profiles that need a judge."""
    is_mean: ClassVar[bool] = True
    """Whether the headline is 100 x the mean of the scores."""
    max_new_tokens: ClassVar[int] = 128
    """LLaVA's own limit for this kind of answer."""

    @abstractmethod
    def read(self, folder: Path) -> list[Question]:
        """Read the official files of a folder. Raises DataError."""

    @abstractmethod
    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade one answer. Raises DataError where the profile's own rule cannot score the question."""

    def add_up(self, rows: Sequence[Graded], profile: Profile) -> Total:
        """Compute 100 x the mean, of all and by category; missing answers score 0, failed judge calls are excluded."""
        return Total(percentage(rows).value, {}, by_category(rows))

    def lacks(self, profile: Profile) -> str | None:
        """Return why a profile's own rule cannot score on this machine, such as a package; None if it can."""
        return None

    def averaged(self, rows: Sequence[Graded], category: str | None = None) -> Sequence[Graded] | None:
        """Return the rows whose mean x 100 is the headline or a category's metric; None if it is no mean."""
        return rows if self.is_mean else None

    def submit(self, questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, bytes]:
        """Build the files for the benchmark's server, by name; none without a server. Missing answers are ''."""
        return {}


def percentage(rows: Sequence[Graded]) -> MetricValue:
    """Compute 100 x the mean score of all graded rows."""
    judged = [row.score for row in rows if row.state != "failed"]
    return MetricValue(100 * sum(judged) / len(judged) if judged else None, len(judged))


def split_by(rows: Sequence[Graded], key: Callable[[Graded], str]) -> dict[str, list[Graded]]:
    """Return the rows of each key, in the order in which keys appear."""
    groups: dict[str, list[Graded]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(groups)


def split_by_category(rows: Sequence[Graded]) -> dict[str, list[Graded]]:
    """Return the rows of each category, in the order in which categories appear."""
    groups: dict[str, list[Graded]] = defaultdict(list)
    for row in rows:
        for category in row.categories:
            groups[category].append(row)
    return dict(groups)


def by_category(rows: Sequence[Graded]) -> dict[str, MetricValue]:
    """Compute the percentage of each category."""
    return {name: percentage(some) for name, some in split_by_category(rows).items()}


def join_grade(question: Question, grade: Grade) -> Graded:
    """Join a question and its grade."""
    truth = " / ".join(dict.fromkeys(question.truths))
    return Graded(
        question.id,
        grade.score,
        grade.parsed,
        grade.state,
        truth,
        question.categories,
        question.cluster,
        question.group,
    )


def grade_choice(parsed: str | None, truths: Sequence[str]) -> Grade:
    """Grade a parsed answer: 1 for one of the truths, 0 for any other, unparsed for None."""
    return UNPARSED if parsed is None else Grade(float(parsed in truths), parsed)


def list_options(options: Sequence[str]) -> str:
    """Format options as LLaVA does, one per line after its letter."""
    return "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))

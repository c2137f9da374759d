"""What a benchmark is: what to show, what to ask, what is right and how to add up. It knows no model.

A benchmark reads its official files into questions, grades one answer at a time under a scorer profile, and adds
grades up. Whoever runs it brings the answers; two benchmarks also need a judge, which they receive as an argument.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from llava_ray.errors import ConfigError

Profile = Literal["llava", "official", "robust"]
"""Whose rule: LLaVA's (parity with its tables), the benchmark authors' script, or ours, which never guesses."""
_PROFILES: tuple[Profile, ...] = ("llava", "official", "robust")

_State = Literal["scored", "unparsed", "missing", "failed"]
"""``unparsed``: there is an answer, but no rule finds one in it (it scores 0). ``failed``: the judge gave no score."""

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTER_CN = "\n请直接回答选项字母。"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Judge(Protocol):
    """Whoever grades free text: a model behind an API, or reviews recorded before."""

    def __call__(self, question_id: str, request: str) -> str | None:
        """Return the reply to a request about one question, or None if there is none."""
        ...


@dataclass(frozen=True)
class Question:
    """One question of a benchmark."""

    id: str
    prompt: str
    """All text that the model sees beside the images: context, question, options, instruction."""
    images: tuple[Path | bytes, ...] = ()
    """Files or encoded images, in order; a file need not be there to score."""
    truths: tuple[str, ...] = ()
    """Right answers (letters where there are options); none where only a server knows them."""
    options: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    """Names under which it is counted beside the whole."""
    cluster: str = ""
    """What it shares with other questions (an image, mostly): they are not independent."""
    group: str = ""
    """What is right only as a whole: an image's two questions in MME, a question's rotations in MMBench."""
    aliases: tuple[str, ...] = ()
    """Other ids under which LLaVA's answers know it: an id, or an id, a newline and the question in lower case."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What only its benchmark understands."""


@dataclass(frozen=True)
class Grade:
    """What one answer is worth: 0..1, and what it was understood as (None: nothing)."""

    score: float
    parsed: str | None
    state: _State = "scored"


UNPARSED = Grade(0.0, None, "unparsed")
FAILED = Grade(0.0, None, "failed")
MISSING = Grade(0.0, None, "missing")


@dataclass(frozen=True)
class Graded:
    """A grade with all that adding up needs: kept in a file, it can be compared without the benchmark's data."""

    id: str
    score: float
    parsed: str | None
    state: _State
    truth: str
    categories: tuple[str, ...] = ()
    cluster: str = ""
    group: str = ""


@dataclass(frozen=True)
class Figure:
    """A number over so many questions; None where there is nothing to say."""

    value: float | None
    num: int


@dataclass(frozen=True)
class Total:
    """Grades added up: the headline, other figures of the whole, and those by category."""

    headline: float | None
    figures: Mapping[str, float | None] = field(default_factory=dict)
    categories: Mapping[str, Figure] = field(default_factory=dict)


class Benchmark(ABC):
    """A benchmark by name. Subclasses say how to obtain the data in their docstring, with the robust rule's vectors."""

    name: ClassVar[str]
    title: ClassVar[str]
    metric: ClassVar[str] = "accuracy"
    maximum: ClassVar[float] = 100.0
    category_maximum: ClassVar[float] = 100.0
    needs_judge: ClassVar[tuple[Profile, ...]] = ()
    """Profiles under which a judge has to grade."""
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
        """Return 100 x the mean, of all and by category; a missing answer scores 0, a failed judge call is out."""
        return Total(percentage(rows).value, {}, by_category(rows))

    def averaged(self, rows: Sequence[Graded], category: str | None = None) -> Sequence[Graded] | None:
        """Return the rows whose mean x 100 is the headline, or the figure of a category; None where it is no mean."""
        return rows if self.is_mean else None

    def submit(self, questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, bytes]:
        """Return the files that the benchmark's server takes, by name; none if it has none. Missing answers are ''."""
        return {}


def percentage(rows: Sequence[Graded]) -> Figure:
    """Return 100 x the mean score of what was judged."""
    judged = [row.score for row in rows if row.state != "failed"]
    return Figure(100 * sum(judged) / len(judged) if judged else None, len(judged))


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


def by_category(rows: Sequence[Graded]) -> dict[str, Figure]:
    """Return the percentage of each category."""
    return {name: percentage(some) for name, some in split_by_category(rows).items()}


def graded(question: Question, grade: Grade) -> Graded:
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


def right_or_wrong(parsed: str | None, truths: Sequence[str]) -> Grade:
    """Grade what was understood: 1 for one of the truths, 0 for anything else, unparsed for nothing."""
    return UNPARSED if parsed is None else Grade(float(parsed in truths), parsed)


def list_options(options: Sequence[str]) -> str:
    """Return options as LLaVA shows them, each on a line of its own after its letter."""
    return "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def _check_profile(name: str) -> Profile:
    """Return a profile by name. Raises ConfigError."""
    for profile in _PROFILES:
        if name == profile:
            return profile
    raise ConfigError(f"there is no scorer profile {name!r}; expected one of {', '.join(_PROFILES)}")

"""Rewards of sampled answers: rules that compare with the record's answer, benchmarks' scorers, patterns, or your own.

A reward takes attempts, all answers to some questions, and returns a number for each. The numbers of several rewards
are added up with their weights.
"""

import importlib
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float

from evals.benchmark import LETTERS, Benchmark, Question
from evals.benchmarks.custom import Custom, exact
from evals.catalogue import make_benchmark
from evals.matching.letters import parse_letter
from evals.matching.yes_no import parse_yes_no
from llava_ray.config.grpo import GrpoConfig
from llava_ray.errors import ConfigError, DataError, LlavaRayError, TrainingError
from llava_ray.reading import describe_error, short_repr

_RULES = ("exact", "words", "vqa", "number", "anls", "letter", "yes_no")  # of the benchmark of one's own
_CONTAINS, _FORMAT = "contains", "format:"
_OPTION = re.compile(r"^\(?([A-Z])[.)] (.+)$", re.MULTILINE)
_LONGEST_PATTERN = 1_000
_LARGEST = 1_000_000
_MAX_TRUTHS = 65_536  # whose form is remembered


@dataclass(frozen=True)
class Attempt:
    """One sampled answer to a record's last question."""

    id: str
    """The record's."""
    question: str
    """The text of the last question."""
    truth: str
    """The record's own answer."""
    answer: str


Reward = Callable[[Sequence[Attempt]], Sequence[float]]


@dataclass(frozen=True)
class Rewards:
    """The rewards of a run, by name, with their weights."""

    by_name: Mapping[str, Reward]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, grpo: GrpoConfig) -> "Rewards":
        """Find the rewards that the settings name. Raises ConfigError for one that does not exist or does not fit."""
        by_name = {name: make_reward(name) for name in grpo.rewards}
        return cls(by_name, grpo.reward_weights or (1.0,) * len(by_name))

    def compute(self, attempts: Sequence[Attempt]) -> Float[np.ndarray, "n k"]:
        """Compute each reward of each attempt. Raises TrainingError, which names reward and record."""
        columns = [_compute(name, reward, attempts) for name, reward in self.by_name.items()]
        return np.asarray(columns, np.float64).T

    def add_up(self, values: Float[np.ndarray, "n k"]) -> Float[np.ndarray, " n"]:
        """Return the weighted sum of each attempt's rewards."""
        total: Float[np.ndarray, " n"] = values @ np.asarray(self.weights, np.float64)
        return total


def _compute(name: str, reward: Reward, attempts: Sequence[Attempt]) -> list[float]:
    """Compute one reward of each attempt. Raises TrainingError unless it gives as many finite numbers."""
    first, last = attempts[0].id, attempts[-1].id
    try:
        found = reward(list(attempts))  # a copy: a function of one's own may sort or empty it
        values = [] if isinstance(found, Mapping | Set | str) else list(found)
    except LlavaRayError:
        raise
    except Exception as error:
        raise TrainingError(
            f"reward {name!r} failed for the answers to {first!r} to {last!r}: {describe_error(error)}; correct it"
        ) from error
    if len(values) != len(attempts):
        raise TrainingError(
            f"reward {name!r} returned {len(values)} numbers for {len(attempts)} answers; return a list of one each"
        )
    for value, attempt in zip(values, attempts, strict=True):
        if isinstance(value, bool | int | float | np.bool_ | np.integer | np.floating) and abs(value) <= _LARGEST:
            continue
        raise TrainingError(
            f"reward {name!r} is {short_repr(value)} for the answer {short_repr(attempt.answer)} to record "
            f"{attempt.id!r}; expected a finite number of at most {_LARGEST:,}, such as 0 for an answer that cannot be "
            "judged"
        )
    return [float(value) for value in values]


def make_reward(name: str) -> Reward:
    """Return the reward of a name. Raises ConfigError."""
    if name == _CONTAINS:
        return lambda attempts: [contains(attempt.answer, attempt.truth) for attempt in attempts]
    if name in _RULES:
        return _by_benchmark(Custom(), name)
    if name.startswith(_FORMAT):
        return _by_pattern(name.removeprefix(_FORMAT))
    if ":" in name:
        return _find_function(name)
    benchmark = make_benchmark_reward(name)
    _check_benchmark(benchmark, name)
    return _by_benchmark(benchmark, "")


def make_benchmark_reward(name: str) -> Benchmark:
    """Return the benchmark of a name. Raises ConfigError that lists the other rewards too."""
    try:
        return make_benchmark(name)
    except ConfigError as error:
        raise ConfigError(
            f"grpo.rewards names {name!r}: {error}; or {', '.join(_RULES)}, {_CONTAINS}, {_FORMAT}PATTERN, "
            "module:function"
        ) from error


def contains(answer: str, truth: str) -> float:
    """Return 1 where the truth stands in the answer as whole words, ignoring case."""
    if not exact(truth):
        raise ValueError(f"the record's answer {truth!r} has no word that another could contain")
    words = rf"(?<!\w){re.escape(exact(truth))}(?!\w)"
    return float(re.search(words, answer.lower()) is not None)


def _by_pattern(pattern: str) -> Reward:
    """Return a reward of 1 for an answer that a regular expression matches as a whole. Raises ConfigError."""
    if len(pattern) > _LONGEST_PATTERN:
        raise ConfigError(
            f"grpo.rewards: a pattern of {len(pattern)} characters; at most {_LONGEST_PATTERN} are allowed"
        )
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"grpo.rewards: {pattern!r} is no regular expression: {error}") from error
    return lambda attempts: [float(compiled.fullmatch(attempt.answer.strip()) is not None) for attempt in attempts]


def _find_function(name: str) -> Reward:
    """Import a reward of one's own. Raises ConfigError."""
    module, _, attribute = name.partition(":")
    try:
        found: Reward = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"grpo.rewards names {name!r}, which cannot be imported: {describe_error(error)}; expected module:function "
            "of a module on the Python path of all nodes"
        ) from error
    if not callable(found):
        raise ConfigError(f"grpo.rewards names {name!r}, which is {type(found).__name__}; expected a function")
    return found


def _by_benchmark(benchmark: Benchmark, rule: str) -> Reward:
    """Return a benchmark's score of each answer, by its robust rule."""

    @lru_cache(_MAX_TRUTHS)
    def find_question(text: str, truth: str) -> Question:
        """Return the question with the record's answer in the form that the rule takes it in. Raises ValueError."""
        truths = _forms_of(truth.strip(), find_options(text))
        forms = [as_question(Attempt("", text, form, truth), rule) for form in truths]
        scores = [_score(benchmark, form, truth) for form in forms]
        if not max(scores) > 0:
            raise ValueError(
                f"the rule gives the record's own answer {short_repr(truth)} to {short_repr(text)} no reward, so that "
                "no answer could be right: correct the record, or choose a reward for such answers"
            )
        return forms[scores.index(max(scores))]

    def grade(attempts: Sequence[Attempt]) -> list[float]:
        return [benchmark.grade(find_question(a.question, a.truth), a.answer, "robust").score for a in attempts]

    return grade


def _score(benchmark: Benchmark, question: Question, answer: str) -> float:
    """Return a rule's score; 0 where it cannot read the truth, such as a number in words."""
    try:
        return benchmark.grade(question, answer, "robust").score
    except (ValueError, LookupError, DataError):
        return 0.0


def _forms_of(truth: str, options: Sequence[str]) -> list[str]:
    """Return what a record's answer may stand for: an option's letter, its own text, a plain yes or no, a number."""
    named = [LETTERS[options.index(truth)]] if truth in options else []
    number = re.findall(r"-?\d[\d,]*(?:\.\d+)?", truth)
    read = [parse_letter(truth, options) if options else None, parse_yes_no(truth)]
    return list(dict.fromkeys([*named, truth, *filter(None, read), *(number if len(number) == 1 else ())]))


def find_options(text: str) -> list[str]:
    """Return the options that a question lists: its lines that begin with A., B. and so on."""
    found = _OPTION.findall(text)
    in_order = "".join(letter for letter, _ in found) == LETTERS[: len(found)]
    return [option.strip() for _, option in found] if in_order else []


def as_question(attempt: Attempt, rule: str = "") -> Question:
    """Return an attempt as a benchmark's question."""
    facts, options = {"rule": rule} if rule else {}, tuple(find_options(attempt.question))
    return Question(attempt.id, attempt.question, (), (attempt.truth.strip(),), options, facts=facts)


def _check_benchmark(benchmark: Benchmark, name: str) -> None:
    """Check that a benchmark scores an answer by the record's own answer alone. Raises ConfigError."""
    if "robust" in benchmark.needs_judge:
        raise ConfigError(
            f"grpo.rewards names {name!r}, whose scores are given by a judge; name a benchmark with a rule, or give a "
            "function of your own that asks one: module:function"
        )
    tried = Attempt("tried", "Which?\nA. red\nB. blue", "A", "A")
    try:
        benchmark.grade(as_question(tried), tried.answer, "robust")
    except Exception as error:
        raise ConfigError(
            f"grpo.rewards names {name!r}, whose rule needs more than a question and its answer "
            f"({describe_error(error)}); name another, or a function of your own: module:function"
        ) from error

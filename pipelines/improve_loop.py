"""The rounds of the loop: preferences, tuning, evaluation, and the test that decides whether the next one comes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

from evals.comparison import StoredResult, compare_results
from evals.scoring import rounded
from llava_ray.config.improve import ImproveSection
from llava_ray.errors import BudgetError, DataError, NoPairsError
from pipelines.improve_stages import HeldOutResult, RoundPreferences, RoundStages


@dataclass(frozen=True)
class FinishedRound:
    """A round with all its stages, and what it gained on the model that it started from."""

    number: int
    start: HeldOutResult
    preferences: RoundPreferences
    tuned: Mapping[str, Any]
    result: HeldOutResult
    gain: Mapping[str, Any]

    @property
    def accepted(self) -> bool:
        """Return whether the round's model is significantly better."""
        return bool(self.gain["significant"] and self.gain["difference"] > 0)


@dataclass
class ImprovedRounds:
    """The rounds so far, and why there is no further one."""

    start: HeldOutResult | None = None
    rounds: list[FinishedRound] = field(default_factory=list)
    unfinished: Mapping[str, Any] | None = None
    """The summary of preferences that are not complete."""
    stopped: str = ""
    partial: str = ""
    """Why the same call goes on from here: the budget, or a signal."""
    signal: int = 0

    @property
    def best(self) -> HeldOutResult | None:
        """Return the best model: that of the last round that was significantly better, or the one at the start."""
        accepted = [one.result for one in self.rounds if one.accepted]
        return accepted[-1] if accepted else self.start

    @property
    def best_round(self) -> int:
        """Return the round of the best model; 0 is the start."""
        return max((one.number for one in self.rounds if one.accepted), default=0)


def run_rounds(stages: RoundStages, found: ImprovedRounds) -> None:
    """Run or skip the stages of all rounds, and add each finished round to ``found``.

    Raises the stages' errors; what was finished stays in ``found``.
    """
    improve = stages.config.improve
    best = found.start = stages.evaluate(0, stages.config.model.model_name_or_path)
    for number in range(1, improve.rounds + 1):
        made = _prefer(stages, number, best, found)
        if made is None:
            return
        tuned = stages.tune(number, best, made)
        result = stages.evaluate(number, tuned["bundle"])
        gain = measure_gain(result.read(), best.read(), improve.significance)
        done = FinishedRound(number, best, made, tuned, result, gain)
        found.rounds.append(done)
        print(f"Round {number}: {describe_gain(gain)}", flush=True)
        if why := _why_last(done, improve):
            found.stopped = why
            return
        best = done.result
    found.stopped = f"all {improve.rounds} rounds are done (improve.rounds)"


def _prefer(stages: RoundStages, number: int, best: HeldOutResult, found: ImprovedRounds) -> RoundPreferences | None:
    """Make a round's preferences; None, with the reason in ``found``, where no round can follow."""
    try:
        made = stages.prefer(number, best)
    except NoPairsError as error:
        if not found.rounds:
            raise
        found.stopped = f"round {number} brought no preferences: {error}"
        return None
    except BudgetError as error:
        if not found.rounds:
            raise
        found.partial = str(error)
        return None
    if not made.complete:
        found.unfinished, found.signal = made.summary, made.signal
        found.partial = f"round {number}: {made.summary['partial_because']}"
        return None
    return made


def _why_last(done: FinishedRound, improve: ImproveSection) -> str:
    """Return why no round follows a finished one, or ""."""
    gain = done.gain["difference"]
    if not done.accepted:
        worse = "is significantly worse" if done.gain["significant"] else "gained nothing significant"
        return f"round {done.number} {worse} ({describe_gain(done.gain)})"
    if gain < improve.min_gain:
        return f"round {done.number} gained {gain:.2f} points, below improve.min_gain = {improve.min_gain:g}"
    return ""


def measure_gain(new: StoredResult, old: StoredResult, level: float) -> dict[str, Any]:
    """Compute new - old on the same held-out questions, with the interval and the two-sided p-value of the pairs.

    Where few of them differ, the p-value is at least that of the exact sign test. Raises ConfigError, DataError as
    ``compare_results``, and DataError where the held-out questions themselves differ.
    """
    found = compare_results(new, old)
    if others := [key for key in ("data_hash", "prompt_hash") if key in found["settings_that_differ"]]:
        raise DataError(
            f"the held-out questions were changed between two evaluations of this loop ({', '.join(others)} differ): "
            "scores of different ones cannot be compared; restore them, or choose another improve.output"
        )
    error, difference = found["standard_error"], found["difference"]
    if error is None:
        return found | {"level": level, "confidence_interval": None, "p_value": None, "significant": False}
    half = NormalDist().inv_cdf(1 - level / 2) * error
    low, high = difference - half, difference + half
    certain = 0.0 if difference else 1.0
    p_value = 2 * NormalDist().cdf(-abs(difference) / error) if error else certain
    if found["exact_p_value"] is not None:
        p_value = max(p_value, found["exact_p_value"])
    return found | {
        "level": level,
        "confidence_interval": [rounded(low), rounded(high)],
        "p_value": float(f"{p_value:.3g}"),
        "significant": p_value < level,
    }


def describe_gain(gain: Mapping[str, Any]) -> str:
    """Format a gain with its interval, and say plainly whether it is significant."""
    ends = gain["confidence_interval"]
    percent = 100 * (1 - gain["level"])
    span = f"{percent:g} % interval {ends[0]:+.2f} to {ends[1]:+.2f}" if ends else "without an interval"
    said = "significant" if gain["significant"] else "not significant"
    return f"{gain['second']:.2f} → {gain['first']:.2f}, {gain['difference']:+.2f} points, {span}, {said}"


def place_of_best(folder: Path) -> Path:
    """Return where the best model is found."""
    return folder / "model"

"""Advice after a sweep, in sentences. Pure."""

import math
from collections.abc import Mapping, Sequence

from llava_ray.config.space import SearchConfig, Space
from llava_ray.sweep.trial_ranking import TrialStatus
from llava_ray.sweep.trials import ACCURACY, Trial

_UNIMPORTANT = 0.05
_ENOUGH_TRIALS = 12
_STANDARD_ERRORS = 2.0


def advise(
    trials: Sequence[Trial],
    ranking: Sequence[TrialStatus],
    space: Space,
    search: SearchConfig,
    shares: Mapping[str, float],
    num_answers: int,
) -> list[str]:
    """Return advice for the next sweep, the most useful sentence first."""
    advice = []
    if ranking:
        advice += _suggest_beyond_ends(ranking[0], space)
        advice += _check_significance(ranking, search, num_answers)
    diverged = [trial for trial in trials if trial.state == "diverged"]
    if diverged:
        numbers = ", ".join(str(trial.number) for trial in diverged)
        advice.append(f"Trials {numbers} diverged: lower the upper end of the learning rates, or lengthen the warm-up.")
    failed = [trial for trial in trials if trial.state == "failed"]
    if failed:
        advice.append(f"{len(failed)} trials failed: read their reasons in the table before trusting the rest.")
    num_evaluated = sum(bool(trial.curve) for trial in trials)
    # Few trials do not show that a setting does nothing: its best value may differ with another setting.
    idle = [key for key, share in shares.items() if share < _UNIMPORTANT and num_evaluated >= _ENOUGH_TRIALS]
    if idle and len(idle) < len(shares):
        advice.append(f"{', '.join(idle)} made hardly any difference: leave it at the recipe's own, and save trials.")
    return advice or ["Nothing stands out: the best lies inside the space, and its lead is larger than chance."]


def _suggest_beyond_ends(best: TrialStatus, space: Space) -> list[str]:
    """Return advice for settings whose best value is at an end of the space."""
    sentences = []
    for key, dimension in space.dimensions.items():
        value, ends = best.settings.get(key), _number_ends(dimension.corners)
        if ends is None or value is None or ends[0] == ends[1]:
            continue
        # A tenth of the range, on the scale on which it is drawn, is still the end.
        log = dimension.log_uniform is not None or (ends[0] > 0 and ends[1] >= 10 * ends[0])
        low, high, own = (math.log(x) if log else x for x in (*ends, float(value)))
        share = (own - low) / (high - low)
        if share <= 0.1 or share >= 0.9:
            end, way = ("lower", "below") if share <= 0.1 else ("upper", "above")
            sentences.append(f"The best {key}, {value:g}, is at the {end} end of the space: try values {way} it.")
    return sentences


def _number_ends(corners: Sequence[object]) -> tuple[float, float] | None:
    """Return the least and the greatest of numbers; None for other values."""
    numbers = [float(value) for value in corners if isinstance(value, int | float) and not isinstance(value, bool)]
    return (min(numbers), max(numbers)) if numbers and len(numbers) == len(corners) else None


def _check_significance(ranking: Sequence[TrialStatus], search: SearchConfig, num_answers: int) -> list[str]:
    """Return advice if the lead of the best may be chance."""
    first = ranking[0].accuracy
    if len(ranking) < 2 or search.metric != ACCURACY or first is None or not num_answers:
        return []
    num_questions = num_answers * len(ranking[0].trials)
    error = math.sqrt(max(first * (1 - first), 1 / num_questions) / num_questions) * math.sqrt(2)
    near = [one for one in ranking[1:] if one.accuracy is not None and first - one.accuracy < _STANDARD_ERRORS * error]
    if not near:
        return []
    return [
        f"{len(near)} other setting(s) are within chance of the best ({_STANDARD_ERRORS * error:.1%} for "
        f"{num_questions} answers): raise held_out.num_answers or sweep.num_seeds to tell them apart, or take the "
        "cheapest."
    ]

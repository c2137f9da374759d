#!/usr/bin/env python
"""Make preferences: sample answers, tell the better of two by a judge, a rule or a perturbation, write the pairs.

python pipelines/preferences.py RECIPE --preferences.models MODEL --preferences.data_path data.json --judge.model M
python pipelines/preferences.py --models MODEL --benchmark custom=data/mine --rule benchmark --output runs/pairs
python pipelines/preferences.py RECIPE --models MODEL … --dry-run

Exit code 0: every pair is decided. 3: partial, since the budget is used up or it was stopped; the same command goes on
and pays nothing twice. 1: no preference was made; the message says why. 130, 143: stopped by Ctrl-C or SIGTERM.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_ray.config.preferences import PreferencesConfig
from llava_ray.config.recipes import load_settings
from llava_ray.errors import ConfigError, DataError, NoPairsError
from pipelines.command import exit_unless_complete, run_command, split_dry_run
from pipelines.places import check_files, check_models

if TYPE_CHECKING:
    from pipelines.preference_questions import PromptSource


@dataclass(frozen=True)
class PreferencesMade:
    """The result of making preferences."""

    path: Path
    """preferences.jsonl"""
    num_pairs: int
    complete: bool
    """Whether every pair is decided; otherwise the same call goes on from what is done."""
    dollars: float | None
    """The cost of the judge's calls; None if its price is unknown."""
    mlflow_run_id: str | None
    summary: Mapping[str, Any] = field(repr=False)
    """The contents of summary.json: all counts, biases and identities."""
    signal: int = 0
    """The signal that stopped it."""


def make_preferences(config: PreferencesConfig) -> PreferencesMade:
    """Make preferences in the folder ``config.preferences.output``; what is there already is not made again.

    A running Ray cluster is used, or one is started where anything is to be sampled or judged. Raises ConfigError for
    settings that cannot be used, DataError for questions that cannot be asked or bring no pair, ModelError, and
    JudgeError if the judge cannot be reached.
    """
    _check_preference_places(config)
    from pipelines.preference_deciding import Decider, check_scores
    from pipelines.preference_jobs import list_samplings
    from pipelines.preference_questions import read_prompts_to_answer
    from pipelines.preference_results import log_preferences, summarize_preferences, write_preferences
    from pipelines.preference_sampling import drop_unreadable, sample_answers

    settings, folder, counts = config.preferences, Path(config.preferences.output), Counter[str]()
    source = read_prompts_to_answer(settings)
    if settings.rule in ("benchmark", "answer"):
        check_scores(config, source)
    _check_perturbable(config, source)
    samplings = list_samplings(config, source, folder)
    sample_answers(config, samplings)
    source = drop_unreadable(source, samplings, settings.max_rejected)
    decisions = Decider(config, source, samplings, folder, counts).decide()
    made = summarize_preferences(config, source, samplings, decisions, counts)
    path = write_preferences(config, source, made, folder)
    signal = decisions.judgement.signal if decisions.judgement else 0
    if not made.pairs and made.summary["complete"]:
        raise NoPairsError(_explain_no_pairs(config, made.summary))
    run_id = log_preferences(config, folder, made.summary)
    summary = made.summary
    return PreferencesMade(path, len(made.pairs), summary["complete"], summary["dollars"], run_id, summary, signal)


def _check_preference_places(config: PreferencesConfig) -> None:
    """Check that the models and the data exist. Raises ConfigError."""
    settings = config.preferences
    if "://" in settings.output:
        raise ConfigError("preferences are made in a local or mounted folder: set preferences.output to one")
    check_models({f"preferences.models, {number}": path for number, path in enumerate(settings.models, start=1)})
    check_models({f"preferences.{key}": getattr(settings, key) for key in ("model_base", "vision_tower")})
    folder = settings.benchmark.partition("=")[2] if settings.benchmark else None
    check_files({"preferences.benchmark": folder})
    check_files({f"preferences.{key}": getattr(settings, key) for key in ("data_path", "image_folder", "words")})
    check_files({"preferences.rubric": settings.rubric})


def _check_perturbable(config: PreferencesConfig, source: "PromptSource") -> None:
    """Check that there are images to perturb. Raises DataError."""
    if config.preferences.rule not in ("noised_image", "swapped_image"):
        return
    with_images = sum(bool(prompt.images) for prompt in source.prompts)
    if not with_images:
        raise DataError(
            f"preferences.rule = {config.preferences.rule!r}, and none of the {len(source.prompts):,} questions has an "
            "image: set rule = 'replaced_words', or give questions with images"
        )
    if config.preferences.rule == "swapped_image" and with_images < 2:
        raise DataError("preferences.rule = 'swapped_image' needs two questions with different images; there is one")


def _explain_no_pairs(config: PreferencesConfig, summary: Mapping[str, Any]) -> str:
    """Return why no preference was made, with the remedy."""
    counts, settings = summary["counts"], config.preferences
    possible, equal = counts.get("possible_pairs", 0), counts.get("equal_pairs", 0)
    listed = ", ".join(f"{num:,} {name.replace('_', ' ')}" for name, num in counts.items())
    if possible and equal == possible:
        return (
            f"all {possible:,} pairs of answers to {summary['asked']:,} questions are equal: raise "
            f"preferences.temperature (it is {settings.temperature:g}) or preferences.top_p, or give another model too"
        )
    if not possible and counts.get("cut_off_answers"):
        return (
            f"no pair is left ({listed}): answers were cut off; raise preferences.max_new_tokens, or set "
            "preferences.cut_off = 'keep'"
        )
    remedy = {
        "judge": "no pair has a winner in both orders; ask more questions, or another judge",
        "benchmark": "no question has a right and a wrong answer; sample more answers (preferences.num_samples)",
        "answer": "no question has a right and a wrong answer; sample more, or set preferences.chosen = 'truth'",
    }.get(settings.rule, "no perturbed answer differs; raise preferences.noise_steps, or give other words")
    if failures := summary["judge_failures"]:
        remedy += f"; {failures['reviews']:,} reviews have no scores, mostly because: {failures['most_common']}"
    if settings.balance_lengths and summary["decided"]:
        remedy = "balancing lengths dropped all pairs: set preferences.balance_lengths = false"
    return f"no preference is left of {summary['asked']:,} questions ({listed}): {remedy}"


def describe_preferences(config: PreferencesConfig) -> dict[str, Any]:
    """Print how much is to be sampled and judged, without starting anything."""
    _check_preference_places(config)
    from pipelines.preference_questions import read_prompts_to_answer

    settings = config.preferences
    source = read_prompts_to_answer(settings)
    _check_perturbable(config, source)
    per_question = settings.num_samples * len(settings.models)
    sides = 2 if settings.rule in ("noised_image", "swapped_image") and settings.chosen == "sample" else 1
    pairs = len(source.prompts) * min(settings.max_pairs_per_question, max(1, per_question * (per_question - 1) // 2))
    summary: dict[str, Any] = {
        "questions": source.total,
        "rejected": len(source.rejected),
        "answers to sample": 0
        if settings.rule == "replaced_words" and settings.chosen == "truth"
        else len(source.prompts) * per_question * sides,
        "tokens an answer, at most": source.max_new_tokens,
        "pairs, at most": pairs,
    }
    if config.uses_judge:
        summary["judge's calls, at most"] = 2 * pairs * (1 + len(config.judge.others))
        summary["budget, dollars"] = config.budget.dollars if config.budget.dollars is not None else "none"
    for name, value in summary.items():
        print(f"  {name:<26} {value:,}" if isinstance(value, int | float) else f"  {name:<26} {value}")
    return summary


def main(arguments: Sequence[str]) -> PreferencesMade | None:
    """Make preferences, or print how much is to be done."""
    asked, others = split_dry_run(arguments)
    config = load_settings(PreferencesConfig, others)
    if asked.dry_run:
        describe_preferences(config)
        return None
    made = make_preferences(config)
    print(f"{made.num_pairs:,} preferences: {made.path}")
    for name, num in made.summary["counts"].items():
        print(f"  {name.replace('_', ' '):<30} {num:,}")
    if failures := made.summary["judge_failures"]:
        print(f"  {failures['reviews']:,} reviews have no scores, mostly because: {failures['most_common']}")
    print(f"  report   {made.path.parent}/report.html")
    if not made.complete:
        print(f"  partial: {made.summary['partial_because']}; the same command goes on")
    return made


def main_with_exit_code(arguments: Sequence[str]) -> None:
    """Run, and exit with a code that says how far it came."""
    made = main(arguments)
    if made is not None:
        exit_unless_complete(complete=made.complete, number=made.signal)


if __name__ == "__main__":
    run_command(main_with_exit_code)

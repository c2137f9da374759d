"""The outputs of making preferences: preferences.jsonl, summary.json, report.html, MLflow."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.benchmark import Question
from llava_ray.chat.conversation import break_markers
from llava_ray.config.preferences import PreferencesConfig
from llava_ray.errors import ConfigError
from llava_ray.reading import describe_error
from llava_ray.report.preferences import PreferenceExample, preferences_report
from llava_ray.report.rendering import write_report
from pipelines.evaluation_results import thumbnails
from pipelines.preference_deciding import Decisions
from pipelines.preference_jobs import SamplingJob
from pipelines.preference_pairs import (
    CandidateAnswer,
    DecidedPair,
    balance_pair_lengths,
    draw,
    measure_length_bias,
)
from pipelines.preference_questions import ImageFolder, PromptSource, PromptToAnswer
from pipelines.review_results import replaced, write_review_json

PREFERENCES_FILE = "preferences.jsonl"
_MAX_EXAMPLES = 20
_MAX_LISTED = 50


@dataclass(frozen=True)
class MadePairs:
    """The pairs to write, and what is said of them."""

    pairs: Sequence[DecidedPair]
    summary: Mapping[str, Any]


def hash_recipe(config: PreferencesConfig) -> str:
    """Return 16 hex digits of all settings that decide which preferences come out.

    Without the models' paths: each record has their fingerprints, which do not depend on where they lie.
    """
    settings: dict[str, Any] = config.recipe_settings
    others = {key: value for key, value in settings["preferences"].items() if key != "models"}
    text = json.dumps(settings | {"preferences": others}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def summarize_preferences(
    config: PreferencesConfig,
    source: PromptSource,
    samplings: Sequence[SamplingJob],
    decisions: Decisions,
    counts: Counter[str],
) -> MadePairs:
    """Balance the decided pairs where that is asked for, and count everything."""
    decided, judgement, settings = list(decisions.pairs), decisions.judgement, config.preferences
    kept = balance_pair_lengths(decided, settings.seed) if settings.balance_lengths else decided
    if settings.balance_lengths:
        counts["dropped_for_length"] += len(decided) - len(kept)
    models = {job.model.path: job.model.fingerprint for job in samplings}
    summary = {
        "complete": not (judgement and judgement.stopped),
        "partial_because": judgement.stopped if judgement else "",
        "rule": settings.rule,
        "recipe": hash_recipe(config),
        "questions": source.total,
        "asked": len(source.prompts),
        "rejected": dict(sorted(source.reasons.items())),
        "counts": dict(sorted((name, num) for name, num in counts.items() if num)),
        "decided": len(decided),
        "written": len(kept),
        "questions_with_pairs": len({one.pair.question for one in kept}),
        "lengths": measure_length_bias(kept),
        "lengths_before_balancing": measure_length_bias(decided) if settings.balance_lengths else None,
        "order": dict(judgement.order) if judgement else None,
        "calls": dict(judgement.calls) if judgement else None,
        "judge_failures": dict(judgement.failures) if judgement else {},
        "dollars": judgement.dollars if judgement else 0.0,
        "models": models,
        "source": settings.benchmark or settings.data_path,
        "temperature": settings.temperature,
        "num_samples": settings.num_samples,
        "rejected_questions": list(source.rejected[:_MAX_LISTED]),
    }
    return MadePairs(kept, summary)


def preference_row(
    config: PreferencesConfig, prompt: PromptToAnswer, decided: DecidedPair, images: ImageFolder
) -> dict[str, Any]:
    """Return one record: TRL's conversational form, with its id, images and provenance."""
    chosen, rejected = decided.pair.first, decided.pair.second
    return {
        "id": f"{prompt.id}#{chosen.label}>{rejected.label}",
        "images": [images.name(image) for image in prompt.images],
        "prompt": prompt.prompt,
        "chosen": [{"role": "assistant", "content": _written(chosen)}],
        "rejected": [{"role": "assistant", "content": _written(rejected)}],
        "provenance": {
            "question": prompt.id,
            "source": prompt.source,
            "rule": config.preferences.rule,
            "recipe": hash_recipe(config),
            "chosen": {"kind": chosen.kind, "label": chosen.label, **chosen.origin},
            "rejected": {"kind": rejected.kind, "label": rejected.label, **rejected.origin},
            **decided.evidence,
        },
    }


def _written(answer: CandidateAnswer) -> str:
    """Return an answer as a record holds it: an image marker that a model wrote is text."""
    return break_markers(answer.text.strip())


def write_preferences(config: PreferencesConfig, source: PromptSource, made: MadePairs, folder: Path) -> Path:
    """Write all files; without any pair preferences.jsonl is removed, lest an older one be learnt from."""
    path = folder / PREFERENCES_FILE
    prompts, images = {prompt.id: prompt for prompt in source.prompts}, ImageFolder(folder)
    if made.pairs:
        with replaced(path) as fresh, fresh.open("w", encoding="utf-8") as file:
            for one in made.pairs:
                row = preference_row(config, prompts[one.pair.question], one, images)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    else:
        path.unlink(missing_ok=True)
    write_review_json(folder / "summary.json", made.summary)
    with replaced(folder / "resolved.json") as fresh:
        fresh.write_text(config.model_dump_json(indent=1) + "\n", encoding="utf-8")
    shown = sorted(made.pairs, key=lambda one: draw("example", one.pair.id))[:_MAX_EXAMPLES]
    examples = [_example(prompts[one.pair.question], one) for one in shown]
    write_report(folder / "report.html", preferences_report(f"Preferences: {folder.name}", made.summary, examples))
    return path


def _example(prompt: PromptToAnswer, decided: DecidedPair) -> PreferenceExample:
    local = [Path(image) if isinstance(image, str) else image for image in prompt.images if not _is_remote(image)]
    pictures = thumbnails(Question(prompt.id, prompt.question, tuple(local)))
    chosen, rejected = decided.pair.first, decided.pair.second
    why = ", ".join(f"{key} {value}" for key, value in decided.evidence.get("scores", {}).items())
    return PreferenceExample(
        prompt.id, prompt.question, chosen.text, rejected.text, (chosen.label, rejected.label), why, pictures
    )


def _is_remote(image: str | bytes) -> bool:
    return isinstance(image, str) and "://" in image


def log_preferences(config: PreferencesConfig, folder: Path, summary: Mapping[str, Any]) -> str | None:
    """Log settings, counts and files to MLflow, and return the run's id; the same folder and recipe are the same run.

    A failure is printed, since the files are written already.
    """
    from llava_ray.tracking import TrackedRun, default_tracking_uri, describe_page

    tracking = config.tracking
    try:
        uri = tracking.tracking_uri or default_tracking_uri(str(folder.parent))
        key, recipe = str(folder.resolve()), str(summary["recipe"])
        run = TrackedRun(uri, tracking.experiment_name, folder.name, key, tracking.parent_run_id, recipe)
        run.log_params(config.recipe_settings)
        run.log_steps({0: _figures(summary)})
        for name in (PREFERENCES_FILE, "summary.json", "report.html", "resolved.json"):
            if (folder / name).exists():
                run.log_file(str(folder / name))
        if (folder / "answers").is_dir():  # a preference's provenance names its answers in these files
            run.log_folder(str(folder / "answers"), "answers")
        tags = {f"model_{number}": f"{path} {mark}" for number, (path, mark) in enumerate(summary["models"].items())}
        tags |= {"kind": "preferences", "recipe": recipe, "complete": str(summary["complete"])}
        tags |= {"data": str(summary["source"])}
        run.log_tags({f"llava_ray.{name}": value for name, value in tags.items()})
        run.end()
        print(f"  mlflow   {describe_page(uri, run.run_id)}")
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - of its store, its files, its server
        print(f"  mlflow   not kept there: {describe_error(error)}")
        return None
    return run.run_id


def _figures(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a summary by name."""
    found = {f"preferences/{name}": summary[name] for name in ("questions", "asked", "decided", "written", "dollars")}
    for group in ("counts", "lengths", "order"):
        found |= {f"preferences/{group}/{name}": value for name, value in (summary[group] or {}).items()}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}

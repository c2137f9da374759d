"""What each stage of the loop runs with, and what may change between two starts of a loop."""

import json
from pathlib import Path
from typing import Any

from llava_ray.config.evaluate import EvaluateConfig
from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.improve import ImproveConfig
from llava_ray.config.preferences import PreferencesConfig
from llava_ray.config.recipes import differing_keys
from llava_ray.errors import ConfigError
from pipelines.preference_results import PREFERENCES_FILE
from pipelines.review_results import replaced

_OF_A_RUN = ("model", "data", "train", "preference", "lora", "held_out", "run", "tracking", "cluster")
# Of where, how long and how dearly the loop runs, not of what its rounds compute.
_CHANGEABLE_SECTIONS = {"run", "cluster", "tracking", "actors", "limits", "budget", "held_out"}
_CHANGEABLE = {
    "improve": {"rounds", "output", "min_gain"},
    "preferences": {"output", "ledger", "num_reviewers", "max_rejected"},
    "judge": {
        *("api_key_env", "timeout_s", "max_attempts", "patience_s", "batch_poll_s", "delivery"),
        *("input_dollars", "cached_input_dollars", "output_dollars"),
    },
}
RESOLVED = "resolved.json"


def claim_loop(config: ImproveConfig, folder: Path) -> None:
    """Save the settings in the loop's folder. Raises ConfigError if its rounds were made with others."""
    path = folder / RESOLVED
    made = ImproveConfig.parsed(config.model_dump()).model_dump(mode="json")  # as it is once it has been read back
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kept = ImproveConfig.parsed(found).model_dump(mode="json")  # with the defaults of settings added since
    except FileNotFoundError:
        kept = None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} holds no settings ({error}): choose another improve.output") from error
    if kept is not None and (changed := differing_keys(_comparable_loop(kept), _comparable_loop(made))):
        raise ConfigError(
            f"{folder} has rounds made with other settings ({'; '.join(changed)}): restore them to go on, or choose "
            "another improve.output (with preferences.ledger set to this folder's ledger.jsonl, no call is paid again)"
        )
    with replaced(path) as fresh:
        fresh.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def _comparable_loop(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that must not change."""
    sections = {name: values for name, values in settings.items() if name not in _CHANGEABLE_SECTIONS}
    for name, keys in _CHANGEABLE.items():
        if isinstance(sections.get(name), dict):
            sections[name] = {key: value for key, value in sections[name].items() if key not in keys}
    return sections


def evaluation_settings(config: ImproveConfig, model: str, place: Path, tracking: dict[str, Any]) -> EvaluateConfig:
    """Return the settings of the evaluation of a model in the folder of its round."""
    improve, is_start = config.improve, model == config.model.model_name_or_path
    asking: dict[str, Any] = {
        "model_path": model,
        "version": config.model.version,
        "benchmarks": (improve.benchmark,),
        "max_questions": improve.max_held_out,
        "max_new_tokens": improve.max_new_tokens,
        "batch_size": improve.batch_size,
    }
    parts = {key: getattr(config.model, key) for key in ("model_base", "vision_tower")} if is_start else {}
    return EvaluateConfig.parsed(
        {
            "evaluate": asking | parts,
            "score": {"profile": improve.profile},
            "actors": config.actors.model_dump(),
            "run": {"name": "evaluate", "storage_path": str(place)},
            "tracking": _mlflow_alone(config) | tracking,
            "cluster": config.cluster.model_dump(),
        }
    )


def _mlflow_alone(config: ImproveConfig) -> dict[str, Any]:
    """Return the tracking settings of stages other than training."""
    return config.tracking.model_dump() | {"report_to": ("mlflow",)}


def preference_settings(
    config: ImproveConfig, number: int, total: int, model: str, tracking: dict[str, Any]
) -> PreferencesConfig:
    """Return the settings of the preferences of a round: its slice of the ``total`` questions, with its own seed."""
    section, folder = config.preferences, Path(config.improve.output)
    is_start = model == config.model.model_name_or_path
    parts = {key: getattr(config.model, key) for key in ("model_base", "vision_tower")} if is_start else {}
    given = {key: value for key, value in section.model_dump().items() if key in ("model_base", "vision_tower")}
    changes = {
        "models": (model, *section.models),
        "version": section.version or config.model.version,
        "skip_questions": section.skip_questions + find_slice(section.max_questions, total, number),
        "seed": section.seed + number - 1,
        "output": str(folder / f"round-{number}" / "preferences"),
        "ledger": section.ledger or str(folder / "ledger.jsonl"),
        **{key: given[key] or value for key, value in parts.items()},
    }
    return PreferencesConfig.parsed(
        {
            "preferences": section.model_dump() | changes,
            **{name: getattr(config, name).model_dump() for name in ("judge", "limits", "budget", "actors", "cluster")},
            "tracking": _mlflow_alone(config) | tracking,
        }
    )


def find_slice(per_round: int | None, total: int, number: int) -> int:
    """Return the place of a round's first question: slices follow one another, and begin again after the last."""
    if per_round is None or total <= per_round:
        return 0
    return (number - 1) % -(-total // per_round) * per_round


def tuning_settings(config: ImproveConfig, number: int, model: str, tracking: dict[str, Any]) -> FinetuneConfig:
    """Return the settings of the tuning of a round, from its own preferences."""
    place = Path(config.improve.output) / f"round-{number}"
    values = {name: getattr(config, name).model_dump() for name in _OF_A_RUN}
    values["model"] |= {"model_name_or_path": model}
    if model != config.model.model_name_or_path:  # a bundle has all its parts
        values["model"] |= {"model_base": None, "vision_tower": None}
    values["data"] |= {"data_path": str(place / "preferences" / PREFERENCES_FILE), "kind": "preferences"}
    values["train"] |= {"seed": config.train.seed + number - 1}
    values["run"] |= {"name": "tune", "storage_path": str(place)}
    values["tracking"] |= tracking
    return FinetuneConfig.parsed(values)

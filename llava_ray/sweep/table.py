"""A sweep's trials as lines of text, for a terminal. Pure."""

from collections.abc import Sequence

from llava_ray.sweep.sampling import TrialSettings
from llava_ray.sweep.trials import Trial

_MARKS = {"finished": "done", "stopped": "stopped early"}


def short_key(key: str) -> str:
    """Return a setting's name without its section."""
    return key.rpartition(".")[2]


def _format_value(value: object) -> str:
    """Format a value in short form."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe_settings(settings: TrialSettings) -> str:
    """Format settings in one line."""
    return ", ".join(f"{short_key(key)} {_format_value(value)}" for key, value in settings.items())


def describe_state(trial: Trial) -> str:
    """Describe a trial's state, with the reason of a failure."""
    reason = f": {trial.reason}" if trial.reason else ""
    return _MARKS.get(trial.state, trial.state) + reason


def format_table(trials: Sequence[Trial], num_steps: int, width: int = 120) -> list[str]:
    """Format a line for each trial under a header, at most ``width`` characters each."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.settings))
    header = ["", *map(short_key, keys), "seed", "step", "loss", "accuracy", "s", ""]
    rows = [header, *(_format_row(trial, keys, num_steps) for trial in trials)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header) - 1)]
    lines = []
    for row in rows:
        cells = [cell.rjust(size) for cell, size in zip(row[:-1], widths, strict=True)]
        lines.append("  ".join([*cells, row[-1]])[:width].rstrip())
    return lines


def _format_row(trial: Trial, keys: Sequence[str], num_steps: int) -> list[str]:
    """Format a trial's cells."""
    last = trial.curve[-1] if trial.curve else None
    accuracy = last.held_out_accuracy if last else None
    return [
        str(trial.number),
        *(_format_value(trial.settings[key]) if key in trial.settings else "-" for key in keys),
        str(trial.seed),
        f"{trial.steps}/{num_steps}",
        f"{last.held_out_loss:.4f}" if last else "-",
        f"{accuracy:.1%}" if accuracy is not None else "-",
        f"{trial.seconds:.0f}",
        describe_state(trial),
    ]

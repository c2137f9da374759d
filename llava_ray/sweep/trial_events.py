"""The driver's eyes: every event of Tune goes into the ledger, to MLflow and to the terminal."""

import shutil
import sys
import time
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial as TuneTrial

from llava_ray.sweep.ledger import TrialLedger
from llava_ray.sweep.table import describe_settings, format_table, describe_state
from llava_ray.sweep.trial import ENDED_KEY, REASON, parse_trial_arguments, run_name
from llava_ray.sweep.trials import ACCURACY, LOSS, Evaluation, Trial
from llava_ray.tracking import TrackedRun

_SECONDS_BETWEEN_TABLES = 1.0


class TrialEventRecorder(Callback):
    """Keep the ledger of a sweep. Tune pickles it with the sweep's state, so it reads the ledger when it starts."""

    def __init__(self, folder: str, base_seed: int, num_steps: int, tracked: dict[str, str] | None) -> None:
        """Know where the ledger lies; ``tracked`` says how trials' runs are found in MLflow, None for not at all."""
        self.folder = folder
        self.base_seed = base_seed
        self.num_steps = num_steps
        self.tracked = tracked
        self.ledger: TrialLedger | None = None
        self.screen = Screen()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the ledger where it is."""
        return self.__dict__ | {"ledger": None, "screen": Screen()}

    def setup(self, **info: Any) -> None:
        """Read the ledger of an earlier start."""
        del info
        self.ledger = TrialLedger(self.folder)

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Note a start, or a new one."""
        del iteration, trials, info
        settings, seed = parse_trial_arguments(trial.config, self.base_seed)
        assert self.ledger is not None
        self.show(self.ledger.start(run_name_of(trial), settings, seed))

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        """Note a look, or how the trial ends itself."""
        del iteration, trials, info
        assert self.ledger is not None
        if LOSS in result:
            look = Evaluation(result["step"], result[LOSS], result.get(ACCURACY))
            self.show(self.ledger.add_evaluation(run_name_of(trial), look))
        if ENDED_KEY in result:
            self.show(self.ledger.end(run_name_of(trial), result[ENDED_KEY], result[REASON]))

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Note a trial that did not end by itself: the scheduler has stopped it."""
        del iteration, trials, info
        assert self.ledger is not None
        name = run_name_of(trial)
        if self.ledger.trials[name].state == "running":
            close_run(self.folder, name, self.tracked)
            self.show(self.ledger.end(name, "stopped"))

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Note a trial that failed once more than it may."""
        del iteration, trials, info
        assert self.ledger is not None
        error = trial.get_error()
        cause = getattr(error, "cause", None) or error
        close_run(self.folder, run_name_of(trial), self.tracked)
        self.show(self.ledger.end(run_name_of(trial), "failed", f"{type(cause).__name__}: {_first_line(str(cause))}"))

    def show(self, trial: Trial) -> None:
        """Draw all trials, or say what this one does."""
        assert self.ledger is not None
        self.screen.show(trial, list(self.ledger.trials.values()), self.num_steps)


class Screen:
    """A terminal whose table is drawn over the last one; a line for each event where there is no terminal."""

    def __init__(self) -> None:
        """Begin below what is there."""
        self.num_lines = 0
        self.drawn = 0.0

    def show(self, trial: Trial, trials: list[Trial], num_steps: int) -> None:
        """Show an event."""
        if not sys.stdout.isatty():
            last = trial.curve[-1] if trial.curve else None
            looked = f", held-out loss {last.held_out_loss:.4f}" if last else ""
            line = f"trial {trial.number} ({describe_settings(trial.settings)}): {trial.steps}/{num_steps}{looked}"
            print(f"{line}, {describe_state(trial)}", flush=True)  # noqa: T201 - said to the person who started the sweep
            return
        running = any(one.state == "running" for one in trials)
        if running and time.monotonic() - self.drawn < _SECONDS_BETWEEN_TABLES:
            return
        size = shutil.get_terminal_size()
        lines = format_table(trials, num_steps, size.columns)[-(size.lines - 1) :]
        up = f"\x1b[{self.num_lines}A" if self.num_lines else ""
        sys.stdout.write(up + "".join(f"\x1b[2K{line}\n" for line in lines))
        sys.stdout.flush()
        self.num_lines, self.drawn = len(lines), time.monotonic()


def run_name_of(trial: TuneTrial) -> str:
    """Return the name of a trial's run."""
    return run_name(trial.config, trial.trial_id)


def close_run(folder: str, name: str, tracked: dict[str, str] | None) -> None:
    """End the MLflow run of a trial whose processes can no longer do it."""
    if tracked is not None:
        TrackedRun(**tracked, name=name, key=f"{folder}/trials/{name}").end("KILLED")


def _first_line(text: str) -> str:
    """Return a text's first line that says something."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")

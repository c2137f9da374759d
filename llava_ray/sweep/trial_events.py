"""Recording of Tune's events in the ledger, in MLflow and on the terminal."""

import shutil
import sys
import time
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial as TuneTrial

from llava_ray.sweep.ledger import TrialLedger
from llava_ray.sweep.table import describe_settings, describe_state, format_table
from llava_ray.sweep.trial import ENDED_KEY, REASON, parse_trial_arguments, run_name
from llava_ray.sweep.trials import ACCURACY, LOSS, Evaluation, Trial
from llava_ray.tracking import TrackedRun

_SECONDS_BETWEEN_TABLES = 1.0


class TrialEventRecorder(Callback):
    """Records a sweep's trials in its ledger. Tune pickles it with the sweep's state, so ``setup`` loads the ledger."""

    def __init__(self, folder: str, base_seed: int, num_steps: int, tracked: dict[str, str] | None) -> None:
        """Initialise with the ledger's folder; ``tracked`` holds the MLflow settings of trials, None without MLflow."""
        self.folder = folder
        self.base_seed = base_seed
        self.num_steps = num_steps
        self.tracked = tracked
        self.ledger: TrialLedger | None = None
        self.screen = Screen()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the ledger and the screen."""
        return self.__dict__ | {"ledger": None, "screen": Screen()}

    def setup(self, **info: Any) -> None:
        """Load the ledger of an earlier start."""
        del info
        self.ledger = TrialLedger(self.folder)

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Record the start or restart of a trial."""
        del iteration, trials, info
        settings, seed = parse_trial_arguments(trial.config, self.base_seed)
        assert self.ledger is not None
        self.show(self.ledger.start(run_name_of(trial), settings, seed))

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        """Record an evaluation, or the end of a trial."""
        del iteration, trials, info
        assert self.ledger is not None
        if LOSS in result:
            evaluation = Evaluation(result["step"], result[LOSS], result.get(ACCURACY))
            self.show(self.ledger.add_evaluation(run_name_of(trial), evaluation))
        if ENDED_KEY in result:
            self.show(self.ledger.end(run_name_of(trial), result[ENDED_KEY], result[REASON]))

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Record a trial that the scheduler has stopped."""
        del iteration, trials, info
        assert self.ledger is not None
        name = run_name_of(trial)
        if self.ledger.trials[name].state == "running":
            close_run(self.folder, name, self.tracked)
            self.show(self.ledger.end(name, "stopped"))

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Record a trial that failed more often than allowed."""
        del iteration, trials, info
        assert self.ledger is not None
        error = trial.get_error()
        cause = getattr(error, "cause", None) or error
        close_run(self.folder, run_name_of(trial), self.tracked)
        self.show(self.ledger.end(run_name_of(trial), "failed", f"{type(cause).__name__}: {_first_line(str(cause))}"))

    def show(self, trial: Trial) -> None:
        """Show an event of a trial on the screen."""
        assert self.ledger is not None
        self.screen.show(trial, list(self.ledger.trials.values()), self.num_steps)


class Screen:
    """The output of a sweep: a table redrawn in place on a terminal, else a line per event."""

    def __init__(self) -> None:
        """Initialise below the existing output."""
        self.num_lines = 0
        self.drawn = 0.0

    def show(self, trial: Trial, trials: list[Trial], num_steps: int) -> None:
        """Print an event, or redraw the table."""
        if not sys.stdout.isatty():
            last = trial.curve[-1] if trial.curve else None
            loss = f", held-out loss {last.held_out_loss:.4f}" if last else ""
            line = f"trial {trial.number} ({describe_settings(trial.settings)}): {trial.steps}/{num_steps}{loss}"
            print(f"{line}, {describe_state(trial)}", flush=True)  # noqa: T201 - for the person who started the sweep
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
    """End the MLflow run of a trial whose processes are gone."""
    if tracked is not None:
        TrackedRun(**tracked, name=name, key=f"{folder}/trials/{name}").end("KILLED")


def _first_line(text: str) -> str:
    """Return a text's first line that is not empty."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")

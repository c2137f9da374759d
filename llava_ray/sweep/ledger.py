"""A sweep's trials on storage: ``trials.json``, rewritten after every event by the driver alone."""

import json
import time

from llava_ray.data.storage import read_stored, write_stored
from llava_ray.errors import CheckpointError
from llava_ray.sweep.sampling import TrialSettings
from llava_ray.sweep.trials import ENDED, Evaluation, Trial, TrialState

LEDGER = "trials.json"


class TrialLedger:
    """All started trials, by id, in order of their first start."""

    def __init__(self, folder: str) -> None:
        """Load the trials of earlier starts of this sweep. Raises CheckpointError if the file is unreadable."""
        self.path = f"{folder}/{LEDGER}"
        self.trials = {trial.id: trial for trial in read_ledger(folder)}
        self._started: dict[str, float] = {}

    def start(self, name: str, settings: TrialSettings, seed: int) -> Trial:
        """Record the start of a trial, the first one or a restart."""
        trial = self.trials.setdefault(name, Trial(name, len(self.trials) + 1, settings, seed))
        trial.state, trial.reason = "running", ""
        trial.attempts += 1
        self._started[name] = time.monotonic()
        self.write()
        return trial

    def add_evaluation(self, name: str, evaluation: Evaluation) -> Trial:
        """Record a trial's evaluation."""
        trial = self.trials[name]
        trial.add_evaluation(evaluation)
        self.count_time(trial)
        self.write()
        return trial

    def end(self, name: str, state: TrialState, reason: str = "") -> Trial:
        """Record the end of a trial."""
        trial = self.trials[name]
        trial.state, trial.reason = state, reason
        self.count_time(trial)
        self._started.pop(name, None)
        self.write()
        return trial

    def count_time(self, trial: Trial) -> None:
        """Add the seconds since the last event to a running trial's time."""
        now = time.monotonic()
        trial.seconds = round(trial.seconds + now - self._started.get(trial.id, now), 1)
        self._started[trial.id] = now

    def write(self) -> None:
        """Write all trials."""
        write_stored(self.path, json.dumps([trial.to_dict() for trial in self.trials.values()], indent=1).encode())


def read_ledger(folder: str) -> list[Trial]:
    """Load the trials of a sweep's folder. Raises CheckpointError if the file is unreadable."""
    try:
        return [Trial.from_dict(values) for values in json.loads(read_stored(f"{folder}/{LEDGER}"))]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{folder}/{LEDGER} cannot be read ({error}): restore it from a backup, or start over with "
            "--run.restart True (the old folder is moved aside)"
        ) from error


def list_unfinished(trials: list[Trial]) -> list[Trial]:
    """Return the trials that have not ended."""
    return [trial for trial in trials if trial.state not in ENDED]

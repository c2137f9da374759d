"""Weights & Biases and TensorBoard beside MLflow: settings and metrics of a run, written from the same process.

Their libraries are extras and imported only where a run asks for them.
"""

import hashlib
import importlib.util
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from llava_ray.errors import ConfigError

# What each tracker imports, by its name in tracking.report_to.
_LIBRARIES = {"wandb": "wandb", "tensorboard": "tensorboardX"}
_WANDB_PREFIX = "WANDB_"  # of the environment variables that choose its server, its mode and the user


class Tracker(Protocol):
    """A place that a run's settings and metrics go to."""

    def log_steps(self, steps: Mapping[int, Mapping[str, float]]) -> None:
        """Log the metrics of several steps."""
        ...

    def end(self, status: str) -> None:
        """Close the run: FINISHED, FAILED or KILLED."""
        ...


class WandbRun:
    """One run in Weights & Biases, which a later start goes on with."""

    def __init__(self, run_folder: str, name: str, project: str, params: Mapping[str, Any]) -> None:
        """Create the run, or attach to the one of this run's folder."""
        import wandb

        local = None if "://" in run_folder else run_folder
        # Its id follows from the folder, so that a start on another day goes on with the same run.
        key = hashlib.sha256(run_folder.encode()).hexdigest()[:16]
        self.run = wandb.init(
            project=project,
            name=name,
            id=key,
            resume="allow",
            config=dict(params),
            dir=local,
            settings=wandb.Settings(console="off", silent=True),
        )

    def log_steps(self, steps: Mapping[int, Mapping[str, float]]) -> None:
        """Log the metrics of several steps; those of a repeated step stand there already."""
        for step, metrics in sorted(steps.items()):
            self.run.log(dict(metrics), step=step)

    def end(self, status: str) -> None:
        """Upload what is left and close the run."""
        self.run.finish(exit_code=0 if status == "FINISHED" else 1)


class TensorBoardRun:
    """Event files in the run's folder, for ``tensorboard --logdir``."""

    def __init__(self, run_folder: str, name: str, project: str, params: Mapping[str, Any]) -> None:
        """Open a new event file: TensorBoard shows all of a folder as one run."""
        from tensorboardX import SummaryWriter

        del name, project
        # Files are named after the second: two starts in one must not share a name.
        self.writer = SummaryWriter(f"{run_folder}/tensorboard", filename_suffix=f".{uuid.uuid4().hex[:8]}")
        self.writer.add_text("settings", "\n".join(f"    {line}" for line in _lines(params)))

    def log_steps(self, steps: Mapping[int, Mapping[str, float]]) -> None:
        """Log the metrics of several steps."""
        for step, metrics in sorted(steps.items()):
            for key, value in metrics.items():
                self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def end(self, status: str) -> None:
        """Close the file."""
        del status
        self.writer.close()


_TRACKERS: dict[str, Callable[[str, str, str, Mapping[str, Any]], Tracker]] = {
    "wandb": WandbRun,
    "tensorboard": TensorBoardRun,
}


def check_trackers(names: Sequence[str], storage_path: str) -> None:
    """Raise ConfigError unless the trackers of tracking.report_to can be used from this machine."""
    for name in names:
        if name in _LIBRARIES and importlib.util.find_spec(_LIBRARIES[name]) is None:
            raise ConfigError(
                f"tracking.report_to names {name!r}, but {_LIBRARIES[name]} is not installed: "
                f"pip install 'llava_ray[{name}]', or leave it out"
            )
    if "tensorboard" in names and "://" in storage_path:
        raise ConfigError(
            f"tracking.report_to names 'tensorboard', which writes files beside the run, but run.storage_path = "
            f"{storage_path!r} is no folder; leave it out: MLflow has the same metrics"
        )
    online = os.environ.get("WANDB_MODE", "online") in ("online", "shared")
    if "wandb" in names and online and not os.environ.get("WANDB_API_KEY"):
        import wandb

        # What wandb login has stored, without a call to the server.
        if not wandb.api.api_key:
            raise ConfigError(
                "tracking.report_to names 'wandb', but nobody is logged in there: run wandb login or set "
                "WANDB_API_KEY; WANDB_MODE=offline keeps the metrics here for wandb sync"
            )


def wandb_environment() -> dict[str, str]:
    """Return the variables that wandb reads: the process that logs is started by Ray, which does not pass them on."""
    return {key: value for key, value in os.environ.items() if key.startswith(_WANDB_PREFIX)}


def open_trackers(
    names: Sequence[str], run_folder: str, project: str, params: Mapping[str, Any], environment: Mapping[str, str]
) -> list[Tracker]:
    """Open the trackers of tracking.report_to that are named, except MLflow."""
    os.environ.update(environment)
    name = Path(run_folder).name
    return [_TRACKERS[one](run_folder, name, project, params) for one in names if one in _TRACKERS]


def _lines(params: Mapping[str, Any]) -> list[str]:
    """Return settings as lines of ``section.key = value``."""
    return [f"{section}.{key} = {value}" for section, values in params.items() for key, value in dict(values).items()]

"""The early end of a run: Ctrl-C and SIGTERM, which let it save first, and workers that failed too often."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError
from ray.train import TrainingFailedError
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from llava_ray.errors import CheckpointError, Stopped
from llava_ray.forked_worker import SERVER_VARIABLE
from llava_ray.local_ray import NO_DASHBOARD_VARIABLE
from llava_ray.log_file import terminal
from llava_ray.train.failures import EndAtOnce, translate_error
from llava_ray.train.run_recorder import TRAINING, RunProgress
from llava_ray.train.runs import RunFolder, committed_step, repair_run

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE_S = 5.0  # for the recorder's answer while the user waits for the run to stop
_SAVING = "Stopping after the current step, with a checkpoint. Press Ctrl-C again to exit at once."


class Stopping:
    """Handle signals: the first lets training workers save a checkpoint, the next ends them at once."""

    def __init__(self, journal: ActorHandle) -> None:
        """Store the recorder to notify."""
        self.journal = journal
        self.received: list[int] = []

    def listen(self, controller: ActorHandle) -> None:
        """Install the signal handlers; the second signal aborts the run through Ray's ``controller``."""

        def on_signal(number: int, frame: FrameType | None) -> None:
            del frame
            self.received.append(number)
            if len(self.received) == 1 and self.is_training():
                self.journal.stop.remote()
                print(f"\n{_SAVING}", file=terminal(), flush=True)
            elif len(self.received) <= 2:
                with contextlib.suppress(RayActorError):  # it exits while it aborts
                    ray.get(controller.abort.remote())
                sys.exit(0)
            else:
                sys.exit(0)

        for number in _SIGNALS:
            signal.signal(number, on_signal)

    def is_training(self) -> bool:
        """Return whether the workers are training, so that there is something to save."""
        try:
            progress: RunProgress = ray.get(self.journal.progress.remote(), timeout=_PATIENCE_S)
        except RayError:
            return False
        return progress.state == TRAINING

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """Restore the previous signal handlers at the end of the block."""
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                # Only the main thread may set handlers; a sweep's trials run in others, and install none.
                with contextlib.suppress(ValueError):
                    signal.signal(number, handler)


class LocalWorkerGroup(WorkerGroup):
    """Ray's group of workers without a runtime environment, where all processes have the driver's own anyway."""

    def _get_worker_runtime_env(self, custom_runtime_env: Any) -> dict[str, Any]:
        return dict(custom_runtime_env)


class LocalController(TrainController):
    """Ray's controller with such workers."""

    worker_group_cls = LocalWorkerGroup


class StoppableTrainer(DataParallelTrainer):
    """Ray's trainer with our handling of Ctrl-C; its own kills the workers wherever they are."""

    stopping: Stopping

    def _create_default_callbacks(self) -> list[Any]:
        """Return Ray's callbacks, without the one that asks a dashboard for ten seconds where there is none.

        It frees the resources of a run whose controller has died. Without a dashboard, the cluster ends with the run.
        """
        callbacks = super()._create_default_callbacks()
        if NO_DASHBOARD_VARIABLE in os.environ:
            callbacks = [one for one in callbacks if not isinstance(one, PlacementGroupCleanerCallback)]
        return callbacks

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        """Start the controller as Ray does; in a local cluster without a runtime environment, a start of its own."""
        settings["failure_policy"] = EndAtOnce(self.run_config.failure_config)
        if SERVER_VARIABLE not in os.environ:
            return super()._initialize_and_run_controller(**settings)
        controller = ray.remote(num_cpus=0)(LocalController).remote(**settings)
        if threading.current_thread() is threading.main_thread():  # a sweep's trials run in others
            self._register_sigint_handler(controller)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())

    def _register_sigint_handler(self, controller: Any) -> None:
        self.stopping.listen(controller)


def fit(trainer: StoppableTrainer, run: RunFolder, journal: ActorHandle, until: int) -> None:
    """Run the trainer up to the step ``until``, and translate worker failures to our own errors.

    Raises Stopped after a signal, once the workers are gone.
    """
    trainer.stopping = Stopping(journal)
    try:
        with trainer.stopping.restoring():
            trainer.fit()
    except (SystemExit, RayError, TrainingFailedError) as error:
        if trainer.stopping.received or isinstance(error, SystemExit):
            raise stopped(trainer.stopping, run, until) from error
        raise translate_error(error, run.name, journal) from error
    progress: RunProgress = ray.get(journal.progress.remote())
    if progress.failure is not None:
        raise progress.failure
    if trainer.stopping.received and committed_step(run.storage_path, run.name) < until:
        raise stopped(trainer.stopping, run, until)


def stopped(stopping: Stopping, run: RunFolder, until: int) -> Stopped:
    """Return the exception to raise after a signal, which says where the run resumes."""
    with contextlib.suppress(CheckpointError):  # torn snapshot: reported by the next start
        repair_run(run)
    step = committed_step(run.storage_path, run.name)
    number = stopping.received[0] if stopping.received else signal.SIGINT
    if not step:
        return Stopped("Stopped before the first checkpoint. The same command starts at the first step.", number)
    with contextlib.suppress(RayError):
        done = ray.get(stopping.journal.progress.remote(), timeout=_PATIENCE_S).done
        if done > step:
            lost = f"the last checkpoint: {done - step} step(s) after it are repeated."
            return Stopped(f"Stopped. The same command resumes from step {step} of {until}, {lost}", number)
    return Stopped(f"Stopped. The same command resumes from step {step} of {until}; its checkpoint is saved.", number)

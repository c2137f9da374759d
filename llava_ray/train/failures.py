"""What failed workers' errors mean, in words, and which of them is the cause: the others only lost a peer."""

import contextlib
from collections.abc import Mapping

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError
from ray.train import UserCallback, WorkerGroupError
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.exceptions import TrainingFailedError

from llava_ray.errors import (
    ConfigError,
    DivergedError,
    LlavaRayError,
    ModelError,
    RecordError,
    TemplateError,
    TrainingError,
)

_PATIENCE_S = 5.0  # for the recorder's answer
_MAX_SHOWN = 600  # characters of an error that is not ours

# What Ray's memory monitor says of a worker that it ended.
_MEMORY_MONITOR = ("running low on memory", "OutOfMemory", "memory monitor")
# What a collective says when its peer is gone: a consequence, not a cause.
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "ncclRemoteError", "gloo")
SAVE_MEMORY = (
    "to need less, lower train.tokens_per_micro_batch (the row's length; never below train.model_max_length), set "
    "train.gradient_checkpointing = true, raise train.zero_stage, train.offload_optimizer = true, or train an adapter "
    "(lora.lora_enable)"
)


# Errors that a worker meets again however often it is started. Others may pass: a disk that is full, a store that does
# not answer (DataError, CheckpointError), memory that another process took (TrainingError).
_PERMANENT = (ConfigError, ModelError, TemplateError, RecordError, DivergedError)


class EndAtOnce(DefaultFailurePolicy):
    """Ray Train's count of tolerated failures, which ends a run at once where new workers would fail again."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Return whether workers are started again, or the run ends with the error."""
        if isinstance(training_failed_error, WorkerGroupError):
            cause = find_cause(training_failed_error.worker_failures)[1]
            if isinstance(cause, _PERMANENT):
                return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class FailureTeller(UserCallback):
    """Tell the person who started the run why workers failed, before Ray Train replaces them."""

    def __init__(self, journal: ActorHandle) -> None:
        """Store the recorder, which passes lines on."""
        self.journal = journal

    def after_exception(self, run_context: object, worker_exceptions: Mapping[int, Exception]) -> None:
        """Say what happened to which rank; Ray's controller calls this and must not wait."""
        del run_context
        self.journal.tell_failure.remote(*describe_failure(worker_exceptions))


def describe_failure(errors: Mapping[int, BaseException]) -> tuple[int, str]:
    """Return the rank that failed first, as far as errors show, and why in words."""
    rank, error = find_cause(errors)
    text = str(error)
    if isinstance(error, LlavaRayError):
        return rank, f"rank {rank}: {text}"
    if any(words in text for words in _MEMORY_MONITOR):
        return rank, f"Ray ended the worker of rank {rank} because its node ran out of memory; {SAVE_MEMORY}"
    if is_death(error):
        return rank, (
            f"the worker of rank {rank} died without a word: somebody killed it, it crashed, or the kernel ended it "
            f"because its node ran out of memory; against that, {SAVE_MEMORY}"
        )
    if "health check has been hanging" in text:
        return (
            rank,
            f"the worker of rank {rank} does not answer: it is stopped, swapped out or cut off from the network",
        )
    return rank, f"the worker of rank {rank} failed: {type(error).__name__}: {text[:_MAX_SHOWN]}"


def find_cause(errors: Mapping[int, BaseException]) -> tuple[int, BaseException]:
    """Return the rank and the error that the others' follow from: our own, then deaths, then lost peers."""
    causes = [(rank, getattr(error, "_base_exc", error)) for rank, error in sorted(errors.items())]

    def weight(cause: tuple[int, BaseException]) -> int:
        error = cause[1]
        if isinstance(error, LlavaRayError):
            return 0
        if any(words in str(error) for words in _LOST_PEER) and not is_death(error):
            return 3
        return 1 if is_death(error) else 2

    return min(causes, key=weight)


def translate_error(error: BaseException, name: str, journal: ActorHandle) -> LlavaRayError:
    """Return the worker's own error where it is one of ours, or else a TrainingError with the remedy."""
    if not isinstance(error, WorkerGroupError):
        return TrainingError(f"run {name!r} stopped: {error}; start it again to resume")
    cause = find_cause(error.worker_failures)[1]
    if isinstance(cause, LlavaRayError):
        return cause
    with contextlib.suppress(RayError):  # it may be gone with the cluster
        told = ray.get(journal.tell_failure.remote(*describe_failure(error.worker_failures)), timeout=_PATIENCE_S)
        return _too_many(name, told)
    return _too_many(name, describe_failure(error.worker_failures)[1])


def _too_many(name: str, told: str) -> TrainingError:
    """Return the error for a run whose workers failed too often, the last time for the reason told."""
    return TrainingError(
        f"run {name!r} stopped after too many worker failures. The last: {told}. It resumes from its last checkpoint "
        "when started again; run.max_failures sets how many failures are tolerated"
    )


def is_death(error: BaseException) -> bool:
    """Return whether an error says that a worker's process has gone."""
    return isinstance(error, RayActorError) or isinstance(getattr(error, "health_check_failure", None), RayActorError)

"""The exceptions llava_ray raises, in one tree.

    LlavaRayError
    ├── ConfigError        a recipe, flag or run name that cannot be used
    │   └── BudgetError    a budget that the next call does not fit into
    ├── DataError          something wrong with the data set as a whole
    │   ├── NoPairsError   answers of which no pair is a preference
    │   └── RecordError    one record that cannot be trained on; names the record
    │       └── ImageError one image that cannot be read or is refused; names the image
    ├── TemplateError      a conversation that a template cannot render
    ├── ModelError         parts of a model that are missing or do not fit
    │   └── BundleError    a model folder that is not what its manifest says
    ├── BusyError          a request that an engine has no room for now
    ├── CheckpointError    a training state that cannot be written or resumed
    ├── TrainingError      a step that cannot be taken (no supervised token)
    │   └── DivergedError  a loss that is not finite; the same settings would reach it again
    └── JudgeError         a request to a judge that brought no review

Each message says what was found, where, and what to do. Every class is a ``ValueError`` or ``RuntimeError``
as well, so that callers who do not import llava_ray still catch the right family. ``Stopped`` stands outside the tree:
a run that was asked to stop has not failed.
"""

import signal


class LlavaRayError(Exception):
    """The base of every error that llava_ray itself raises."""


class ConfigError(LlavaRayError, ValueError):
    """A recipe, flag or run name that cannot be used."""


class BudgetError(ConfigError):
    """A budget that the next call does not fit into."""


class DataError(LlavaRayError, ValueError):
    """A fault of a data set as a whole."""


class NoPairsError(DataError):
    """Answers of which no pair is a preference."""


class RecordError(DataError):
    """One record that cannot be trained on; ``reason`` is a short machine-readable code that reports count."""

    def __init__(self, message: str, *, reason: str, field: str | None = None) -> None:
        """Store ``reason`` beside the message, so that reports can count by it; ``field`` is a request's field."""
        super().__init__(message)
        self.reason = reason
        self.field = field

    def __reduce__(self) -> tuple[object, ...]:
        """Survive pickling between Ray processes in spite of the keyword argument."""
        return (_rebuild, (type(self), str(self), self.reason, self.field))


class ImageError(RecordError):
    """One image that cannot be read or is refused."""


class TemplateError(LlavaRayError, ValueError):
    """A conversation that a template cannot render."""


class ModelError(LlavaRayError, ValueError):
    """Parts of a model that are missing or do not fit together."""


class BusyError(LlavaRayError, RuntimeError):
    """A request that an engine has no room for now; the same one may find room later."""


class BundleError(ModelError):
    """A model folder that is not what its manifest says."""


class CheckpointError(LlavaRayError, RuntimeError):
    """A training state that cannot be written or resumed."""


class TrainingError(LlavaRayError, RuntimeError):
    """A step that cannot be taken: no supervised token, or a loss that is not finite."""


class DivergedError(TrainingError):
    """A loss that is not finite: a restart with the same settings would reach it again."""


class JudgeError(LlavaRayError, RuntimeError):
    """A request to a judge that returned no review."""


class Stopped(KeyboardInterrupt):
    """A run that was asked to stop, by Ctrl-C or SIGTERM, and did; the message says what was saved."""

    def __init__(self, message: str = "", signal_number: int = signal.SIGINT) -> None:
        """Derive the exit code from the signal, as shells expect it (128 + number)."""
        super().__init__(message)
        self.exit_code = 128 + signal_number


def _rebuild(kind: type[RecordError], message: str, reason: str, field: str | None = None) -> RecordError:
    return kind(message, reason=reason, field=field)

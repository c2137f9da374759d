"""The exceptions llava_ray raises, in one tree.

    LlavaRayError
    ├── ConfigError        a recipe, flag or run name that cannot be used
    ├── DataError          something wrong with the data set as a whole
    │   └── RecordError    one record that cannot be learnt from; names the record
    │       └── ImageError one image that cannot be read or is refused; names the image
    ├── TemplateError      a conversation that a template cannot render
    ├── ModelError         parts of a model that are missing or do not fit
    │   └── BundleError    a model folder that is not what its manifest says
    ├── CheckpointError    a training state that cannot be written or resumed
    ├── TrainingError      a step that cannot be taken (nothing to learn)
    │   └── DivergedError  a loss that is not finite; the same settings would come to it again
    └── JudgeError         a request to a judge that brought no review

Each message says what was found, where, and what to do. Every class is a ``ValueError`` or ``RuntimeError``
as well, so callers that know nothing of llava_ray still catch the right family. ``Stopped`` is none of them: a run
that was asked to stop has not failed.
"""

import signal


class LlavaRayError(Exception):
    """Anything that llava_ray itself refuses or cannot do."""


class ConfigError(LlavaRayError, ValueError):
    """A recipe, flag or run name that cannot be used."""


class DataError(LlavaRayError, ValueError):
    """Something wrong with a data set as a whole."""


class RecordError(DataError):
    """One record that cannot be learnt from. ``reason`` is a short machine-readable word for counting."""

    def __init__(self, message: str, *, reason: str) -> None:
        """Keep ``reason`` beside the message, so that reports can count by it."""
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        """Survive pickling between Ray processes in spite of the keyword argument."""
        return (_rebuild, (type(self), str(self), self.reason))


class ImageError(RecordError):
    """One image that cannot be read or is refused."""


class TemplateError(LlavaRayError, ValueError):
    """A conversation that a template cannot render."""


class ModelError(LlavaRayError, ValueError):
    """Parts of a model that are missing or do not fit together."""


class BundleError(ModelError):
    """A model folder that is not what its manifest says."""


class CheckpointError(LlavaRayError, RuntimeError):
    """A training state that cannot be written or resumed."""


class TrainingError(LlavaRayError, RuntimeError):
    """A step that cannot be taken: nothing to learn from, or a loss that is not finite."""


class DivergedError(TrainingError):
    """A loss that is not finite: starting again with the same settings would end there too."""


class JudgeError(LlavaRayError, RuntimeError):
    """A request to a judge that brought no review."""


class Stopped(KeyboardInterrupt):
    """A run that was asked to stop, by Ctrl-C or SIGTERM, and did; the message says what is kept."""

    def __init__(self, message: str = "", signal_number: int = signal.SIGINT) -> None:
        """Keep which signal asked: a shell expects an exit code that says so."""
        super().__init__(message)
        self.exit_code = 128 + signal_number


def _rebuild(kind: type[RecordError], message: str, reason: str) -> RecordError:
    return kind(message, reason=reason)

"""The record of a trial: its settings, evaluations and final state."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

TrialState = Literal["waiting", "running", "finished", "stopped", "diverged", "failed"]
ENDED: tuple[TrialState, ...] = ("finished", "stopped", "diverged", "failed")
LOSS, ACCURACY = "held_out_loss", "held_out_accuracy"
LOWER_IS_BETTER = {LOSS: True, ACCURACY: False}


@dataclass(frozen=True)
class Evaluation:
    """The held-out metrics after ``step`` steps."""

    step: int
    held_out_loss: float
    held_out_accuracy: float | None = None

    def value(self, metric: str) -> float | None:
        """Return a metric by name."""
        return self.held_out_loss if metric == LOSS else self.held_out_accuracy

    def to_report(self) -> dict[str, Any]:
        """Return the report to Tune, without missing metrics."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass
class Trial:
    """One run of a sweep. ``id`` is the run's name, ``number`` counts from 1 in the order of their starts."""

    id: str
    number: int
    settings: dict[str, Any]
    """Along the space's dimensions; the rest is the recipe's."""
    seed: int
    state: TrialState = "waiting"
    reason: str = ""
    """The error message of a failed or diverged trial."""
    attempts: int = 0
    """Number of starts, including retries, resumed sweeps and later rounds."""
    seconds: float = 0.0
    """Time of its processes over all attempts."""
    curve: list[Evaluation] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Return the steps of the last evaluation."""
        return self.curve[-1].step if self.curve else 0

    def evaluation_at(self, step: int) -> Evaluation | None:
        """Return the evaluation at ``step``, if there is one."""
        return next((evaluation for evaluation in self.curve if evaluation.step == step), None)

    def add_evaluation(self, evaluation: Evaluation) -> None:
        """Add an evaluation, replacing one at the same step: a trial that lost a worker repeats steps."""
        self.curve = sorted(
            [*(old for old in self.curve if old.step != evaluation.step), evaluation], key=lambda one: one.step
        )

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values, for ``from_dict``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a trial from the values of ``to_dict``."""
        return cls(**{**values, "curve": [Evaluation(**evaluation) for evaluation in values["curve"]]})

"""What is known of a trial: its settings, what held-out samples said as it went, and how it ended."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

TrialState = Literal["waiting", "running", "finished", "stopped", "diverged", "failed"]
ENDED: tuple[TrialState, ...] = ("finished", "stopped", "diverged", "failed")
LOSS, ACCURACY = "held_out_loss", "held_out_accuracy"
LOWER_IS_BETTER = {LOSS: True, ACCURACY: False}


@dataclass(frozen=True)
class Evaluation:
    """What held-out samples said after ``step`` steps."""

    step: int
    held_out_loss: float
    held_out_accuracy: float | None = None

    def value(self, metric: str) -> float | None:
        """Return one of the two."""
        return self.held_out_loss if metric == LOSS else self.held_out_accuracy

    def to_report(self) -> dict[str, Any]:
        """Return what a run reports to Tune, without what was not looked at."""
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
    """Why it failed or diverged, in the words of the error."""
    attempts: int = 0
    """Starts, those after a failure or an interrupted sweep and of further rounds included."""
    seconds: float = 0.0
    """That its processes have run, over all attempts."""
    curve: list[Evaluation] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Return the steps that are known to be done."""
        return self.curve[-1].step if self.curve else 0

    def evaluation_at(self, step: int) -> Evaluation | None:
        """Return what was seen at ``step``, if anything was."""
        return next((look for look in self.curve if look.step == step), None)

    def add_evaluation(self, look: Evaluation) -> None:
        """Add a look; one at a step that is known replaces it: a trial that lost a worker repeats steps."""
        self.curve = sorted([*(old for old in self.curve if old.step != look.step), look], key=lambda one: one.step)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that ``read`` takes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a trial of what ``to_dict`` gave."""
        return cls(**{**values, "curve": [Evaluation(**look) for look in values["curve"]]})

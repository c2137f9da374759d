"""What a sweep may change, and how it searches: the sections ``[space]`` and ``[sweep]`` of its recipe.

``[space]`` names settings of a fine-tuning run by their dotted keys and says where each is looked for::

    [space]
    "model.mm_projector_type" = { choice = ["linear", "mlp2x_gelu"] }
    "train.learning_rate" = { log_uniform = [1e-4, 1e-2] }
    "lora.lora_r" = { choice = [8, 64], when = { "lora.lora_enable" = [true] } }
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from llava_ray.config.schema import ConfigSection, dotted_keys
from llava_ray.config.sections import FinetuneConfig
from llava_ray.invocation import command

# What a trial may not change: where it runs, what all are judged by, and what a step is, at which they are compared.
_FIXED_SECTIONS = ("run", "tracking", "cluster", "held_out")
_FIXED_KEYS = (
    "data.data_path",
    "data.max_samples",
    "train.global_batch_size",
    "train.max_steps",
    "train.num_train_epochs",
    "train.save_steps",
    "train.seed",
)


class Dimension(ConfigSection):
    """Where one setting is looked for: exactly one of the three."""

    choice: tuple[Any, ...] | None = None
    """Any of these values."""
    uniform: tuple[float, float] | None = None
    """Between two numbers, evenly."""
    log_uniform: tuple[PositiveFloat, PositiveFloat] | None = None
    """Between two numbers, each factor of ten as likely as the next: for learning rates."""
    num_points: Annotated[int, Field(ge=2)] = 4
    """Points that a grid takes of a range, its ends included."""
    when: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Other dimensions' values under which this one matters; otherwise the recipe's own setting stays."""

    @model_validator(mode="after")
    def one_kind(self) -> Self:
        """Refuse no kind, several, an empty choice and a range that is none."""
        given = [name for name in ("choice", "uniform", "log_uniform") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given) or 'no kind'} given; expected one of choice, uniform, log_uniform")
        if self.choice is not None and (not self.choice or len(set(map(repr, self.choice))) < len(self.choice)):
            raise ValueError(f"choice = {list(self.choice)}: expected at least one value, and none twice")
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"{given[0]} = {list(self.bounds)}: expected the lower bound first")
        return self

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Return the ends of a range, None for a choice."""
        return self.uniform or self.log_uniform

    @property
    def corners(self) -> tuple[Any, ...]:
        """Return values which, if they are allowed, let one expect that all are."""
        return self.choice if self.choice is not None else tuple(self.bounds or ())

    def matters(self, settings: Mapping[str, Any]) -> bool:
        """Tell whether the dimension counts beside these settings."""
        return all(settings.get(key) in values for key, values in self.when.items())


class Space(ConfigSection):
    """The dimensions by dotted key, in the order in which they are drawn."""

    dimensions: dict[str, Dimension]

    @model_validator(mode="after")
    def keys_are_settings(self) -> Self:
        """Refuse unknown and fixed keys, and conditions on what is not drawn before."""
        if not self.dimensions:
            raise ValueError('the space is empty; name at least one setting, such as "train.learning_rate"')
        known = set(dotted_keys(FinetuneConfig))
        seen: set[str] = set()
        for key, dimension in self.dimensions.items():
            if key not in known:
                raise ValueError(f"{key!r} is no setting of a run; {command('finetune', '--help')} lists them")
            if key.partition(".")[0] in _FIXED_SECTIONS or key in _FIXED_KEYS:
                raise ValueError(f"{key!r} is the same for all trials of a sweep, so that they can be compared")
            unknown = dimension.when.keys() - seen
            if unknown:
                raise ValueError(f"{key!r} depends on {sorted(unknown)}, which the space has not named before it")
            seen.add(key)
        return self


class SearchConfig(ConfigSection):
    """How the space is searched, and by what trials are judged."""

    method: Literal["grid", "random", "optuna"] = "random"
    """Every combination, independent draws, or Optuna's TPE, which learns from the trials that have ended."""
    num_trials: PositiveInt = 16
    """Settings to try; a grid has its own number."""
    num_seeds: PositiveInt = 1
    """Runs of each setting with different seeds."""
    search_seed: int = 0
    """Of the search itself; trials have train.seed."""
    metric: Literal["held_out_accuracy", "held_out_loss"] = "held_out_accuracy"
    """What makes a trial the best; the other of the two decides between equals."""
    weigh_cost: bool = False
    """Let Optuna look for accurate and cheap trials at the same time; the report shows which are not beaten in both."""
    scheduler: Literal["asha", "hyperband", "median", "halving", "none"] = "asha"
    """Which trials end early: ASHA's rungs, several brackets of them (asynchronous HyperBand), those below the median
    of the others, none; or halving in rounds, in which all are compared before the best go on: it saves the most
    where few run at a time."""
    stop_metric: Literal["held_out_loss", "held_out_accuracy"] = "held_out_loss"
    """What the scheduler looks at; a loss tells trials apart earlier than an accuracy."""
    grace_steps: PositiveInt | None = None
    """Steps that every trial may take; default: train.save_steps."""
    reduction_factor: Annotated[float, Field(gt=1)] = 2.0
    """One trial in so many goes on after a rung (or round), and each is so many times further."""
    max_concurrent_trials: PositiveInt | None = None
    """Trials at a time; default: as many as the cluster has room for."""
    max_retries: Annotated[int, Field(ge=0)] = 1
    """Starts of a trial after one that failed; each goes on from its last checkpoint."""
    include_default: bool = True
    """Try the recipe's own settings too, to have something to beat."""

    @model_validator(mode="after")
    def cost_is_optunas(self) -> Self:
        """Refuse what has no effect or no meaning."""
        if self.weigh_cost and self.method != "optuna":
            raise ValueError("weigh_cost has no effect without method = 'optuna'")
        if self.weigh_cost and self.num_seeds > 1:
            raise ValueError("weigh_cost with num_seeds > 1: the mean over seeds is taken of one number only; drop one")
        return self


class SweepConfig(FinetuneConfig):
    """Everything `sweep` can be told, but the space, which only a recipe holds."""

    sweep: SearchConfig = SearchConfig()

    @property
    def base(self) -> FinetuneConfig:
        """Return the run that every trial is a variation of."""
        return FinetuneConfig.parsed(self.model_dump(exclude={"sweep"}))

    @model_validator(mode="after")
    def trials_are_judged(self) -> Self:
        """Refuse a sweep that could not tell its trials apart."""
        if not self.held_out.path:
            raise ValueError("a sweep judges its trials by held-out data: set held_out.path")
        asked = {self.sweep.metric, self.sweep.stop_metric}
        if "held_out_accuracy" in asked and not self.held_out.num_answers:
            raise ValueError("held_out_accuracy needs answers: set held_out.num_answers, or judge by held_out_loss")
        if self.sweep.scheduler == "median" and self.sweep.weigh_cost:
            raise ValueError("the median rule stops by one number: choose another scheduler with weigh_cost")
        return self

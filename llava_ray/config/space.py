"""The search space and the search settings of a sweep: sections ``[space]`` and ``[sweep]`` of its recipe.

``[space]`` names settings of a fine-tuning run by their dotted keys, with the values to search::

    [space]
    "model.mm_projector_type" = { choice = ["linear", "mlp2x_gelu"] }
    "train.learning_rate" = { log_uniform = [1e-4, 1e-2] }
    "lora.lora_r" = { choice = [8, 64], when = { "lora.lora_enable" = [true] } }
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.schema import ConfigSection, dotted_keys
from llava_ray.invocation import command

# Trials may not change where they run, what they are evaluated on, or what a step is: they are compared by step.
_FIXED_SECTIONS = ("run", "tracking", "cluster", "held_out")
_FIXED_KEYS = (
    "data.data_path",
    "data.max_samples",
    "data.sources",
    "data.epoch_samples",
    "train.global_batch_size",
    "train.max_steps",
    "train.num_train_epochs",
    "train.save_steps",
    "train.seed",
)


class Dimension(ConfigSection):
    """The search range of one setting: exactly one of choice, uniform and log_uniform."""

    choice: tuple[Any, ...] | None = None
    """Any of these values."""
    uniform: tuple[float, float] | None = None
    """Uniform between two numbers."""
    log_uniform: tuple[PositiveFloat, PositiveFloat] | None = None
    """Log-uniform between two numbers, for learning rates."""
    num_points: Annotated[int, Field(ge=2)] = 4
    """Grid points of a range, its ends included."""
    when: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Values of other dimensions under which this one applies; otherwise the recipe's own setting is used."""

    @model_validator(mode="after")
    def one_kind(self) -> Self:
        """Reject no kind or several, an empty choice and an empty range."""
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
        """Return the extreme values; if these are valid, values between them are expected to be."""
        return self.choice if self.choice is not None else tuple(self.bounds or ())

    def matters(self, settings: Mapping[str, Any]) -> bool:
        """Return whether the dimension applies under these settings."""
        return all(settings.get(key) in values for key, values in self.when.items())


class Space(ConfigSection):
    """The dimensions by dotted key, in the order in which they are drawn."""

    dimensions: dict[str, Dimension]

    @model_validator(mode="after")
    def keys_are_settings(self) -> Self:
        """Reject unknown and fixed keys, and conditions on dimensions that are not drawn before."""
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
    """The search method, the metric and the scheduler."""

    method: Literal["grid", "random", "optuna"] = "random"
    """Every combination, independent draws, or Optuna's TPE, which learns from the trials that have ended."""
    num_trials: PositiveInt = 16
    """Number of settings to try; a grid determines its own."""
    num_seeds: PositiveInt = 1
    """Runs per setting, with different seeds."""
    search_seed: int = 0
    """Seed of the search; trials use train.seed."""
    metric: Literal["held_out_accuracy", "held_out_loss"] = "held_out_accuracy"
    """Metric that selects the best trial; the other of the two breaks ties."""
    weigh_cost: bool = False
    """Let Optuna optimise accuracy and cost together; the report shows the Pareto front."""
    scheduler: Literal["asha", "hyperband", "median", "halving", "none"] = "asha"
    """Early stopping of trials: ASHA, asynchronous HyperBand (several brackets of ASHA), the median rule or none; or
    successive halving in rounds, which compares all trials before the best continue and saves the most where few run at
    a time."""
    stop_metric: Literal["held_out_loss", "held_out_accuracy"] = "held_out_loss"
    """Metric of the scheduler; a loss separates trials earlier than an accuracy."""
    grace_steps: PositiveInt | None = None
    """Minimum steps of every trial; default: train.save_steps."""
    reduction_factor: Annotated[float, Field(gt=1)] = 2.0
    """One in so many trials continues after a rung (or round), and the next rung has so many times the steps."""
    max_concurrent_trials: PositiveInt | None = None
    """Maximum concurrent trials; default: as many as the cluster can hold."""
    max_retries: Annotated[int, Field(ge=0)] = 1
    """Restarts of a failed trial; each resumes from its last checkpoint."""
    include_default: bool = True
    """Also try the recipe's own settings, as a baseline."""

    @model_validator(mode="after")
    def cost_is_optunas(self) -> Self:
        """Reject settings without effect or meaning."""
        if self.weigh_cost and self.method != "optuna":
            raise ValueError("weigh_cost has no effect without method = 'optuna'")
        if self.weigh_cost and self.num_seeds > 1:
            raise ValueError("weigh_cost with num_seeds > 1: the mean over seeds is taken of one number only; drop one")
        return self


class SweepConfig(FinetuneConfig):
    """All settings of a sweep except the space, which only a recipe holds."""

    sweep: SearchConfig = SearchConfig()

    @property
    def base(self) -> FinetuneConfig:
        """Return the run that every trial is a variation of."""
        return FinetuneConfig.parsed(self.model_dump(exclude={"sweep"}))

    @model_validator(mode="after")
    def trials_are_judged(self) -> Self:
        """Reject a sweep without the held-out data or answers that its metrics need."""
        if not self.evaluates:
            raise ValueError("a sweep judges its trials by held-out data: set held_out.path")
        if self.held_out.selects:
            raise ValueError(
                "a sweep compares trials by step, and its scheduler ends them: leave held_out.early_stopping_patience "
                "and held_out.keep_best out"
            )
        asked = {self.sweep.metric, self.sweep.stop_metric}
        if "held_out_accuracy" in asked and not self.held_out.num_answers:
            raise ValueError("held_out_accuracy needs answers: set held_out.num_answers, or judge by held_out_loss")
        if self.sweep.scheduler == "median" and self.sweep.weigh_cost:
            raise ValueError("the median rule stops by one number: choose another scheduler with weigh_cost")
        return self

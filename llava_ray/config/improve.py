"""Settings of the loop that improves a model: the held-out benchmark, the test that stops it, and a round's parts."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator, model_validator

from llava_ray.config.data import DataConfig
from llava_ray.config.evaluate import ActorsConfig
from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.preference import PAIR_OBJECTIVES, PairObjectiveName
from llava_ray.config.preferences import PairJudgeConfig, PreferencesSection
from llava_ray.config.review import BudgetConfig, LimitsConfig
from llava_ray.config.run import RunConfig
from llava_ray.config.schema import ConfigSection
from llava_ray.config.train import TrainConfig


class ImproveSection(ConfigSection):
    """The rounds, the benchmark that they are measured on, and when they stop."""

    benchmark: str
    """NAME=FOLDER: the held-out benchmark. None of its questions may be asked for preferences."""
    profile: Literal["llava", "official", "robust"] = "robust"
    """Its scoring rule: that of LLaVA's tables, the benchmark authors', or ours, which never guesses."""
    max_held_out: PositiveInt | None = None
    """Ask only the first so many questions of the benchmark, the same after every round."""
    max_new_tokens: PositiveInt | None = None
    """Maximum length of a held-out answer in tokens; default: LLaVA's own for the benchmark (128 or 1024)."""
    batch_size: PositiveInt = 16
    """Held-out questions that an actor answers in one batch."""
    rounds: PositiveInt = 3
    """Maximum rounds of preferences, tuning and evaluation."""
    significance: float = Field(default=0.05, gt=0, lt=1)
    """Level of the two-sided paired test: a round's model is kept, and the next one starts from it, only if the
    interval of the gain at 1 - level lies above 0."""
    min_gain: NonNegativeFloat = 0.0
    """Stop after a round that gains less than so many points, even significantly."""
    output: str = "runs/improve"
    """Folder of all rounds, the judge's ledger, the report, and `model`, the best one. The same folder resumes."""

    @field_validator("benchmark")
    @classmethod
    def held_out_name_and_folder(cls, value: str) -> str:
        """Reject a benchmark without its name or folder."""
        name, _, folder = value.partition("=")
        if not name or not folder:
            raise ValueError("expected NAME=FOLDER, such as gqa=data/gqa")
        return value


class RoundPreferencesSection(PreferencesSection):
    """The questions of the rounds, and the rule that tells which of two answers is better."""

    models: tuple[str, ...] = ()
    """Further models that answer every question beside the round's own."""
    max_questions: PositiveInt | None = None
    """Questions of a round: the next so many in each, from the beginning again after the last. Default: all in each
    round, with another seed."""

    @field_validator("models")
    @classmethod
    def some_models(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Reject duplicates."""
        if len(set(value)) < len(value) or not all(value):
            raise ValueError("expected models, each once; the round's own is asked anyway")
        return value

    @model_validator(mode="after")
    def one_source(self) -> Self:
        """Leave it to the start of the loop to miss a source: flags may give what a recipe does not."""
        return self

    @property
    def num_models(self) -> int:
        """Return the number of models that answer, the round's own included."""
        return 1 + len(self.models)


class RoundDataConfig(DataConfig):
    """How a round's preferences reach the model."""

    data_path: str = ""
    """Not to be given: each round learns from its own preferences."""

    @model_validator(mode="after")
    def data_are_named(self) -> Self:
        """Reject sources: each round names its preferences itself."""
        if self.sources or self.epoch_samples is not None:
            raise ValueError(
                "each round learns from its own preferences: leave out data.sources and data.epoch_samples"
            )
        return self


class RoundTrainConfig(TrainConfig):
    """The tuning of each round."""

    objective: PairObjectiveName = "dpo"
    """The loss over pairs of answers: "dpo", "ipo", "hinge", "robust", "dpo_norm" (averages over tokens), "simpo",
    "orpo"."""


class ImproveConfig(FinetuneConfig):
    """All settings of the loop: those of a fine-tuning run, of making preferences, and of the rounds."""

    improve: ImproveSection
    preferences: RoundPreferencesSection
    data: RoundDataConfig = RoundDataConfig()
    train: RoundTrainConfig = RoundTrainConfig()
    judge: PairJudgeConfig = PairJudgeConfig()
    limits: LimitsConfig = LimitsConfig()
    budget: BudgetConfig = BudgetConfig()
    actors: ActorsConfig = ActorsConfig()

    @model_validator(mode="after")
    def places_are_the_rounds(self) -> Self:
        """Reject places and names that each round sets itself."""
        run = RunConfig()
        given = {
            "data.data_path": self.data.data_path,
            "data.image_folder": self.data.image_folder,
            "run.name": self.run.name,
            "run.storage_path": self.run.storage_path != run.storage_path,
            "run.restart": self.run.restart,
            "preferences.output": self.preferences.output != PreferencesSection.model_fields["output"].default,
        }
        for key, value in given.items():
            if value:
                raise ValueError(f"{key} is set by each round, in improve.output; leave it out")
        if self.model.pretrain_mm_mlp_adapter:
            raise ValueError(
                "model.pretrain_mm_mlp_adapter: the rounds start from a whole LLaVA, which answers the held-out "
                "questions first; give one as model.model_name_or_path"
            )
        if self.data.kind == "instruction" or self.train.objective not in PAIR_OBJECTIVES:
            raise ValueError("the rounds learn from preferences; leave out data.kind")
        return self

"""Settings of an evaluation."""

from typing import Literal, Self

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from llava_ray.config.run import ClusterConfig, RunConfig, TrackingConfig, check_mlflow_alone
from llava_ray.config.schema import ConfigSection


class AskConfig(ConfigSection):
    """The model and the benchmarks of an evaluation, and how answers are generated."""

    model_path: str
    """A model of any layout: bundle, original, llava-hf, adapter."""
    model_base: str | None = None
    """Language model under an adapter that does not name it, or that has moved."""
    vision_tower: str | None = None
    """Folder of the vision tower, for layouts that only name it."""
    version: str | None = None
    """Conversation template by LLaVA's name, for layouts that do not record it."""
    benchmarks: tuple[str, ...]
    """Each NAME=FOLDER: a benchmark and its official files (evals/README.md). All are answered in one job."""
    max_questions: PositiveInt | None = None
    """Answer only the first so many questions of each benchmark, for a trial run."""
    max_new_tokens: PositiveInt | None = None
    """Maximum length of an answer in tokens; default: LLaVA's own for each benchmark (128 or 1024)."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature; 0 is greedy, as in all published tables."""
    batch_size: PositiveInt = 16
    """Questions that an actor answers in one batch."""
    ranking: Literal["letter", "text"] | None = None
    """Instead of generating, choose the option whose letter or text is likeliest (the mean over its tokens, the end
    token included): letters alone misjudge weak models. Questions without options are answered as usual."""

    @field_validator("benchmarks")
    @classmethod
    def names_and_folders(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Reject an empty list, a benchmark without a folder, and duplicates."""
        names = [entry.partition("=")[0] for entry in value]
        if not value or not all(name and folder for name, _, folder in (entry.partition("=") for entry in value)):
            raise ValueError("expected NAME=FOLDER for at least one benchmark, such as gqa=data/gqa")
        if len(set(names)) != len(names):
            raise ValueError("a benchmark is there twice; give each one folder")
        return value


class ScoreConfig(ConfigSection):
    """Scoring of answers; it may change between runs without answering again."""

    profile: Literal["llava", "official", "robust"] = "robust"
    """The matching rule: that of LLaVA's tables, the benchmark authors', or ours, which never guesses."""
    reviews: tuple[str, ...] = ()
    """Each NAME=FILE: a judge's replies, for benchmarks that need a judge; without them, they are only answered."""


class ActorsConfig(ConfigSection):
    """The actors that answer."""

    num_actors: PositiveInt | None = None
    """Copies of the model; default: one per GPU of the cluster, or as many as fit its CPUs."""
    cpus_per_actor: PositiveFloat | Literal["auto"] = "auto"
    """CPUs that each reserves and computes with; "auto" is one, or on one machine its share if num_actors is given."""


class EvaluateConfig(ConfigSection):
    """All settings of an evaluation."""

    evaluate: AskConfig
    score: ScoreConfig = ScoreConfig()
    actors: ActorsConfig = ActorsConfig()
    run: RunConfig = RunConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig(num_workers=1)

    @model_validator(mode="after")
    def results_go_to_mlflow(self) -> Self:
        """Reject trackers that nothing would be written to."""
        check_mlflow_alone(self.tracking)
        return self

"""Settings of making preferences: the questions, the sampled answers, and the rule that tells the better one."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator, model_validator

from llava_ray.config.evaluate import ActorsConfig
from llava_ray.config.review import BudgetConfig, JudgeConfig, LimitsConfig
from llava_ray.config.run import ClusterConfig, TrackingConfig, check_mlflow_alone
from llava_ray.config.schema import ConfigSection, Fraction

PreferenceRule = Literal["judge", "benchmark", "answer", "noised_image", "swapped_image", "replaced_words"]
PERTURBATIONS: tuple[PreferenceRule, ...] = ("noised_image", "swapped_image", "replaced_words")
MIN_ANSWERS = 2
# Of [preferences]: of where and how fast preferences are made, not of what they are.
_NOT_OF_THE_RESULT = {"output", "ledger", "num_reviewers", "max_rejected", "batch_size"}


class PreferencesSection(ConfigSection):
    """The questions, the models that answer them, and the rule that tells which of two answers is better."""

    models: tuple[str, ...]
    """Models of any layout that answer every question; mostly the one that is to learn."""
    model_base: str | None = None
    """Language model under an adapter that does not name it, or that has moved."""
    vision_tower: str | None = None
    """Folder of the vision tower, for layouts that only name it."""
    version: str | None = None
    """Conversation template by LLaVA's name, for layouts that do not record it."""
    benchmark: str | None = None
    """NAME=FOLDER: a benchmark whose questions are asked, and its official files. Not one to be evaluated on later."""
    data_path: str | None = None
    """Instead: records as training takes them. The prompt is all up to the last question, the truth its answer."""
    image_folder: str | None = None
    """Folder of relative image paths; default: the folder of the data."""
    max_questions: PositiveInt | None = None
    """Ask only the first so many questions."""
    skip_questions: NonNegativeInt = 0
    """Leave out so many questions at the beginning, before max_questions counts."""
    rule: PreferenceRule = "judge"
    """"judge" compares two samples in both orders; "benchmark" (its own scorer) and "answer" (equality with the
    record's) tell right from wrong; the others make the rejected answer: to a "noised_image", to a "swapped_image", or
    by "replaced_words"."""
    chosen: Literal["sample", "truth"] = "sample"
    """The better answer: one that a model sampled, or the data's own. Not with rule = "judge"."""
    num_samples: PositiveInt = 4
    """Answers that each model samples for each question."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample only the most likely tokens whose probabilities add up to this."""
    seed: NonNegativeInt = 0
    """Each answer has its own seed, a hash of this one, its question and its number; the batch does not matter."""
    max_new_tokens: PositiveInt | None = None
    """Maximum length of an answer in tokens; default: the benchmark's own (128 or 1024), 512 for records."""
    cut_off: Literal["drop", "keep"] = "drop"
    """Drop or keep answers that reached the maximum length without an end."""
    batch_size: PositiveInt = 4
    """Questions in a batch, each with all its samples."""
    max_pairs_per_question: PositiveInt = 4
    """Maximum pairs of a question, chosen by the seed among those with different answers."""
    profile: Literal["llava", "official", "robust"] = "robust"
    """The scoring rule of rule = "benchmark"."""
    noise_steps: int = Field(default=500, ge=1, le=1000)
    """Steps of diffusion noise of rule = "noised_image", of 1,000."""
    words: str | None = None
    """File of words for rule = "replaced_words", one a line, or several with commas that replace one another; default:
    the objects and short answers that the data's own answers name."""
    num_replaced: PositiveInt = 1
    """Maximum words of an answer that are replaced."""
    rubric: str | None = None
    """Your own rubric in TOML, as for a review; default: faithfulness to the image."""
    show_truth: bool = False
    """Show the judge the data's own answer as the context."""
    balance_lengths: bool = False
    """Drop pairs, the most unequal first, until the chosen answer is the longer one as often as the rejected one."""
    max_rejected: Fraction = 0.01
    """Share of questions that may be rejected (an unreadable image, a malformed record) before the command stops."""
    output: str = "runs/preferences"
    """Folder of preferences.jsonl, the sampled answers, the ledger and the report. The same folder resumes."""
    ledger: str | None = None
    """The judge's ledger; default: ledger.jsonl in output. A shared one reuses replies that are paid for."""
    num_reviewers: PositiveInt = 2
    """Number of actors that send requests, each many concurrently."""

    @property
    def num_models(self) -> int:
        """Return the number of models that answer."""
        return len(self.models)

    @field_validator("models")
    @classmethod
    def some_models(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Reject an empty list and duplicates."""
        if not value or len(set(value)) < len(value) or not all(value):
            raise ValueError("expected at least one model, each once")
        return value

    @field_validator("benchmark")
    @classmethod
    def name_and_folder(cls, value: str | None) -> str | None:
        """Reject a benchmark without its name or folder."""
        name, _, folder = (value or "name=folder").partition("=")
        if not name or not folder:
            raise ValueError("expected NAME=FOLDER, such as gqa=data/gqa")
        return value

    @model_validator(mode="after")
    def one_source(self) -> Self:
        """Reject no source of questions, and two."""
        if (self.benchmark is None) == (self.data_path is None):
            raise ValueError("give preferences.benchmark or preferences.data_path: one of them")
        if self.rule == "benchmark" and self.benchmark is None:
            raise ValueError("preferences.rule = 'benchmark' needs preferences.benchmark; records have rule = 'answer'")
        if self.benchmark is not None and self.image_folder is not None:
            raise ValueError("preferences.image_folder is of records: a benchmark's folder has its images; drop it")
        return self

    @model_validator(mode="after")
    def pairs_are_possible(self) -> Self:
        """Reject settings that cannot bring two different answers to a question."""
        if self.rule == "judge" and self.chosen == "truth":
            raise ValueError("preferences.chosen = 'truth' needs no judge: set preferences.rule = 'answer'")
        if self.rule in PERTURBATIONS or self.chosen == "truth":
            return self
        if self.num_samples * self.num_models < MIN_ANSWERS:
            raise ValueError(
                f"preferences.num_samples = {self.num_samples} with {self.num_models} model: a pair needs two answers "
                "to a question; set num_samples = 2 or more"
            )
        if self.temperature == 0 and self.num_models < MIN_ANSWERS:
            raise ValueError(
                "preferences.temperature = 0 samples the same answer every time: set it to 0.7 to 1.0, or give two "
                "models"
            )
        return self


class PairJudgeConfig(JudgeConfig):
    """The judge of pairs: any OpenAI-compatible endpoint, our own service included. Only for rule = "judge"."""

    model: str = ""
    """A dated model name; needed with rule = "judge"."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature of the judge."""
    max_tokens: PositiveInt = 512
    """Maximum length of a verdict in tokens."""
    sees_images: bool = True
    """Send the image with the text."""


class PreferencesConfig(ConfigSection):
    """All settings of making preferences."""

    preferences: PreferencesSection
    judge: PairJudgeConfig = PairJudgeConfig()
    limits: LimitsConfig = LimitsConfig()
    budget: BudgetConfig = BudgetConfig()
    actors: ActorsConfig = ActorsConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig(num_workers=1)

    @property
    def recipe_settings(self) -> dict[str, object]:
        """Return the settings that decide which preferences come out, without defaults."""
        dumped = self.model_dump(mode="json", exclude_defaults=True)
        kept: dict[str, object] = {
            key: value for key, value in dumped["preferences"].items() if key not in _NOT_OF_THE_RESULT
        }
        return {"preferences": kept} | ({"judge": dumped["judge"]} if self.uses_judge and "judge" in dumped else {})

    @property
    def uses_judge(self) -> bool:
        """Return whether a judge is asked."""
        return self.preferences.rule == "judge"

    @model_validator(mode="after")
    def judge_is_named(self) -> Self:
        """Reject a judge without a model, and one that cannot see what it is to judge."""
        if not self.uses_judge:
            return self
        if not self.judge.model:
            raise ValueError("preferences.rule = 'judge' needs judge.model (and judge.base_url for one of your own)")
        if not self.judge.sees_images and self.preferences.rubric is None and not self.preferences.show_truth:
            raise ValueError(
                "judge.sees_images = false: a judge of faithfulness sees the image; set it to true, or "
                "preferences.show_truth = true, or give preferences.rubric"
            )
        return self

    @model_validator(mode="after")
    def results_go_to_mlflow(self) -> Self:
        """Reject trackers that nothing would be written to."""
        check_mlflow_alone(self.tracking)
        return self

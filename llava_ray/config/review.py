"""Settings of a review: what is judged, who judges, how fast and for how much."""

from typing import Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from llava_ray.config.schema import ConfigSection
from llava_ray.config.sections import ClusterConfig, TrackingConfig


class ReviewSection(ConfigSection):
    """What is judged, against what, by which rubric."""

    answers: tuple[str, ...]
    """Answers files, ours or LLaVA's; several are several models. In mode "reference" each meets the references."""
    questions: str | None = None
    """LLaVA-Bench's questions: JSON lines with question_id, image, text and category."""
    references: str | None = None
    """The answers to compare with (LLaVA-Bench: answers_gpt4.jsonl). It is Assistant 1 of the published order."""
    context: str | None = None
    """JSON lines with image and caption (and instances, with boxes): what the judge is told of the images."""
    image_folder: str | None = None
    """Where the questions' images are; they are sent where judge.sees_images is set."""
    benchmark: Literal["llava_bench", "mm_vet"] | None = None
    """Take questions, references, context and images from the official files of a benchmark in review.data."""
    data: str | None = None
    """Folder of that benchmark (evals/README.md)."""
    rules: str | None = None
    """A rule file in LLaVA's format (category to role and prompt): requests are then LLaVA's, byte by byte."""
    rubric: str | None = None
    """A rubric of your own, TOML: version, system, and a prompt for each category or for "default"."""
    mode: Literal["reference", "pairwise", "single", "grade"] = "reference"
    """"reference": answer against reference. "pairwise": every two models against each other. "single": one answer,
    1 to 10. "grade": right or wrong in tenths, as MM-Vet."""
    both_orders: bool = True
    """Ask again with the two answers swapped. The published figure is of the first order alone; half of the cost."""
    samples: PositiveInt = 1
    """Reviews of each item and order; several show the judge's own variance."""
    max_items: PositiveInt | None = None
    """Review only the first so many questions: for trying things out."""
    output: str = "runs/review"
    """Folder of the ledger, reviews.jsonl, report.json and report.html. The same folder goes on where it stopped."""
    ledger: str | None = None
    """The ledger's file; default: ledger.jsonl in output. A shared one saves what other reviews have paid already."""
    num_reviewers: PositiveInt = 2
    """Actors that send requests; each sends many at a time."""
    max_failed: float = Field(default=0.02, ge=0, le=1)
    """Share of failed and unparsed reviews beyond which there is no headline."""

    @field_validator("answers")
    @classmethod
    def some_answers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse none, and the same file twice."""
        if not value or len(set(value)) < len(value):
            raise ValueError("expected at least one answers file, each once")
        return value

    @model_validator(mode="after")
    def inputs_fit_the_mode(self) -> Self:
        """Refuse inputs that contradict each other or that the mode cannot do without."""
        if self.benchmark and not self.data:
            raise ValueError(f"review.benchmark = {self.benchmark!r} needs review.data, the folder of its files")
        if not self.benchmark and not self.questions:
            raise ValueError("give --questions FILE, or --benchmark NAME with --data FOLDER")
        if self.rules and self.rubric:
            raise ValueError("review.rules and review.rubric contradict each other: drop one")
        if self.mode == "pairwise" and len(self.answers) < 2:
            raise ValueError("review.mode = 'pairwise' compares models: give two answers files or more")
        if self.mode == "grade" and not (self.benchmark or self.references or self.rubric):
            raise ValueError(
                "review.mode = 'grade' needs the truth: give --references FILE, or a rubric that needs none"
            )
        if self.mode == "reference" and not (self.benchmark or self.references):
            raise ValueError("review.mode = 'reference' needs --references FILE")
        if self.rules and self.mode in ("single", "grade"):
            raise ValueError(
                f"a rule file compares two answers, review.mode = {self.mode!r} shows one: drop review.rules"
            )
        return self


class JudgeConfig(ConfigSection):
    """Who judges: any OpenAI-compatible endpoint, our own service included."""

    model: str
    """A dated model name, so that the figure can be had again; an alias is reported as one."""
    base_url: str = "https://api.openai.com/v1"
    """Where it answers, up to and including /v1."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable of the key; the key itself is in no file. Not set: requests carry the word "none"."""
    others: tuple[str, ...] = ()
    """Further judges, each MODEL or MODEL=BASE_URL, under the same settings and with limits of their own."""
    temperature: NonNegativeFloat = 0.2
    """LLaVA's; 0 is steadier."""
    max_tokens: PositiveInt = 1024
    """Longest review in tokens; LLaVA's."""
    token_limit_name: Literal["auto", "max_tokens", "max_completion_tokens"] = "auto"
    """How the endpoint calls it. "auto": the second for OpenAI's reasoning models (o1, o3, gpt-5 …), which know no
    other; the first for all others."""
    seed: NonNegativeInt | None = None
    """Sent where it is given (plus the number of the sample)."""
    response_format: Literal["json_schema", "text"] = "text"
    """"text": LLaVA's two numbers on the first line. "json_schema": strict, where the endpoint has it."""
    sees_images: bool = False
    """Send the image beside the text."""
    tokens_per_image: PositiveInt = 1500
    """What an image costs at most, for leases of tokens and dollars."""
    timeout_s: PositiveFloat = 120.0
    """A request that has no reply by then is uncertain: it may have been paid."""
    max_attempts: PositiveInt = 5
    """Attempts at an item before it is listed as failed; refusals for the rate (429) do not count."""
    patience_s: PositiveFloat = 1800.0
    """An item that was put off (429) for so long is listed as failed."""
    reasks: NonNegativeInt = 1
    """Ask again so often where the reply holds no scores; reported, and paid."""
    input_dollars: NonNegativeFloat | None = None
    """Price of a million prompt tokens; default: the built-in table."""
    cached_input_dollars: NonNegativeFloat | None = None
    """Price of a million cached prompt tokens; default: input_dollars."""
    output_dollars: NonNegativeFloat | None = None
    """Price of a million output tokens; default: the built-in table."""
    delivery: Literal["sync", "batch"] = "sync"
    """"batch": OpenAI's Batch API, at half the price, within a day."""
    batch_poll_s: PositiveFloat = 30.0
    """How often a batch is asked for."""

    @field_validator("base_url")
    @classmethod
    def an_address(cls, value: str) -> str:
        """Refuse what is no http address; a slash at the end makes no other judge."""
        if not value.startswith(("http://", "https://")):
            raise ValueError("expected an address such as https://api.openai.com/v1")
        return value.rstrip("/")

    @model_validator(mode="after")
    def whole_prices(self) -> Self:
        """Refuse half a price."""
        if (self.input_dollars is None) != (self.output_dollars is None):
            raise ValueError("judge.input_dollars and judge.output_dollars belong together: give both")
        return self


class LimitsConfig(ConfigSection):
    """How fast: for all reviewers of the cluster together, for each judge."""

    requests_per_minute: PositiveInt | None = None
    """The account's limit; default: what the endpoint's headers say."""
    tokens_per_minute: PositiveInt | None = None
    """The account's limit, prompt and output together; default: what the endpoint's headers say."""
    window_s: PositiveFloat = 60.0
    """No window of this length holds more than its share of the limits. 60 is what their names say; 1 suits an endpoint
    that enforces 60 a minute as 1 a second."""
    burst_s: PositiveFloat = 1.0
    """How much may be sent at once after a rest, in seconds of the limits."""
    max_concurrency: PositiveInt = 64
    """Requests in flight at most; fewer while the endpoint refuses."""
    arrival_s: PositiveFloat = 2.0
    """A request reaches the endpoint at most so long after it was let go; windows are longer by as much, or by the time
    to the reply where that is shorter."""
    give_up_after: PositiveInt = 30
    """Stop the job after so many failed items in a row: nobody is there."""


class BudgetConfig(ConfigSection):
    """For how much."""

    dollars: PositiveFloat | None = None
    """All calls in the ledger may cost at most this, those that are under way at their largest possible cost."""


class ReviewConfig(ConfigSection):
    """Everything `review` can be told."""

    review: ReviewSection
    judge: JudgeConfig
    limits: LimitsConfig = LimitsConfig()
    budget: BudgetConfig = BudgetConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig(num_workers=1)

"""Settings of a review: the answers, the judge, the rate limits and the budget."""

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

from llava_ray.config.run import ClusterConfig, TrackingConfig, check_mlflow_alone
from llava_ray.config.schema import ConfigSection


class ReviewSection(ConfigSection):
    """The answers to review, their references, and the rubric."""

    answers: tuple[str, ...]
    """Answers files, one per model, ours or LLaVA's. In mode "reference" each is compared with the references."""
    questions: str | None = None
    """LLaVA-Bench's questions: JSON lines with question_id, image, text and category."""
    references: str | None = None
    """Reference answers (LLaVA-Bench: answers_gpt4.jsonl), Assistant 1 in the published order."""
    context: str | None = None
    """JSON lines with image and caption (and instances, with boxes) that describe the images to the judge."""
    image_folder: str | None = None
    """Folder of the questions' images, which are sent if judge.sees_images is set."""
    benchmark: Literal["llava_bench", "mm_vet", "mmhal_bench", "object_halbench"] | None = None
    """Benchmark whose official files in review.data supply questions, references, context and images."""
    data: str | None = None
    """Folder of that benchmark (evals/README.md)."""
    rules: str | None = None
    """A rule file in LLaVA's format (category to role and prompt): requests then equal LLaVA's byte by byte."""
    rubric: str | None = None
    """Your own rubric in TOML: version, system, and a prompt for each category or for "default"."""
    mode: Literal["reference", "pairwise", "single", "grade"] = "reference"
    """"reference": answer against reference. "pairwise": every two models against each other. "single": one answer,
    1 to 10. "grade": right or wrong in tenths, as MM-Vet. MMHal-Bench and Object HalBench ask their own questions of
    single answers, unless the mode is "pairwise" or "single"."""
    both_orders: bool = True
    """Review again with the two answers swapped. Published scores use the first order alone, at half the cost."""
    samples: PositiveInt = 1
    """Reviews of each item and order; several measure the judge's own variance."""
    max_items: PositiveInt | None = None
    """Review only the first so many questions, for a trial run."""
    output: str = "runs/review"
    """Folder of the ledger, reviews.jsonl, report.json and report.html. A review resumes in the same folder."""
    ledger: str | None = None
    """The ledger's file; default: ledger.jsonl in output. A shared one reuses replies that other reviews paid for."""
    num_reviewers: PositiveInt = 2
    """Number of actors that send requests, each many concurrently."""
    max_failed: float = Field(default=0.02, ge=0, le=1)
    """Share of failed and unparsed reviews beyond which no overall score is reported."""

    @field_validator("answers")
    @classmethod
    def some_answers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Reject an empty list and duplicates."""
        if not value or len(set(value)) < len(value):
            raise ValueError("expected at least one answers file, each once")
        return value

    @model_validator(mode="after")
    def inputs_fit_the_mode(self) -> Self:
        """Reject contradictory inputs and a mode without the inputs that it needs."""
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
    """The judge: any OpenAI-compatible endpoint, our own service included."""

    model: str
    """A dated model name, so that the score can be reproduced; an alias is reported as such."""
    base_url: str = "https://api.openai.com/v1"
    """Base URL of the endpoint, up to and including /v1."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable of the API key, which is stored in no file. Where it is not set, "none" is sent."""
    others: tuple[str, ...] = ()
    """Further judges, each MODEL or MODEL=BASE_URL, with the same settings but separate rate limits."""
    temperature: NonNegativeFloat = 0.2
    """Sampling temperature; the default is LLaVA's, 0 varies less."""
    max_tokens: PositiveInt = 1024
    """Maximum length of a review in tokens; the default is LLaVA's."""
    token_limit_name: Literal["auto", "max_tokens", "max_completion_tokens"] = "auto"
    """The endpoint's parameter for it. "auto": max_completion_tokens for OpenAI's reasoning models (o1, o3, gpt-5 …),
    which accept no other; max_tokens for all others."""
    seed: NonNegativeInt | None = None
    """Seed sent with each request (plus the sample's number); default: none is sent."""
    response_format: Literal["json_schema", "text"] = "text"
    """"text": LLaVA's two numbers on the first line. "json_schema": strict, where the endpoint has it."""
    sees_images: bool = False
    """Send the image with the text."""
    tokens_per_image: PositiveInt = 1500
    """Maximum tokens of an image, reserved in the rate limits and the budget."""
    timeout_s: PositiveFloat = 120.0
    """Timeout of a request in seconds; a request without a reply by then is uncertain: it may have been billed."""
    max_attempts: PositiveInt = 5
    """Attempts at an item before it is listed as failed; rate-limit refusals (429) do not count."""
    patience_s: PositiveFloat = 1800.0
    """Seconds after which an item deferred by rate limits (429) is listed as failed."""
    reasks: NonNegativeInt = 1
    """Retries of a reply without scores; they are reported and billed."""
    input_dollars: NonNegativeFloat | None = None
    """Price of a million prompt tokens; default: the built-in table."""
    cached_input_dollars: NonNegativeFloat | None = None
    """Price of a million cached prompt tokens; default: input_dollars."""
    output_dollars: NonNegativeFloat | None = None
    """Price of a million output tokens; default: the built-in table."""
    delivery: Literal["sync", "batch"] = "sync"
    """"batch": OpenAI's Batch API, at half the price, within a day."""
    batch_poll_s: PositiveFloat = 30.0
    """Seconds between polls of a batch."""

    @field_validator("base_url")
    @classmethod
    def an_address(cls, value: str) -> str:
        """Reject anything but an http address; strip a trailing slash, which does not make another judge."""
        if not value.startswith(("http://", "https://")):
            raise ValueError("expected an address such as https://api.openai.com/v1")
        return value.rstrip("/")

    @model_validator(mode="after")
    def whole_prices(self) -> Self:
        """Reject one price without the other."""
        if (self.input_dollars is None) != (self.output_dollars is None):
            raise ValueError("judge.input_dollars and judge.output_dollars belong together: give both")
        return self


class LimitsConfig(ConfigSection):
    """Rate limits of each judge, for all reviewers of the cluster together."""

    requests_per_minute: PositiveInt | None = None
    """The account's limit of requests; default: that of the endpoint's headers."""
    tokens_per_minute: PositiveInt | None = None
    """The account's limit of tokens, prompt and output together; default: that of the endpoint's headers."""
    window_s: PositiveFloat = 60.0
    """Length in seconds of the sliding window over which limits apply. 60 matches their names; 1 suits an endpoint that
    enforces 60 a minute as 1 a second."""
    burst_s: PositiveFloat = 1.0
    """Burst allowed after an idle time, in seconds of the limits."""
    max_concurrency: PositiveInt = 64
    """Maximum requests in flight; reduced while the endpoint refuses."""
    arrival_s: PositiveFloat = 2.0
    """Maximum seconds until a sent request reaches the endpoint; windows are lengthened by it, or by the time to the
    reply where that is shorter."""
    give_up_after: PositiveInt = 30
    """Stop the job after so many failed items in a row: the endpoint is unreachable."""


class BudgetConfig(ConfigSection):
    """The budget of a review."""

    dollars: PositiveFloat | None = None
    """Maximum cost of all calls in the ledger, with calls in flight counted at their maximum cost."""


class ReviewConfig(ConfigSection):
    """All settings of a review."""

    review: ReviewSection
    judge: JudgeConfig
    limits: LimitsConfig = LimitsConfig()
    budget: BudgetConfig = BudgetConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig(num_workers=1)

    @model_validator(mode="after")
    def replies_fit_the_benchmark(self) -> Self:
        """Reject a schema where a benchmark's own prompt asks for another form."""
        own = self.review.benchmark in ("mmhal_bench", "object_halbench")
        if own and self.review.mode not in ("pairwise", "single") and self.judge.response_format == "json_schema":
            raise ValueError(
                f"judge.response_format = 'json_schema' does not fit review.benchmark = {self.review.benchmark!r}, "
                "whose prompt asks for its own form: use 'text'"
            )
        return self

    @model_validator(mode="after")
    def results_go_to_mlflow(self) -> Self:
        """Reject trackers that nothing would be written to."""
        check_mlflow_alone(self.tracking)
        return self

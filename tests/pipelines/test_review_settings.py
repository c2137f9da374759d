"""Review recipes load, what does not fit is refused, and everything that travels between processes survives it."""

import pickle
from pathlib import Path

import pytest

from llava_ray.config.recipes import load_settings
from llava_ray.config.review import JudgeConfig, LimitsConfig, ReviewConfig, ReviewSection
from llava_ray.errors import ConfigError
from llava_ray.review.calls import CallPlan, Item, list_judges
from llava_ray.review.headers import Quota, Reported
from llava_ray.review.judge import RequestError
from llava_ray.review.ledger_file import LedgerState, Sent
from llava_ray.review.limiter import LeaseGranted, LeaseRefused, LeaseRequest, Settlement
from llava_ray.review.prices import PRICES, find_price
from llava_ray.review.reviewer import Summary
from llava_ray.review.rubric import build_default_rubric

RECIPES = sorted((Path(__file__).resolve().parents[2] / "pipelines/recipes/review").glob("*.toml"))
INPUTS = ("--questions", "q.jsonl", "--references", "r.jsonl", "--answers", "a.jsonl", "b.jsonl")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_name_dated_judges_with_known_prices(recipe: Path) -> None:
    config = load_settings(ReviewConfig, [str(recipe), *INPUTS])
    assert find_price(config.judge, config.judge.model) is not None
    assert config.judge.model in PRICES  # a dated name, no alias
    assert config.budget.dollars


def test_llavas_own_settings_are_the_defaults() -> None:
    judge = load_settings(ReviewConfig, [*INPUTS, "--judge.model", "m"]).judge
    assert (judge.temperature, judge.max_tokens, judge.response_format) == (0.2, 1024, "text")


def test_a_bare_flag_finds_its_section() -> None:
    config = load_settings(ReviewConfig, [*INPUTS, "--model", "m", "--output", "o", "--requests_per_minute", "5"])
    assert (config.judge.model, config.review.output, config.limits.requests_per_minute) == ("m", "o", 5)
    with pytest.raises(ConfigError, match=r"did you mean 'limits\.tokens_per_minute'"):
        load_settings(ReviewConfig, [*INPUTS, "--judge.model", "m", "--limits.tokens_per_minut", "5"])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rules": "a", "rubric": "b"}, "contradict each other"),
        ({"mode": "pairwise"}, "give two answers files"),
        ({"references": None}, "needs --references FILE"),
        ({"questions": None}, "give --questions FILE, or --benchmark NAME"),
        ({"benchmark": "mm_vet"}, "needs review.data"),
        ({"mode": "single", "rules": "a"}, "drop review.rules"),
        ({"mode": "grade", "references": None}, "needs the truth"),
        ({"answers": ["a", "a"]}, "each once"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(settings: dict[str, object], told: str) -> None:
    fitting = {"questions": "q", "references": "r", "answers": ["a"]}
    ReviewSection.parsed(fitting)
    with pytest.raises(ConfigError, match=told):
        ReviewSection.parsed(fitting | settings)


@pytest.mark.parametrize("name", ["mmhal_bench", "object_halbench"])
def test_a_benchmark_with_its_own_form_takes_no_schema(name: str) -> None:
    about = ["--benchmark", name, "--data", "d", "--answers", "a.jsonl", "--judge.model", "m"]
    assert load_settings(ReviewConfig, about).review.mode == "reference"
    schema = ["--judge.response_format", "json_schema"]
    with pytest.raises(ConfigError, match="whose prompt asks for its own form: use 'text'"):
        load_settings(ReviewConfig, [*about, *schema])
    assert (
        load_settings(ReviewConfig, [*about, *schema, "--review.mode", "single"]).judge.response_format == "json_schema"
    )


def test_what_travels_survives_it() -> None:
    spec = list_judges(JudgeConfig(model="gpt-4o"))[0]
    item = Item("q", "?", ("a", "b"), ("reference", "model"))
    call = CallPlan([item], build_default_rubric("pair"), [spec], both_orders=False, samples=1)[0]
    reported = Reported(Quota(1, 0, 2.0), Quota(), 3.0)
    travellers = [
        spec,
        call,
        LimitsConfig(requests_per_minute=3),
        LeaseRequest("r/1", 10, 0.1),
        LeaseGranted("e"),
        LeaseRefused("broke", "why"),
        Settlement("r/1", "j", "fine", 10, 0.1, 0.0, reported),
        LedgerState(0.5, [Sent("r/1", "j", 1.0, 10, 0.1)], []),
        Summary(done=3),
    ]
    for traveller in travellers:
        assert pickle.loads(pickle.dumps(traveller)) == traveller
    error = pickle.loads(pickle.dumps(RequestError("trouble", "uncertain", "why", reported)))
    assert (error.kind, error.outcome, error.reason, error.reported) == ("trouble", "uncertain", "why", reported)

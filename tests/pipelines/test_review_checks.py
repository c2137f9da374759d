"""What is said before a review begins: keys, budgets, folders. No Ray, no request."""

import json
from pathlib import Path

import pytest
from review_files import flags, write_review_files

import pipelines.review_calls
import pipelines.review_report
from llava_ray.config.review import JudgeConfig
from llava_ray.errors import ConfigError
from llava_ray.review.calls import CallPlan, Item, list_judges, token_limit_name
from llava_ray.review.rubric import build_default_rubric
from pipelines import review_checks
from pipelines.review import main
from pipelines.review_checks import check_key, check_output, is_public_host

RECIPE = str(Path(__file__).resolve().parents[2] / "pipelines/recipes/review/llava_bench.toml")
LOCAL = "http://127.0.0.1:9/v1"
PRICE = ("--judge.input_dollars", "1", "--judge.output_dollars", "2")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def started(*others: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(pipelines.review_calls, "connected", started)
    monkeypatch.setattr(pipelines.review_report, "log_review", lambda *others: None)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return write_review_files(tmp_path / "files", 8)


def plan_of(**settings: object) -> tuple[JudgeConfig, CallPlan]:
    config = JudgeConfig.parsed({"model": "m", **settings})
    item = Item("q", "?", ("a", "b"), ("reference", "model"))
    return config, CallPlan([item], build_default_rubric("pair"), list_judges(config), both_orders=False, samples=1)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("https://api.openai.com/v1", True),
        ("https://openrouter.ai/api/v1", True),
        ("https://8.8.8.8/v1", True),
        ("http://127.0.0.1:8000/v1", False),
        ("https://10.0.0.1/v1", False),
        ("https://localhost:8000/v1", False),
        ("https://judge/v1", False),
        ("https://judge.svc/v1", False),
        ("http://[::1]:8000/v1", False),
    ],
)
def test_judges_of_the_internet_want_a_key(address: str, public: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert is_public_host(address) == public
    config, plan = plan_of(base_url=address)
    if public:
        with pytest.raises(ConfigError, match="environment variable OPENAI_API_KEY"):
            check_key(config, plan)
    else:
        check_key(config, plan)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    check_key(config, plan)


def test_a_key_that_was_named_has_to_be_there_and_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    config, plan = plan_of(base_url=LOCAL, api_key_env="MY_KEY")
    with pytest.raises(ConfigError, match="MY_KEY"):
        check_key(config, plan)
    for key in ("sk-1\n", "sk 1", "sk–1"):
        monkeypatch.setenv("MY_KEY", key)
        with pytest.raises(ConfigError, match="MY_KEY") as refused:
            check_key(config, plan)
        assert key not in str(refused.value)


def test_a_review_without_its_key_is_refused_at_once(files: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        main(flags(files, "https://api.openai.com/v1", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_budget_below_one_call_is_refused_with_its_price(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = flags(files, LOCAL, tmp_path / "out", *PRICE, "--budget.dollars", "0.001")
    with pytest.raises(ConfigError, match=r"budget.dollars = 0.001 is below the price of one call: .* up to \$0\.00"):
        main(base)
    assert not (tmp_path / "out").exists()
    main([*base, "--dry-run"])
    assert "below the price of one call" in capsys.readouterr().out


def test_a_budget_that_is_spent_is_told_without_ray(files: Path, tmp_path: Path) -> None:
    base = flags(files, LOCAL, tmp_path / "out", *PRICE)
    key = next(iter(pipelines.review_run.prepare(base).keys))
    row = {
        "state": "done",
        "key": key,
        "item": "0",
        "scores": [8, 9],
        "content": "8 9",
        "explanation": "",
        "model": "m",
    }
    (tmp_path / "out").mkdir()
    told = row | {"model": "m", "time": 1.0, "dollars": 2.0, "finish_reason": "stop"}
    (tmp_path / "out/ledger.jsonl").write_text(json.dumps(told) + "\n")
    outcome = main([*base, "--budget.dollars", "2"])
    assert outcome is not None
    assert not outcome.complete
    assert outcome.scored
    assert "below the price of one call" in outcome.report["partial_because"]
    assert "$2.0000 of it are spent" in outcome.report["partial_because"]


def test_a_recipes_budget_asks_for_no_price(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = [RECIPE, *flags(files, LOCAL, tmp_path / "out")]
    main([*base, "--dry-run"])
    said = capsys.readouterr().out
    assert "prompt tokens, about" in said
    assert "output tokens, at most 16,384" in said
    assert "$0" not in said
    assert "dollars, " not in said
    assert "the recipe's budget of $10 does not hold" in said
    with pytest.raises(ConfigError, match=r"budget\.dollars needs the price of scripted"):
        main([*base, "--budget.dollars", "1", "--dry-run"])
    main([*base, *PRICE, "--dry-run"])
    assert "dollars, at most" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_sent(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .*/file/out"):
        main(flags(files, LOCAL, tmp_path / "file/out"))
    monkeypatch.setattr(review_checks.shutil, "disk_usage", lambda folder: type("Usage", (), {"total": 9, "free": 9}))
    with pytest.raises(ConfigError, match=r"out has room for 0\.0 MB, and 16 reviews may take .*: make room"):
        main(flags(files, LOCAL, tmp_path / "out"))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gpt-4-0613", "max_tokens"),
        ("gpt-4o-2024-08-06", "max_tokens"),
        ("gpt-5-2025-08-07", "max_completion_tokens"),
        ("openai/gpt-5.1", "max_completion_tokens"),
        ("o1", "max_completion_tokens"),
        ("o3-mini-2025-01-31", "max_completion_tokens"),
        ("o4x", "max_tokens"),
        ("gpt-50", "max_tokens"),
        ("llama-3-8b", "max_tokens"),
        ("qwen/o2b", "max_tokens"),
    ],
)
def test_the_limit_of_a_reply_is_called_as_the_model_wants_it(model: str, name: str) -> None:
    assert token_limit_name(JudgeConfig(model=model), model) == name
    assert token_limit_name(JudgeConfig(model=model, token_limit_name="max_tokens"), model) == "max_tokens"


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_a_review_goes_on_whatever_ends_a_line_in_its_texts(tmp_path: Path, mark: str) -> None:
    _, plan = plan_of()
    review = {"key": "k", "judge": "m", "scores": [8, 9], "content": f"8 9{mark}Good."}
    row = {"question_id": "q", "question": f"a{mark}b", "reviews": [review]}
    (tmp_path / "reviews.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    check_output(tmp_path, plan, {"k"})
    with pytest.raises(ConfigError, match="holds another review, with 1 scores by m"):
        check_output(tmp_path, plan, {"other"})
    check_output(tmp_path / "reviews.jsonl" / "none", plan, {"k"})
    for content in ("[]\n", "7\n", "{}\n", "{", '{"reviews": [1]}'):
        (tmp_path / "reviews.jsonl").write_text(content)
        with pytest.raises(ConfigError, match="is not a review's"):
            check_output(tmp_path, plan, {"k"})

"""Checks before a review starts: key, budget and folder. Nothing is sent before they pass."""

import ipaddress
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from evals.files import read_lines
from llava_ray.config.review import JudgeConfig, ReviewConfig
from llava_ray.errors import ConfigError, DataError
from llava_ray.review.calls import Call, CallPlan
from llava_ray.review.ledger_file import translate_write_errors

_BUDGET_FLAGS = ("--budget.dollars", "--dollars")
_USUAL_KEY = JudgeConfig.model_fields["api_key_env"].default
_BYTES_PER_CALL = 4_000  # of a ledger's lines and a report's rows, without the judge's text
_BYTES_PER_TOKEN = 4
_COPIES = 3  # of a judge's text: ledger, reviews.jsonl, LLaVA's review file
_LOCAL_ENDS = (".local", ".internal", ".lan", ".localdomain", ".svc")


def check_key(config: JudgeConfig, plan: CallPlan) -> None:
    """Check the judges' API key. Raises ConfigError if it is missing or cannot be sent."""
    name = config.api_key_env
    key = os.environ.get(name, "")
    public = [judge.base_url for judge in plan.judges.values() if is_public_host(judge.base_url)]
    if not key and (public or name != _USUAL_KEY):
        whom = public[0] if public else config.base_url
        raise ConfigError(
            f"the environment variable {name} (judge.api_key_env) is not set, and {whom} wants a key: export it (any "
            "word where the judge takes all)"
        )
    if not all(" " < letter <= "~" for letter in key):
        raise ConfigError(
            f"the environment variable {name} (judge.api_key_env) holds spaces, line ends or letters that no key has: "
            "set it again"
        )


def is_public_host(base_url: str) -> bool:
    """Return whether an address is public, so that its judge needs a key."""
    place = urlsplit(base_url)
    host = place.hostname or ""
    try:
        return place.scheme == "https" and ipaddress.ip_address(host).is_global
    except ValueError:
        return place.scheme == "https" and "." in host and not host.endswith(_LOCAL_ENDS)


def budget_of(config: ReviewConfig, plan: CallPlan, arguments: Sequence[str]) -> float | None:
    """Return the effective budget: none if a judge's price is unknown. Raises ConfigError if a flag set it.

    A recipe's budget is of the recipe's judge; who names another one need not know its price.
    """
    unpriced = [judge.model for judge in plan.judges.values() if judge.price is None]
    if config.budget.dollars is None or not unpriced:
        return config.budget.dollars
    if any(argument.partition("=")[0] in _BUDGET_FLAGS for argument in arguments):
        raise ConfigError(
            f"budget.dollars needs the price of {', '.join(unpriced)}: give --judge.input_dollars and "
            "--judge.output_dollars (dollars for a million tokens; 0 for a judge of your own)"
        )
    return None


def unheld_budget(config: ReviewConfig, budget: float | None) -> str:
    """Return a warning that a recipe's budget does not apply, or ""."""
    if config.budget.dollars is None or budget is not None:
        return ""
    return (
        f"the recipe's budget of ${config.budget.dollars:g} does not hold: the judge's price is not known (give "
        "--judge.input_dollars and --judge.output_dollars)"
    )


def too_dear(budget: float | None, spent: float, waiting: Collection[Call]) -> str:
    """Return the reason why not even the cheapest waiting call fits the remaining budget, or ""."""
    if budget is None or not waiting:
        return ""
    price = min(call.dollars for call in waiting)
    if spent + price <= budget:
        return ""
    used = f", and ${spent:.4f} of it are spent" if spent else ""
    return (
        f"budget.dollars = {budget:g} is below the price of one call: it can cost up to ${price:.4f}{used}; raise "
        "--budget.dollars, or lower --judge.max_tokens"
    )


def check_output(output: Path, plan: CallPlan, keys: Collection[str]) -> None:
    """Check that no other review's report would be overwritten. Raises ConfigError."""
    path = output / "reviews.jsonl"
    try:
        rows = [review for row in read_lines(path) for review in row["reviews"]] if path.exists() else []
        scored = {review["key"]: str(review["judge"]) for review in rows if review["scores"] is not None}
    except (DataError, OSError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a review's: choose another --output, or move it away") from error
    lost = [judge for key, judge in scored.items() if key not in keys]
    if lost:
        raise ConfigError(
            f"{output} holds another review, with {len(lost):,} scores by {lost[0]} that this one, by "
            f"{', '.join(plan.judges)}, would overwrite: choose another --output (with --ledger {output}/ledger.jsonl "
            "nothing is paid again that both have)"
        )


def check_disk_room(output: Path, ledger: Path, num_waiting: int, tokens: int) -> None:
    """Check that a folder is writable and its disk has enough space. Raises ConfigError."""
    need = num_waiting * (_BYTES_PER_CALL + _COPIES * _BYTES_PER_TOKEN * tokens)
    for folder in {output, ledger.parent}:
        with translate_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            disk = shutil.disk_usage(folder)
        if disk.total and disk.free < need:
            raise ConfigError(
                f"{folder} has room for {disk.free / 2**20:,.1f} MB, and {num_waiting:,} reviews may take "
                f"{need / 2**20:,.1f} MB: make room there, or choose another --output; nothing was sent"
            )

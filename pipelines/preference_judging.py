"""Pairs judged through the review pool: in both orders, within the budget, each call paid once."""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.reviews import compute_order_metrics
from llava_ray.config.data import MAX_IMAGE_PIXELS
from llava_ray.config.preferences import PreferencesConfig
from llava_ray.errors import BudgetError, ConfigError, JudgeError
from llava_ray.images.reading import open_image, read_bytes
from llava_ray.review.calls import CallPlan, Item, list_judges
from llava_ray.review.faithfulness import build_faithfulness_rubric
from llava_ray.review.ledger_file import read_final_rows, read_ledger_rows
from llava_ray.review.pool import Progress
from llava_ray.review.rubric import read_rubric
from pipelines.preference_pairs import AnswerPair, DecidedPair, judge_pair
from pipelines.preference_questions import ImageFolder, PromptToAnswer
from pipelines.review_calls import CallJob, make_calls
from pipelines.review_checks import check_disk_room, check_key, too_dear
from pipelines.review_results import Judged, collect, top_reason

_JUDGES_TAKE = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8")
_TYPICAL_OUTPUT = 150  # tokens of a verdict
_ROLES = {"human": "User", "gpt": "Assistant", "system": "System"}


@dataclass(frozen=True)
class Judgement:
    """What judges said of pairs: the decided ones, the bias of the place, the cost, and why it ended early."""

    decided: Sequence[DecidedPair]
    order: Mapping[str, Any]
    calls: Mapping[str, int]
    dollars: float | None
    stopped: str = ""
    signal: int = 0
    failures: Mapping[str, Any] = field(default_factory=dict)
    """The number of reviews without scores, and their most common reason."""


def judge_pairs(
    config: PreferencesConfig,
    prompts: Mapping[str, PromptToAnswer],
    pairs: Sequence[AnswerPair],
    folder: Path,
    counts: Counter[str],
) -> Judgement:
    """Have pairs judged, and return those of which every review has the same winner.

    Raises ConfigError for a missing key, BudgetError where no call fits, JudgeError if no judge can be reached.
    """
    job = plan_calls(config, prompts, pairs, folder)
    done = {row["key"] for row in read_final_rows(job.ledger) if row["state"] == "done"}
    by_key: dict[str, int] = {}
    for index, call in enumerate(job.plan):
        by_key.setdefault(call.key, index)  # equal questions about one image have one call
    waiting = [index for key, index in by_key.items() if key not in done]
    progress = Progress(len(by_key), len(by_key) - len(waiting))
    if waiting:
        check_key(config.judge, job.plan)
        check_disk_room(folder, job.ledger, len(waiting), min(config.judge.max_tokens, _TYPICAL_OUTPUT))
        print(f"{len(by_key):,} reviews of {len(pairs):,} pairs, {progress.cached:,} in the ledger already", flush=True)
        spent = sum(row.get("dollars", 0.0) for row in read_ledger_rows(job.ledger) if row["state"] != "sent")
        calls = [job.plan[index] for index in waiting] if job.budget is not None else []
        if why := too_dear(job.budget, spent, calls):
            if not progress.cached:
                raise BudgetError(why)
            progress.broke, progress.stopped = len(waiting), why
        else:
            make_calls(job, waiting, progress)
    return _read_judgement(job, pairs, progress, counts)


def plan_calls(
    config: PreferencesConfig, prompts: Mapping[str, PromptToAnswer], pairs: Sequence[AnswerPair], folder: Path
) -> CallJob:
    """Return the calls that judge pairs. Raises ConfigError for a budget without the judge's price."""
    settings, judge, images = config.preferences, config.judge, ImageFolder(folder)
    rubric = read_rubric(Path(settings.rubric), "pair") if settings.rubric else build_faithfulness_rubric()
    judges = list_judges(judge)
    unpriced = [one.model for one in judges if one.price is None]
    if config.budget.dollars is not None and unpriced:
        raise ConfigError(
            f"budget.dollars needs the price of {', '.join(unpriced)}: give --judge.input_dollars and "
            "--judge.output_dollars (dollars for a million tokens; 0 for a judge of your own)"
        )
    shown = {name: prompts[name].images[0] for name in {pair.question for pair in pairs} if prompts[name].images}
    sent = {name: _judges_image(image, images) for name, image in sorted(shown.items()) if judge.sees_images}
    items = [_item(prompts[pair.question], pair, sent.get(pair.question), config) for pair in pairs]
    plan = CallPlan(items, rubric, judges, both_orders=True, samples=1)
    ledger = Path(settings.ledger) if settings.ledger else folder / "ledger.jsonl"
    return CallJob(plan, ledger, judge, config.limits, config.budget.dollars, settings.num_reviewers, config.cluster)


def is_judgeable(prompt: PromptToAnswer, config: PreferencesConfig) -> bool:
    """Return whether a judge can see all that a question is about: requests have one image."""
    return len(prompt.images) < 2 or not config.judge.sees_images


def _item(prompt: PromptToAnswer, pair: AnswerPair, image: Path | None, config: PreferencesConfig) -> Item:
    """Return a pair as the item of a review."""
    shown = config.preferences.show_truth and prompt.truths
    return Item(
        id=pair.id,
        question=_conversation(prompt),
        answers=(pair.first.text, pair.second.text),
        names=(pair.first.label, pair.second.label),
        context={"caption": [f"Reference answer: {prompt.truths[0]}"]} if shown else None,
        image=image,
        cluster=prompt.id,
    )


def _conversation(prompt: PromptToAnswer) -> str:
    """Return the question, with the conversation before it where there is one."""
    if len(prompt.turns) == 1:
        return prompt.question
    turns = [f"{_ROLES[turn.role]}: {turn.value.replace('<image>', '').strip()}" for turn in prompt.turns]
    return "\n".join(turns)


def _judges_image(image: str | bytes, images: ImageFolder) -> Path:
    """Return a file of an image in a format that judges take, on this machine."""
    content = image if isinstance(image, bytes) else read_bytes(image)
    if content.startswith(_JUDGES_TAKE):
        is_local = isinstance(image, str) and "://" not in image
        return images.path(image if is_local else content)
    file = io.BytesIO()
    open_image(content, "an image", max_pixels=MAX_IMAGE_PIXELS).save(file, "PNG")
    return images.path(file.getvalue())


def _read_judgement(job: CallJob, pairs: Sequence[AnswerPair], progress: Progress, counts: Counter[str]) -> Judgement:
    """Read the verdicts from the ledger, and count what is no preference."""
    reviews: dict[str, list[Judged]] = {}
    judged = collect(job.plan, job.ledger)
    for one in judged:
        reviews.setdefault(one.item.id, []).append(one)
    decided = []
    for pair in pairs:
        some = reviews[pair.id]
        leads = [None if one.review.scores is None else one.review.scores[0] - one.review.scores[1] for one in some]
        verdict = judge_pair(leads, is_open=any(one.row is None for one in some))
        counts[f"{verdict}_pairs" if verdict not in ("first", "second") else "decided_pairs"] += 1
        if verdict in ("first", "second"):
            decided.append(DecidedPair(pair if verdict == "first" else pair.swapped, _evidence(some, job)))
    if not decided and progress.stopped and not (progress.signal or progress.broke):
        raise JudgeError(f"no pair was judged: {progress.stopped}; the same command goes on from what is done")
    stopped = progress.stopped or ("the next call might not fit into the budget" if progress.broke else "")
    num_failed, _, reason = top_reason(judged, job.judge.max_tokens)
    keys = {one.call.key for one in judged}
    rows = [row for row in read_ledger_rows(job.ledger) if row.get("key") in keys]
    states = Counter(row.get("outcome", row["state"]) for row in rows)
    dollars = sum(row.get("dollars", 0.0) for row in rows if row["state"] != "sent")
    return Judgement(
        decided,
        compute_order_metrics([one.review for one in judged]),
        {name: states[name] for name in ("sent", "done", "failed", "refused", "uncertain", "wasted")},
        round(dollars, 6) if job.priced else None,
        stopped if counts["open_pairs"] else "",
        progress.signal,
        {"reviews": num_failed, "most_common": reason} if num_failed else {},
    )


def _evidence(reviews: Sequence[Judged], job: CallJob) -> dict[str, Any]:
    """Return the calls of a decided pair: the scores are in the order in which the judge saw the answers."""
    return {
        "rubric": job.plan.rubric.version,
        "calls": [
            {
                "key": one.call.key,
                "judge": one.call.judge,
                "model": (one.row or {}).get("model"),
                "fingerprint": (one.row or {}).get("fingerprint"),
                "first": one.item.names[0] if one.call.order == "given" else one.item.names[1],
                "scores": (one.row or {}).get("scores"),
            }
            for one in reviews
        ],
    }

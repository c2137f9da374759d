"""A reviewer: sends calls concurrently, each with a lease and after the ledger has recorded it.

For each attempt: lease from the limiter → ``sent`` in the ledger, on the disk → the request → ``done``, ``failed`` or
``returned`` in the ledger, on the disk → the lease settled. Whichever process is killed in between, the ledger shows
what may have been billed.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from llava_ray.config.review import LimitsConfig
from llava_ray.replies import remove_reasoning
from llava_ray.review.actors import call_async
from llava_ray.review.call_batching import CallBatcher
from llava_ray.review.calls import Call, JudgeSpec, with_image
from llava_ray.review.faults import FaultKind as FaultKind
from llava_ray.review.faults import RequestError
from llava_ray.review.headers import Reported
from llava_ray.review.judge import JudgeClient, JudgeReply, OpenAIJudge, Usage
from llava_ray.review.limiter import LeaseGranted, LeaseRefused, LeaseRequest, Settlement, SettlementOutcome
from llava_ray.review.verdict import ReviewVerdict, describe_missing_scores, read_verdict

_OUTCOMES: dict[FaultKind, SettlementOutcome] = {
    "throttled": "throttled",
    "trouble": "trouble",
    "rejected": "fine",
    "fatal": "stop",
    "unparsed": "fine",
}
_LATE = "not sent: the ledger took too long to record it; is its disk slow? raise limits.arrival_s"
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0


@dataclass
class Summary:
    """The numbers of calls by result."""

    done: int = 0
    unparsed: int = 0
    failed: int = 0
    broke: int = 0
    """Over the budget."""
    halted: int = 0
    """Not sent, or not again, because the job stops."""
    others: int = 0
    """Done already, or another reviewer's."""
    failed_in_row: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


@dataclass
class Attempts:
    """The attempts of one call."""

    troubles: int = 0
    reasks: int = 0
    started: float = field(default_factory=time.monotonic)


class NotSentError(Exception):
    """A call without an attempt: "broke", "halted" or "others" (see Summary)."""


class Reviewer:
    """Sends calls to judges; runs as a Ray actor (see ``start_reviewer``), without state worth keeping."""

    def __init__(
        self,
        name: str,
        judges: Mapping[str, JudgeSpec],
        limits: LimitsConfig,
        limiter: ActorHandle,
        ledger: ActorHandle,
    ) -> None:
        """Connect to each judge."""
        self.name = name
        self.specs = judges
        self.limits = limits
        self.limiter, self.ledger = limiter, ledger
        self.judges: dict[str, JudgeClient] = {key: OpenAIJudge.connect(spec) for key, spec in judges.items()}
        self.acquires = {key: self._acquirer(key) for key in judges}
        self.sends: CallBatcher[dict[str, Any], str] = CallBatcher(lambda rows: call_async(ledger, "send", rows))
        self.returns: CallBatcher[dict[str, Any], None] = CallBatcher(
            lambda rows: call_async(ledger, "record_returned", rows)
        )
        self.finishes: CallBatcher[dict[str, Any], None] = CallBatcher(lambda rows: call_async(ledger, "finish", rows))
        self.settles: CallBatcher[Settlement, None] = CallBatcher(lambda some: call_async(limiter, "settle", some))
        self.num_leases = 0

    async def review(self, calls: Sequence[Call]) -> Summary:
        """Make calls concurrently, as the limiter allows; return the numbers of results."""
        claimed = set(await call_async(self.ledger, "claim", [call.key for call in calls], self.name))
        summary = Summary(others=len(calls) - len(claimed))
        await asyncio.gather(*(self._review(call, summary) for call in calls if call.key in claimed))
        return summary

    async def _review(self, call: Call, summary: Summary) -> None:
        attempts, spec = Attempts(), self.specs[call.judge]
        policy = AsyncRetrying(
            sleep=asyncio.sleep,
            retry=retry_if_exception(
                lambda error: isinstance(error, RequestError) and _may_retry(error, attempts, spec)
            ),
            wait=_wait,
            reraise=True,
        )
        try:
            parsed: bool = await policy(self._attempt, call, attempts)
            summary.done += 1
            summary.unparsed += not parsed
            summary.failed_in_row = 0
        except NotSentError as error:
            setattr(summary, str(error), getattr(summary, str(error)) + 1)
        except RequestError as fault:
            if fault.kind == "fatal":
                summary.halted += 1
                return
            await self._fail(call, fault.reason)
            summary.failed += 1
            summary.failed_in_row += 1
            summary.reasons[fault.reason] += 1

    async def _attempt(self, call: Call, attempts: Attempts) -> bool:
        """Send a call once; return whether its reply holds scores. Raises RequestError, NotSentError."""
        lease = await self._lease(call)
        try:
            reply = await self.judges[call.judge].ask(self._body(call))
        except RequestError as fault:
            await self._record_failure(call, lease, fault, time.monotonic())
            raise
        received, spec = time.monotonic(), self.specs[call.judge]
        usage = reply.usage or Usage(call.tokens - spec.config.max_tokens, 0, spec.config.max_tokens)
        dollars = call.dollars  # where the endpoint does not report usage
        if reply.usage and spec.price:
            dollars = spec.price.cost(usage.prompt, usage.output, usage.cached)
        verdict = read_verdict(reply.content, call.kind, as_json=spec.as_json)
        is_empty = not remove_reasoning(reply.content)
        if is_empty or (verdict is None and attempts.reasks < spec.config.reasks):
            reason = describe_missing_scores(reply.content, reply.finish_reason, spec.config.max_tokens)
            empty = RequestError("unparsed", "wasted", reason, reply.reported, is_empty)
            await self._record_failure(call, lease, empty, received, dollars, usage)
            raise empty
        await self.finishes(build_done_row(call, lease, reply, verdict, usage, dollars))
        await self._settle(call, lease, "fine", usage.prompt + usage.output, dollars, received, reply)
        return verdict is not None

    async def _lease(self, call: Call) -> str:
        """Acquire a lease and record it in the ledger; return the lease. Raises NotSentError or RequestError."""
        while True:
            self.num_leases += 1
            lease = f"{self.name}/{self.num_leases}"
            answer = await self.acquires[call.judge](LeaseRequest(lease, call.tokens, call.dollars))
            if isinstance(answer, LeaseRefused):
                if answer.why == "too large":
                    raise RequestError("rejected", "refused", answer.reason)
                raise NotSentError(answer.why)
            granted = time.monotonic()
            refusal = await self.sends(build_sent_row(call, lease, self.name, answer.epoch))
            # If sent later, the request could arrive after the time that the windows assume.
            late = time.monotonic() - granted > self.limits.arrival_s / 2
            if not refusal and not late:
                return lease
            fault = RequestError("trouble", "refused", _LATE)
            if not refusal:
                await self.returns(build_returned_row(call, lease, fault, 0.0, None))
            await self._settle(call, lease, "unused", 0, 0.0, time.monotonic())
            if refusal == "not yours":
                raise NotSentError("others")
            if refusal != "stale":  # stale: the limiter was restarted, so acquire again
                raise fault

    def _body(self, call: Call) -> dict[str, Any]:
        return with_image(call.body, call.image_content) if call.image_content else call.body

    async def _record_failure(
        self,
        call: Call,
        lease: str,
        fault: RequestError,
        received: float,
        dollars: float = 0.0,
        usage: Usage | None = None,
    ) -> None:
        """Record a failed attempt; one that may have been billed counts with its largest cost."""
        cost = call.dollars if fault.outcome == "uncertain" else dollars
        await self.returns(build_returned_row(call, lease, fault, cost, usage))
        tokens = 0.0 if fault.outcome == "refused" else call.tokens
        if usage is not None:
            tokens = usage.prompt + usage.output
        settlement = Settlement(
            lease,
            call.judge,
            _OUTCOMES[fault.kind],
            tokens,
            cost,
            time.monotonic() - received,
            fault.reported,
            f"{call.judge}: {fault.reason}" if len(self.specs) > 1 else fault.reason,
            fault.systematic,
        )
        await self.settles(settlement)

    async def _settle(
        self,
        call: Call,
        lease: str,
        outcome: SettlementOutcome,
        tokens: float,
        dollars: float,
        received: float,
        reply: JudgeReply | None = None,
    ) -> None:
        age = time.monotonic() - received
        reported = reply.reported if reply else Reported()
        await self.settles(Settlement(lease, call.judge, outcome, tokens, dollars, age, reported))

    async def _fail(self, call: Call, reason: str) -> None:
        await self.finishes({"state": "failed", **describe_call(call), "reason": reason})

    def _acquirer(self, judge: str) -> CallBatcher[LeaseRequest, LeaseGranted | LeaseRefused]:
        return CallBatcher(lambda requests: call_async(self.limiter, "acquire", judge, requests))


def _may_retry(fault: RequestError, attempts: Attempts, spec: JudgeSpec) -> bool:
    """Count a fault, and return whether the call may be retried."""
    if fault.kind in ("rejected", "fatal") or time.monotonic() - attempts.started > spec.config.patience_s:
        return False
    if fault.kind == "unparsed":
        attempts.reasks += 1
        return attempts.reasks <= spec.config.reasks
    attempts.troubles += fault.kind == "trouble"
    return attempts.troubles < spec.config.max_attempts


def _wait(state: RetryCallState) -> float:
    """Compute the wait before the next attempt: exponential with full jitter, at least the requested time.

    After a 429 the limiter pauses all requests, so that the call itself need not wait.
    """
    fault = state.outcome.exception() if state.outcome else None
    if not isinstance(fault, RequestError) or fault.kind in ("throttled", "unparsed"):
        return 0.0
    requested = fault.reported.retry_after_s or 0.0
    return max(requested, wait_random_exponential(multiplier=_FIRST_WAIT_S, max=_LONGEST_WAIT_S)(state))


def describe_call(call: Call) -> dict[str, Any]:
    """Return the fields of a call in every row."""
    return {
        "key": call.key,
        "judge": call.judge,
        "item": call.item_id,
        "pair": call.pair,
        "order": call.order,
        "sample": call.sample,
    }


def build_sent_row(call: Call, lease: str, by: str, epoch: str) -> dict[str, Any]:
    """Build the ledger's row of a call that is about to be sent."""
    return {
        "key": call.key,
        "by": by,
        "epoch": epoch,
        "lease": lease,
        "judge": call.judge,
        "tokens": call.tokens,
        "dollars": call.dollars,
    }


def build_returned_row(
    call: Call, lease: str, fault: RequestError, dollars: float, usage: Usage | None
) -> dict[str, Any]:
    """Build the ledger's row of an attempt without result."""
    row = {"key": call.key, "lease": lease, "outcome": fault.outcome, "reason": fault.reason, "dollars": dollars}
    return row | ({"usage": asdict(usage)} if usage else {})


def build_done_row(
    call: Call, lease: str, reply: JudgeReply, verdict: ReviewVerdict | None, usage: Usage, dollars: float
) -> dict[str, Any]:
    """Build the ledger's row of an answered call."""
    return {
        "state": "done",
        **describe_call(call),
        "lease": lease,
        "content": reply.content,
        "scores": verdict.scores if verdict else None,
        "explanation": verdict.explanation if verdict else "",
        "model": reply.model,
        "fingerprint": reply.fingerprint,
        "finish_reason": reply.finish_reason,
        "usage": asdict(usage),
        "dollars": dollars,
        "time": round(time.time(), 3),
    }


def start_reviewer(
    name: str, judges: Mapping[str, JudgeSpec], limits: LimitsConfig, limiter: ActorHandle, ledger: ActorHandle
) -> ActorHandle:
    """Start a reviewer anywhere in the cluster; if it is killed, the pool starts another."""
    # It mostly waits for the network: it reserves no CPU, so that it fits into any cluster.
    kind = ray.remote(Reviewer).options(num_cpus=0, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD")
    return kind.remote(name, judges, limits, limiter, ledger)

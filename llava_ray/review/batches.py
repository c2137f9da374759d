"""Reviews through OpenAI's Batch API: half the price, within a day; no reviewers, no limiter, no cluster.

A batch outlives the job that sent it: the ledger records its calls before it is sent, and its id after; a batch of a
job that was killed in between is found by its name among the endpoint's batches. Calls that expired or failed are sent
again with the next batch.
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import openai
from openai import OpenAI
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from llava_ray.errors import JudgeError
from llava_ray.review.calls import Call, CallPlan, JudgeSpec, with_image
from llava_ray.review.faults import RequestError, content_fault, status_fault, to_plain_line
from llava_ray.review.headers import Reported
from llava_ray.review.judge import NO_KEY, JudgeReply, Usage, read_reply
from llava_ray.review.ledger_file import BATCH, LedgerFile
from llava_ray.review.pool import Progress
from llava_ray.review.rates import Budget
from llava_ray.review.reviewer import build_done_row, build_returned_row, build_sent_row, describe_call
from llava_ray.review.verdict import read_verdict

_MAX_LINES, _MAX_BYTES = 50_000, 190_000_000  # the API's limits are 50,000 lines and 200 MB
_OVER = ("completed", "failed", "expired", "cancelled")
_NAME = "llava_ray"  # key of our name for a batch in its metadata
_EPOCH = "batches"
_NOT_SENT = "its batch was never sent"


@dataclass
class Batches:
    """The calls of one judge that are sent in batches."""

    plan: CallPlan
    spec: JudgeSpec
    ledger: LedgerFile
    client: OpenAI
    budget: Budget
    poll_s: float = 30.0
    sleep: Callable[[float], None] = time.sleep

    def run(self, indices: Sequence[int], progress: Progress) -> Iterator[Progress]:
        """Send waiting calls and wait for batches until all are done; yield the progress at every poll.

        Raises JudgeError where the endpoint takes no batches.
        """
        by_key = {self.plan[index].key: index for index in indices}
        self.ledger.register_limiter(_EPOCH, 0)
        self.budget.spent = self.ledger.account.spent
        rounds_without_progress = 0
        while rounds_without_progress < self.spec.config.max_attempts:
            before = progress.done
            for keys in self._open_batches(by_key).values():
                for key in keys:
                    self.budget.lease(key, self.ledger.entries[key].dollars)
            waiting = [index for key, index in by_key.items() if self._is_waiting(key)]
            progress.broke = 0
            for batch in self._chunks(waiting, progress):
                self._send(batch)
            open_batches = self._open_batches(by_key)
            if not open_batches:
                break
            for by, keys in open_batches.items():
                yield from self._await(by, keys, by_key, progress)
            rounds_without_progress = 0 if progress.done > before else rounds_without_progress + 1
        self._give_up([index for key, index in by_key.items() if self._is_waiting(key)], progress)
        yield progress

    def _open_batches(self, by_key: Mapping[str, int]) -> dict[str, list[str]]:
        """Return this review's calls in open batches, by batch; other reviews with the ledger may have others."""
        ours = {by: [key for key in keys if key in by_key] for by, keys in self.ledger.in_batches().items()}
        return {by: keys for by, keys in ours.items() if keys}

    def _is_waiting(self, key: str) -> bool:
        entry = self.ledger.entries.get(key)
        return entry is None or entry.state in ("new", "claimed", "failed")

    def _chunks(self, waiting: Sequence[int], progress: Progress) -> Iterator[list[Call]]:
        """Yield calls in batches, as long as the budget allows."""
        batch: list[Call] = []
        size = 0
        for index in waiting:
            call = self.plan[index]
            if not self.budget.affords(call.dollars):
                progress.broke += 1
                continue
            self.budget.lease(call.key, call.dollars)
            length = len(self._line(call))
            if batch and (len(batch) == _MAX_LINES or size + length > _MAX_BYTES):
                yield batch
                batch, size = [], 0
            batch.append(call)
            size += length
        if batch:
            yield batch

    def _line(self, call: Call) -> bytes:
        content = call.with_image_content().image_content
        body = with_image(call.body, content) if content else call.body
        row = {"custom_id": call.key, "method": "POST", "url": "/v1/chat/completions", "body": body}
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"

    def _send(self, batch: Sequence[Call]) -> None:
        by = f"{BATCH}{uuid.uuid4().hex[:12]}"
        self.ledger.claim([call.key for call in batch], by)
        content = b"".join(self._line(call) for call in batch)
        file = self._retry(
            lambda: self.client.files.create(file=(f"{by[len(BATCH) :]}.jsonl", content), purpose="batch")
        )
        for call in batch:
            self.ledger.send(build_sent_row(call, f"{by}/{call.key}", by, _EPOCH))
        self.ledger.sync()
        try:
            sent = self.client.batches.create(
                input_file_id=file.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={_NAME: by},
            )
        except openai.APIConnectionError:
            return  # whether it was created is found out by its name when it is polled
        except openai.APIStatusError as error:
            self._return([call.key for call in batch], f"HTTP {error.status_code}: {error.message}")
            reason = status_fault(error, self.spec).reason
            raise JudgeError(f"{self.spec.name} takes no batch: {reason}; use judge.delivery = 'sync'") from error
        if isinstance(sent, str):  # the client returns a reply that is not JSON as text
            self._return([call.key for call in batch], _NOT_SENT)
            raise JudgeError(content_fault(sent.encode(), self.spec, Reported(), "it is a text").reason)
        self.ledger.name_batch(by, sent.id)

    def _await(self, by: str, keys: Sequence[str], by_key: Mapping[str, int], progress: Progress) -> Iterator[Progress]:
        """Poll a batch until it ends, and process its output."""
        name = self.ledger.batches.get(by) or self._find(by)
        if name is None:
            self._return(keys, _NOT_SENT)
            return
        while (batch := self._retry(lambda: self.client.batches.retrieve(name))).status not in _OVER:
            progress.spent, progress.leased = self.budget.spent, self.budget.leased
            yield progress
            self.sleep(self.poll_s)
        for file in (batch.output_file_id, batch.error_file_id):
            if file:
                content = self._retry(lambda file=file: self.client.files.content(file).content)  # type: ignore[misc]
                for line in content.splitlines():
                    self._take(json.loads(line), by_key, progress)
        self._return(self._open_batches(by_key).get(by, ()), f"its batch is {batch.status}")
        self.ledger.sync()

    def _find(self, by: str) -> str | None:
        """Return the id of a batch whose job was killed before it recorded the id."""
        for batch in self._retry(lambda: list(self.client.batches.list(limit=100))):
            if (batch.metadata or {}).get(_NAME) == by:
                self.ledger.name_batch(by, batch.id)
                return str(batch.id)
        return None

    def _take(self, row: Mapping[str, Any], by_key: Mapping[str, int], progress: Progress) -> None:
        """Process one line of a batch's output."""
        key = row["custom_id"]
        if key not in by_key:
            return  # of another review with this ledger, which processes it itself
        call, lease = self.plan[by_key[key]], self.ledger.entries[key].lease
        try:
            reply = _reply(row)
        except RequestError as error:
            dollars = call.dollars if error.outcome == "uncertain" else 0.0
            self.ledger.record_returned(build_returned_row(call, lease, error, dollars, None))
            self.ledger.release([key])
            self.budget.settle(key, dollars)
            progress.reasons[error.reason] += 1
            return
        usage = reply.usage or Usage(call.tokens - self.spec.config.max_tokens, 0, self.spec.config.max_tokens)
        dollars = self.spec.price.cost(usage.prompt, usage.output, usage.cached) if self.spec.price else 0.0
        verdict = read_verdict(reply.content, call.kind, as_json=self.spec.as_json)
        self.ledger.finish(build_done_row(call, lease, reply, verdict, usage, dollars))
        self.budget.settle(key, dollars)
        progress.done += 1
        progress.unparsed += verdict is None

    def _return(self, keys: Sequence[str], reason: str) -> None:
        """Record calls without result and cost."""
        for key in keys:
            row = {"key": key, "lease": self.ledger.entries[key].lease, "outcome": "refused", "reason": reason}
            self.ledger.record_returned(row | {"dollars": 0.0})
            self.budget.settle(key, 0.0)
        self.ledger.release(keys)

    def _give_up(self, waiting: Sequence[int], progress: Progress) -> None:
        """Record calls without any result as failed, unless the budget held some back."""
        if progress.broke:
            return
        reason = progress.reasons.most_common(1)[0][0] if progress.reasons else "no batch returned it"
        for index in waiting:
            self.ledger.finish({"state": "failed", **describe_call(self.plan[index]), "reason": reason})
            progress.failed += 1
        self.ledger.sync()

    def _retry(self, request: Callable[[], Any]) -> Any:
        """Make a free request to the endpoint, with retries."""
        policy = Retrying(
            sleep=self.sleep,
            retry=retry_if_exception(_is_transient),
            stop=stop_after_attempt(8),
            wait=wait_random_exponential(multiplier=0.5, max=60),
            reraise=True,
        )
        try:
            result = policy(request)
        except openai.APIStatusError as error:
            reason = status_fault(error, self.spec).reason
            raise JudgeError(f"{self.spec.name}: {reason}; the same command resumes its batches") from error
        except openai.APIError as error:
            reason = to_plain_line(error.message)
            raise JudgeError(f"{self.spec.name}: {reason}; the same command resumes its batches") from error
        if isinstance(result, str):  # the client returns a reply that is not JSON as text
            reason = content_fault(result.encode(), self.spec, Reported(), "it is a text").reason
            raise JudgeError(f"{self.spec.name}: {reason}")
        return result


def _reply(row: Mapping[str, Any]) -> JudgeReply:
    """Parse the reply in a line of a batch's output. Raises RequestError."""
    response = row.get("response") or {}
    if row.get("error") or response.get("status_code") != 200:
        error = row.get("error") or response.get("body")
        raise RequestError("trouble", "refused", f"in the batch: {json.dumps(error)}")
    return read_reply(json.dumps(response["body"]).encode(), Reported())


def batch_client(spec: JudgeSpec) -> OpenAI:
    """Build a client without retries."""
    key = os.environ.get(spec.config.api_key_env) or NO_KEY
    return OpenAI(base_url=spec.base_url, api_key=key, max_retries=0, timeout=spec.config.timeout_s)


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, openai.APIStatusError):
        return error.status_code == 429 or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError)

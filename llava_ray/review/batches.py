"""OpenAI's Batch API: half the price, within a day, and limits of its own; no reviewers, no limiter, no cluster.

A batch outlives the job that sent it: the ledger knows its calls before it is sent, and its id after; what a job that
was killed in between has sent is found by its name among the endpoint's batches. What expired or failed goes out again
with the next batch.
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
from llava_ray.review.reviewer import described, done_row, returned_row, sent_row
from llava_ray.review.verdict import read_verdict

_MAX_LINES, _MAX_BYTES = 50_000, 190_000_000  # the API's limits are 50,000 lines and 200 MB
_OVER = ("completed", "failed", "expired", "cancelled")
_NAME = "llava_ray"  # of the batch's metadata entry that holds our name of it
_EPOCH = "batches"
_NOT_SENT = "its batch was never sent"


@dataclass
class Batches:
    """The calls of one judge that go out in batches."""

    plan: CallPlan
    spec: JudgeSpec
    ledger: LedgerFile
    client: OpenAI
    purse: Budget
    poll_s: float = 30.0
    sleep: Callable[[float], None] = time.sleep

    def run(self, indices: Sequence[int], progress: Progress) -> Iterator[Progress]:
        """Send what is waiting, wait for what is out, and again; yield the progress at every look.

        Raises JudgeError where the endpoint takes no batches.
        """
        by_key = {self.plan[index].key: index for index in indices}
        self.ledger.adopt(_EPOCH, 0)
        self.purse.spent = self.ledger.account.spent
        rounds_for_nothing = 0
        while rounds_for_nothing < self.spec.config.max_attempts:
            before = progress.done
            for keys in self._out(by_key).values():
                for key in keys:
                    self.purse.lease(key, self.ledger.entries[key].dollars)
            waiting = [index for key, index in by_key.items() if self._is_waiting(key)]
            progress.broke = 0
            for batch in self._chunks(waiting, progress):
                self._send(batch)
            out = self._out(by_key)
            if not out:
                break
            for by, keys in out.items():
                yield from self._await(by, keys, by_key, progress)
            rounds_for_nothing = 0 if progress.done > before else rounds_for_nothing + 1
        self._give_up([index for key, index in by_key.items() if self._is_waiting(key)], progress)
        yield progress

    def _out(self, by_key: Mapping[str, int]) -> dict[str, list[str]]:
        """Return our calls that are out, by batch; another review with this ledger may have some of its own."""
        ours = {by: [key for key in keys if key in by_key] for by, keys in self.ledger.in_batches().items()}
        return {by: keys for by, keys in ours.items() if keys}

    def _is_waiting(self, key: str) -> bool:
        entry = self.ledger.entries.get(key)
        return entry is None or entry.state in ("new", "claimed", "failed")

    def _chunks(self, waiting: Sequence[int], progress: Progress) -> Iterator[list[Call]]:
        """Put calls into batches, as long as the budget allows."""
        batch: list[Call] = []
        size = 0
        for index in waiting:
            call = self.plan[index]
            if not self.purse.affords(call.dollars):
                progress.broke += 1
                continue
            self.purse.lease(call.key, call.dollars)
            length = len(self._line(call))
            if batch and (len(batch) == _MAX_LINES or size + length > _MAX_BYTES):
                yield batch
                batch, size = [], 0
            batch.append(call)
            size += length
        if batch:
            yield batch

    def _line(self, call: Call) -> bytes:
        content = call.loaded().image_content
        body = with_image(call.body, content) if content else call.body
        row = {"custom_id": call.key, "method": "POST", "url": "/v1/chat/completions", "body": body}
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"

    def _send(self, batch: Sequence[Call]) -> None:
        by = f"{BATCH}{uuid.uuid4().hex[:12]}"
        self.ledger.claim([call.key for call in batch], by)
        content = b"".join(self._line(call) for call in batch)
        file = self._asked(
            lambda: self.client.files.create(file=(f"{by[len(BATCH) :]}.jsonl", content), purpose="batch")
        )
        for call in batch:
            self.ledger.send(sent_row(call, f"{by}/{call.key}", by, _EPOCH))
        self.ledger.sync()
        try:
            sent = self.client.batches.create(
                input_file_id=file.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={_NAME: by},
            )
        except openai.APIConnectionError:
            return  # whether it was made is found out when it is asked for
        except openai.APIStatusError as error:
            self._return([call.key for call in batch], f"HTTP {error.status_code}: {error.message}")
            reason = status_fault(error, self.spec).reason
            raise JudgeError(f"{self.spec.name} takes no batch: {reason}; use judge.delivery = 'sync'") from error
        if isinstance(sent, str):  # what is no JSON is handed over as it came
            self._return([call.key for call in batch], _NOT_SENT)
            raise JudgeError(content_fault(sent.encode(), self.spec, Reported(), "it is a text").reason)
        self.ledger.name_batch(by, sent.id)

    def _await(self, by: str, keys: Sequence[str], by_key: Mapping[str, int], progress: Progress) -> Iterator[Progress]:
        """Ask for a batch until it is over, and take in what it brought."""
        name = self.ledger.batches.get(by) or self._find(by)
        if name is None:
            self._return(keys, _NOT_SENT)
            return
        while (batch := self._asked(lambda: self.client.batches.retrieve(name))).status not in _OVER:
            progress.spent, progress.leased = self.purse.spent, self.purse.leased
            yield progress
            self.sleep(self.poll_s)
        for file in (batch.output_file_id, batch.error_file_id):
            if file:
                content = self._asked(lambda file=file: self.client.files.content(file).content)  # type: ignore[misc]
                for line in content.splitlines():
                    self._take(json.loads(line), by_key, progress)
        self._return(self._out(by_key).get(by, ()), f"its batch is {batch.status}")
        self.ledger.sync()

    def _find(self, by: str) -> str | None:
        """Return the id of a batch that was sent by a job that did not live to note it."""
        for batch in self._asked(lambda: list(self.client.batches.list(limit=100))):
            if (batch.metadata or {}).get(_NAME) == by:
                self.ledger.name_batch(by, batch.id)
                return str(batch.id)
        return None

    def _take(self, row: Mapping[str, Any], by_key: Mapping[str, int], progress: Progress) -> None:
        """Take in one line of what a batch brought."""
        key = row["custom_id"]
        if key not in by_key:
            return  # of another review with this ledger, which will ask for itself
        call, lease = self.plan[by_key[key]], self.ledger.entries[key].lease
        try:
            reply = _reply(row)
        except RequestError as error:
            dollars = call.dollars if error.outcome == "uncertain" else 0.0
            self.ledger.give_back(returned_row(call, lease, error, dollars, None))
            self.ledger.release([key])
            self.purse.settle(key, dollars)
            progress.reasons[error.reason] += 1
            return
        usage = reply.usage or Usage(call.tokens - self.spec.config.max_tokens, 0, self.spec.config.max_tokens)
        dollars = self.spec.price.cost(usage.prompt, usage.output, usage.cached) if self.spec.price else 0.0
        verdict = read_verdict(reply.content, call.kind, as_json=self.spec.as_json)
        self.ledger.finish(done_row(call, lease, reply, verdict, usage, dollars))
        self.purse.settle(key, dollars)
        progress.done += 1
        progress.unparsed += verdict is None

    def _return(self, keys: Sequence[str], reason: str) -> None:
        """Note calls that came to nothing and cost nothing."""
        for key in keys:
            row = {"key": key, "lease": self.ledger.entries[key].lease, "outcome": "refused", "reason": reason}
            self.ledger.give_back(row | {"dollars": 0.0})
            self.purse.settle(key, 0.0)
        self.ledger.release(keys)

    def _give_up(self, waiting: Sequence[int], progress: Progress) -> None:
        """List as failed what no batch has brought, but for what the budget has kept back."""
        if progress.broke:
            return
        reason = progress.reasons.most_common(1)[0][0] if progress.reasons else "no batch has brought it"
        for index in waiting:
            self.ledger.finish({"state": "failed", **described(self.plan[index]), "reason": reason})
            progress.failed += 1
        self.ledger.sync()

    def _asked(self, question: Callable[[], Any]) -> Any:
        """Ask the endpoint what costs nothing, again where it does not answer."""
        policy = Retrying(
            sleep=self.sleep,
            retry=retry_if_exception(_passes),
            stop=stop_after_attempt(8),
            wait=wait_random_exponential(multiplier=0.5, max=60),
            reraise=True,
        )
        try:
            answer = policy(question)
        except openai.APIStatusError as error:
            reason = status_fault(error, self.spec).reason
            raise JudgeError(f"{self.spec.name}: {reason}; the same command goes on with its batches") from error
        except openai.APIError as error:
            reason = to_plain_line(error.message)
            raise JudgeError(f"{self.spec.name}: {reason}; the same command goes on with its batches") from error
        if isinstance(answer, str):  # what is no JSON is handed over as it came
            reason = content_fault(answer.encode(), self.spec, Reported(), "it is a text").reason
            raise JudgeError(f"{self.spec.name}: {reason}")
        return answer


def _reply(row: Mapping[str, Any]) -> JudgeReply:
    """Return the reply in a line of a batch's output. Raises RequestError."""
    response = row.get("response") or {}
    if row.get("error") or response.get("status_code") != 200:
        told = row.get("error") or response.get("body")
        raise RequestError("trouble", "refused", f"in the batch: {json.dumps(told)}")
    return read_reply(json.dumps(response["body"]).encode(), Reported())


def batch_client(spec: JudgeSpec) -> OpenAI:
    """Return a client that sends a request once."""
    key = os.environ.get(spec.config.api_key_env) or NO_KEY
    return OpenAI(base_url=spec.base_url, api_key=key, max_retries=0, timeout=spec.config.timeout_s)


def _passes(error: BaseException) -> bool:
    if isinstance(error, openai.APIStatusError):
        return error.status_code == 429 or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError)

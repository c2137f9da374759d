#!/usr/bin/env python
"""A judge over HTTP that does what its script says: limits, refusals, faults; and counts what it was paid for.

In a process of its own (``scripted_judge({...})``), so that it outlives killed drivers and shares no interpreter.
``GET /stats`` tells what arrived; ``POST /script`` changes the script.

A script's keys: ``requests_per_minute``, ``tokens_per_minute``, ``window_s`` (enforced over sliding windows),
``announce`` (send x-ratelimit headers), ``latency_s``, ``faults`` (name to share: 429, 500, 502, hang, malformed, slow,
drop, unparsed), ``retry_after`` (of refusals), ``storm`` ([from, to] in seconds, all 429), ``quota`` (paid requests
until insufficient_quota), ``drift`` ([seconds, requests_per_minute]), ``status`` (say nothing but this), ``keep``
(request texts kept), ``seed``, ``likes_first`` (points for the answer that is shown first), ``reliability`` (share of
verdicts that prefer the answer that equals the context's reference; by chance where none or both do). Seconds count
from the first request. ``raw`` (a body, its ``type`` and ``code``, instead of any reply), ``content`` (what every reply
says, with its ``finish_reason``), ``hold_after`` (requests that are answered; the others wait for ``POST /release``).

Batches: ``batch_s`` (until they are over), ``batch_faults`` (share of lines that fail), ``expire`` (share left undone).
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aiohttp import web

ANSWER = re.compile(r"\[(?:\w+) ([12])\]\n(.*?)\n\n\[End of", re.DOTALL)
ALONE = re.compile(r"\[Assistant\]\n(.*?)\n\n\[End of", re.DOTALL)
TRUTH = re.compile(r"Reference answer: ([^\n]*)")
HANG_S = 3600.0
SLOW_PIECES, SLOW_PIECE_S = 8, 0.15


class ScriptedJudge:
    """The server's state."""

    def __init__(self, script: dict[str, Any]) -> None:
        self.script = script
        self.started = time.monotonic()
        self.arrivals: list[tuple[float, int, str]] = []
        self.window: deque[tuple[float, int]] = deque()
        self.window_tokens = 0
        self.paid: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.texts: list[Any] = []
        self.in_flight = self.most_in_flight = 0
        self.released = asyncio.Event()
        self.num_held = 0
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        if not self.seen:  # how long a client takes to start is its own affair
            self.started = time.monotonic()
        now = time.monotonic() - self.started
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self.react(request, body, now)
        finally:
            self.in_flight -= 1

    async def react(self, request: web.Request, body: dict[str, Any], now: float) -> web.StreamResponse:
        shown = body["messages"][-1]["content"]
        text = shown if isinstance(shown, str) else shown[-1]["text"]
        if self.script.get("keep"):
            self.texts.append(body)
        name = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
        self.seen[name] += 1
        if "raw" in self.script:
            self.outcomes["raw"] += 1
            self.arrivals.append((now, 0, "raw"))
            script = self.script
            return web.Response(
                text=script["raw"], status=script.get("code", 200), content_type=script.get("type", "application/json")
            )
        fault = self.fault(name, now)
        reply = "I cannot say." if fault == "unparsed" else self.script.get("content", self.verdict(text, body))
        usage = {"prompt_tokens": len(text) // 4, "completion_tokens": max(1, len(reply) // 4)}
        tokens = sum(usage.values())
        fault = self.refusal(now, tokens) or fault
        self.outcomes[fault or "fine"] += 1
        self.arrivals.append((now, tokens, fault))
        number = len(self.arrivals)
        unpaid = fault == "quota" or (fault.isdigit() and fault != "502")
        if not unpaid:  # behind a bad gateway, the judge may well have done its work
            self.window.append((now, tokens))
            self.window_tokens += tokens
            self.paid[name] += 1
        if unpaid or fault == "502":
            return self.refuse(fault, now)
        await asyncio.sleep(self.script.get("latency_s", 0))
        if number > self.script.get("hold_after", number):
            self.num_held += 1
            await self.released.wait()
            self.num_held -= 1
        if fault == "hang":
            await asyncio.sleep(HANG_S)
        if fault == "drop":
            assert request.transport is not None
            request.transport.abort()
        ended = self.script.get("finish_reason", "stop")
        payload = {
            "id": name,
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "system_fingerprint": "scripted",
            "choices": [{"index": 0, "finish_reason": ended, "message": {"role": "assistant", "content": reply}}],
            "usage": usage | {"total_tokens": tokens},
        }
        content = json.dumps(payload).encode()
        if fault == "malformed":
            content = content[: len(content) // 2]
        headers = self.headers(now)
        if fault != "slow":
            return web.Response(body=content, content_type="application/json", headers=headers)
        response = web.StreamResponse(headers=headers | {"content-type": "application/json"})
        await response.prepare(request)
        size = -(-len(content) // SLOW_PIECES)
        for start in range(0, len(content), size):
            await response.write(content[start : start + size])
            await asyncio.sleep(SLOW_PIECE_S)
        await response.write_eof()
        return response

    def fault(self, name: str, now: float) -> str:
        """What goes wrong with this request: by its content and how often it came, not by chance."""
        script = self.script
        if "status" in script:
            return str(script["status"])
        start, end = script.get("storm", (0, 0))
        if start <= now < end:
            return "429"
        if "quota" in script and sum(self.paid.values()) >= script["quota"]:
            return "quota"
        draw = (
            int(hashlib.sha256(f"{script.get('seed', 0)}{name}{self.seen[name]}".encode()).hexdigest()[:8], 16) / 16**8
        )
        for kind, share in script.get("faults", {}).items():
            if draw < share:
                return kind
            draw -= share
        return ""

    def limit(self, what: str, now: float) -> float | None:
        drift = self.script.get("drift")
        if what == "requests" and drift and now >= drift[0]:
            return drift[1]
        return self.script.get(f"{what}_per_minute")

    def trim(self, now: float) -> float:
        length = self.script.get("window_s", 60.0)
        while self.window and self.window[0][0] <= now - length:
            self.window_tokens -= self.window.popleft()[1]
        return length / 60.0

    def refusal(self, now: float, tokens: int) -> str:
        share = self.trim(now)
        requests, most_tokens = self.limit("requests", now), self.limit("tokens", now)
        if requests is not None and len(self.window) + 1 > requests * share:
            return "429"
        if most_tokens is not None and self.window_tokens + tokens > most_tokens * share:
            return "429"
        return ""

    def headers(self, now: float) -> dict[str, str]:
        if not self.script.get("announce"):
            return {}
        share, told = self.trim(now), {}
        used = {"requests": len(self.window), "tokens": self.window_tokens}
        for what, amount in used.items():
            limit = self.limit(what, now)
            if limit is not None:
                told[f"x-ratelimit-limit-{what}"] = str(int(limit))
                told[f"x-ratelimit-remaining-{what}"] = str(max(0, int((limit * share - amount) / share)))
                wait = self.window[0][0] + share * 60 - now if self.window else 0.0
                told[f"x-ratelimit-reset-{what}"] = f"{int(wait * 1000)}ms"
        return told

    def refuse(self, fault: str, now: float) -> web.Response:
        headers = self.headers(now)
        if "retry_after" in self.script:
            headers["retry-after"] = str(self.script["retry_after"])
        status = 429 if fault == "quota" else int(fault)
        code = "insufficient_quota" if fault == "quota" else "rate_limit_exceeded" if status == 429 else "scripted"
        error = {"message": f"scripted {fault}", "type": code, "code": code}
        return web.json_response({"error": error}, status=status, headers=headers)

    def reliable(self, text: str, body: dict[str, Any]) -> list[int]:
        """Scores that prefer the answer that is the reference one, with the script's reliability."""
        truth = TRUTH.search(text)
        assert truth is not None
        right = [answer.strip().rstrip(".").lower() == truth[1].strip().lower() for _, answer in ANSWER.findall(text)]
        digits = hashlib.sha256(f"{self.script.get('seed', 0)}{json.dumps(body, sort_keys=True)}".encode()).hexdigest()
        draw = int(digits[:8], 16) / 16**8
        share = 0.5 if right[0] == right[1] else self.script["reliability"]
        first = (draw < share) == (right[0] or not right[1])
        return [9, 2] if first else [2, 9]

    def verdict(self, text: str, body: dict[str, Any]) -> str:
        """Scores that hang on the answers' words alone, whatever their order."""
        scores = [score_of(answer) for _, answer in ANSWER.findall(text)] or [score_of(a) for a in ALONE.findall(text)]
        if "reliability" in self.script:
            scores = self.reliable(text, body)
        grade = not scores
        if grade:
            scores = [round((score_of(text) - 1) / 9, 1)]
        if len(scores) > 1 and self.script.get("likes_first"):
            scores[0] = min(10, scores[0] + self.script["likes_first"])
        why = "Because of the words."
        if "response_format" in body:
            names = ["correctness"] if grade else ["score_1", "score_2"] if len(scores) > 1 else ["score"]
            return json.dumps({"explanation": why, **dict(zip(names, scores, strict=True))})
        return f"{' '.join(f'{score:g}' for score in scores)}" + ("" if grade else f"\n{why}")

    async def upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        name = f"file-{len(self.files)}"
        self.files[name] = form["file"].file.read()  # type: ignore[union-attr]
        return web.json_response({"id": name, "object": "file", "purpose": form["purpose"]})

    async def download(self, request: web.Request) -> web.Response:
        return web.Response(body=self.files[request.match_info["name"]])

    async def create_batch(self, request: web.Request) -> web.Response:
        asked = await request.json()
        name = f"batch_{len(self.batches)}"
        self.batches[name] = asked | {"id": name, "object": "batch", "status": "in_progress", "made": time.monotonic()}
        if self.script.get("lose_create"):
            assert request.transport is not None
            request.transport.abort()
        return web.json_response(self.shown(self.batches[name]))

    async def list_batches(self, request: web.Request) -> web.Response:
        del request
        return web.json_response(
            {"object": "list", "data": [self.shown(batch) for batch in self.batches.values()], "has_more": False}
        )

    async def get_batch(self, request: web.Request) -> web.Response:
        batch = self.batches[request.match_info["name"]]
        if batch["status"] == "in_progress" and time.monotonic() - batch["made"] > self.script.get("batch_s", 0):
            self.carry_out(batch)
        return web.json_response(self.shown(batch))

    def carry_out(self, batch: dict[str, Any]) -> None:
        done, failed = [], []
        lines = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        for row in lines:
            name = hashlib.sha256(json.dumps(row["body"], sort_keys=True).encode()).hexdigest()[:16]
            self.seen[name] += 1
            draw = int(hashlib.sha256(f"{name}{self.seen[name]}".encode()).hexdigest()[:8], 16) / 16**8
            answer: dict[str, Any] = {"custom_id": row["custom_id"], "response": None, "error": None}
            if draw < self.script.get("expire", 0):
                failed.append(answer | {"error": {"code": "batch_expired", "message": "too late"}})
                continue
            if draw < self.script.get("expire", 0) + self.script.get("batch_faults", 0):
                failed.append(answer | {"response": {"status_code": 500, "body": {"error": {"message": "scripted"}}}})
                continue
            self.paid[name] += 1
            text = row["body"]["messages"][-1]["content"]
            reply = {"role": "assistant", "content": self.script.get("content", self.verdict(text, row["body"]))}
            usage = {"prompt_tokens": len(text) // 4, "completion_tokens": 5}
            body = {
                "model": row["body"]["model"],
                "choices": [{"message": reply, "finish_reason": "stop"}],
                "usage": usage,
            }
            done.append(answer | {"response": {"status_code": 200, "body": body}})
        for kind, rows in (("output", done), ("error", failed)):
            batch[f"{kind}_file_id"] = f"file-{len(self.files)}" if rows else None
            self.files[f"file-{len(self.files)}"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
        batch["status"] = "expired" if self.script.get("expire") else "completed"

    def shown(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"created_at": 0, "output_file_id": None, "error_file_id": None} | batch

    async def stats(self, request: web.Request) -> web.Response:
        del request
        return web.json_response(
            {
                "arrivals": self.arrivals,
                "paid": self.paid,
                "seen": self.seen,
                "outcomes": self.outcomes,
                "texts": self.texts,
                "most_in_flight": self.most_in_flight,
                "held": self.num_held,
                "batches": len(self.batches),
            }
        )

    async def release(self, request: web.Request) -> web.Response:
        del request
        self.released.set()  # those that come later go through, too
        return web.json_response({})

    async def change(self, request: web.Request) -> web.Response:
        self.script = await request.json()
        self.released = asyncio.Event()
        self.started = time.monotonic()
        self.arrivals, self.texts, self.window, self.window_tokens = [], [], deque(), 0
        self.files, self.batches = {}, {}
        for counter in (self.paid, self.seen, self.outcomes):
            counter.clear()
        return web.json_response({})


def score_of(answer: str) -> int:
    """A score of 1 to 10 for an answer."""
    return 1 + int(hashlib.sha256(answer.encode()).hexdigest()[:8], 16) % 10


class Remote:
    """What a test has of a running judge."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url

    def call(self, path: str, body: Any = None) -> Any:
        address = self.base_url.removesuffix("/v1") + path
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(address, data), timeout=60) as reply:
            return json.load(reply)

    def stats(self) -> dict[str, Any]:
        return self.call("/stats")

    def play(self, **script: Any) -> None:
        """Begin anew with another script."""
        self.call("/script", script)


@contextlib.contextmanager
def scripted_judge(**script: Any) -> Iterator[Remote]:
    """A running judge."""
    command = [sys.executable, str(Path(__file__).resolve()), "--script", json.dumps(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Remote(f"http://127.0.0.1:{int(process.stdout.readline())}/v1")
        finally:
            process.terminate()


async def serve(script: dict[str, Any]) -> None:
    judge = ScriptedJudge(script)
    app = web.Application(client_max_size=2**26)
    app.router.add_post("/v1/chat/completions", judge.answer)
    app.router.add_post("/v1/files", judge.upload)
    app.router.add_get("/v1/files/{name}/content", judge.download)
    app.router.add_post("/v1/batches", judge.create_batch)
    app.router.add_get("/v1/batches", judge.list_batches)
    app.router.add_get("/v1/batches/{name}", judge.get_batch)
    app.router.add_get("/stats", judge.stats)
    app.router.add_post("/script", judge.change)
    app.router.add_post("/release", judge.release)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    parent = os.getppid()
    while os.getppid() == parent:  # a test that was killed leaves nobody behind
        await asyncio.sleep(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--script", type=json.loads, default={})
    asyncio.run(serve(parser.parse_args().script))

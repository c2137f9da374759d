"""Clients that ask a service as many do at once, and keep count of how each request ended."""

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
from serving import asking


@dataclass
class Ends:
    """How requests ended: answered, refused (429 with Retry-After), lost (a clear error), or wrongly."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    num_tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)
    moments: list[tuple[float, str]] = field(default_factory=list)
    """(time, how) of each end."""

    def add(self, how: str) -> None:
        self.counts[how] += 1
        self.moments.append((time.monotonic(), how))


async def one(client: openai.AsyncOpenAI, text: str, ends: Ends) -> float:
    """Ask one question as a stream, check that the answer is its own, and return how long to wait after it."""
    start, said, first = time.monotonic(), [], None
    try:
        async for chunk in await client.chat.completions.create(**asking(text), stream=True):
            piece = chunk.choices[0].delta.content or ""
            if piece and first is None:
                first = time.monotonic()
            said.append(piece)
    except openai.RateLimitError as error:
        ends.add("refused")
        return float(error.response.headers["retry-after"])
    except openai.APITimeoutError:
        ends.add("hung")
        ends.wrong.append(f"hung: {text[:30]}")
        return 0.0
    except openai.APIError as error:
        ends.add("lost")
        if "was lost" not in str(error):
            ends.wrong.append(f"unclear: {error}")
        return 0.1
    if "".join(said) == text.strip():
        ends.add("answered")
        ends.num_tokens += len(text.split())
        ends.first_token_s.append((first or start) - start)
    else:
        ends.add("mixed up")
        ends.wrong.append(f"{text[:30]!r} got {''.join(said)[:60]!r}")
    return 0.0


async def crowd(
    address: str, num_clients: int, seconds: float, words: int, ends: Ends, patience: Callable[[float], float] = float
) -> Ends:
    """Let so many clients ask one question after the other, each of its own words, for so long."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    end = time.monotonic() + seconds
    async with openai.AsyncOpenAI(
        base_url=f"{address}/v1",
        api_key="none",
        max_retries=0,
        timeout=seconds + 120,
        http_client=httpx.AsyncClient(limits=limits, timeout=seconds + 120),
    ) as client:

        async def person(number: int) -> None:
            turn = 0
            while time.monotonic() < end:
                text = f"client {number} turn {turn} " + " ".join(f"w{number}x{index}" for index in range(words))
                wait = await one(client, text, ends)
                await asyncio.sleep(patience(wait))
                turn += 1

        await asyncio.gather(*(person(number) for number in range(num_clients)))
    return ends


def memory_of(pids: list[int]) -> float:
    """Resident MiB of some processes together."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total / 2**20


def serve_pids() -> list[int]:
    """The processes of Serve that descend from this one."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")

    def ours(pid: int) -> bool:
        while pid > 1:
            if pid == os.getpid():
                return True
            pid = parents.get(pid, 0)
        return False

    return [
        pid for pid, name in names.items() if name.startswith(("ray::ServeReplica", "ray::ProxyActor")) and ours(pid)
    ]

"""The service over a tiny random model with tools, in this process, for clients of all kinds."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
from engines import started
from serving import asking, served
from tool_models import make_tool_parts

from llava_ray.deployments.front import build_front
from llava_ray.deployments.gateway import LocalGateway
from llava_ray.deployments.http.routes import Front
from llava_ray.deployments.replica import Replica
from llava_ray.deployments.settings import ServeSettings
from llava_ray.generate.builtin.builtin_engine import BuiltinEngine

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Tell it.", "parameters": PARAMETERS}}
TIME = {"type": "function", "function": {"name": "get_time"}}


class Loop:
    """An event loop in a thread, on which engines of a module's tests live."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(120)


class Service:
    """An address with an engine behind it."""

    def __init__(self, address: str) -> None:
        self.http = httpx.Client(base_url=address, timeout=120)
        self.openai = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)

    def ask(self, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json={**asking("which?"), "model": "tiny", **fields})


@contextlib.contextmanager
def service(root: Path, name: str) -> Iterator[Service]:
    made = ServeSettings.parsed({"model": "tiny@somewhere", "max_num_seqs": 8, "max_tokens": 300})
    [source] = made.sources

    async def begin() -> BuiltinEngine:
        return await started(make_tool_parts(root, name))

    loop = Loop()
    engine = loop.run(begin())
    gateway = LocalGateway({source: Replica(OnLoop(engine, loop.loop), source, made)})
    with served(build_front(Front(gateway, made, ()))) as address:
        yield Service(address)
    loop.run(engine.stop())
    loop.loop.call_soon_threadsafe(loop.loop.stop)


class OnLoop:
    """An engine of another event loop, whose chunks are passed over as they come."""

    def __init__(self, engine: BuiltinEngine, loop: asyncio.AbstractEventLoop) -> None:
        self.engine = engine
        self.loop = loop

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    async def read_prompt(self, *arguments: Any) -> Any:
        return await asyncio.wrap_future(
            asyncio.run_coroutine_threadsafe(self.engine.read_prompt(*arguments), self.loop)
        )

    async def read_ids(self, *arguments: Any) -> Any:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self.engine.read_ids(*arguments), self.loop))

    async def generate(self, request: Any) -> Any:
        ours, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

        async def pump() -> None:
            try:
                async for chunk in self.engine.generate(request):
                    ours.call_soon_threadsafe(queue.put_nowait, chunk)
                ours.call_soon_threadsafe(queue.put_nowait, None)
            except Exception as error:  # noqa: BLE001 - raised on the other loop
                ours.call_soon_threadsafe(queue.put_nowait, error)

        pumping = asyncio.run_coroutine_threadsafe(pump(), self.loop)
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            pumping.cancel()

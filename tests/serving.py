"""A hand-written engine that echoes, at a chosen speed, and what else tests of the service share."""

import asyncio
import base64
import contextlib
import io
import json
import os
import socket
import struct
import threading
import urllib.parse
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path

import uvicorn
from pictures import picture
from PIL import Image
from starlette.types import ASGIApp

from llava_ray.deployments.model_source import ModelSource
from llava_ray.deployments.settings import ServeSettings
from llava_ray.errors import ModelError, RecordError
from llava_ray.generate.engine import EngineStats, GenerationChunk, GenerationRequest, ModelCard, TokenLogprob
from llava_ray.generate.readings import PromptReading


class EchoEngine:
    """Answers with the sizes of the images and the words of the last question, one word a token.

    PID in a question is said as the process's id.

    Follows the Engine protocol. ``max_num_seqs`` answers run at a time, the others wait.
    """

    def __init__(
        self,
        name: str = "echo",
        *,
        prefill_s: float = 0.0,
        token_s: float = 0.0,
        max_num_seqs: int = 32,
        adapters: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.prefill_s = prefill_s
        self.token_s = token_s
        self.adapters = adapters
        self.slots = asyncio.Semaphore(max_num_seqs)
        self.running: set[str] = set()
        self.waiting: set[str] = set()
        self.seen: list[GenerationRequest] = []
        self.num_cancelled = 0
        self.num_tokens = 0
        self.num_prompt_tokens = 0
        self.broken: str | None = None
        self.loaded: dict[str, Path] = {}
        """Adapters that were loaded after the start, with their folders."""
        self.num_loads = 0
        self.load_s = 0.0
        self.load_error: Exception | None = None

    @property
    def card(self) -> ModelCard:
        return ModelCard(
            self.name, max_model_len=2048, vision=True, template="v1", adapters=self.adapters, has_features=True
        )

    async def start(self) -> None:
        await asyncio.sleep(0)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        self.seen.append(request)
        if self.broken is not None:
            raise ModelError(self.broken)
        if request.features is not None:
            read = PromptReading(vector=struct.pack("<2f", 1.0, len(request.prompt or "")))
            yield GenerationChunk("", (), finish_reason="stop", num_prompt_tokens=1, reading=read)
            return
        said = request.turns[-1].value if request.turns else request.prompt or ""
        markers = sum(turn.value.count("<image>") for turn in request.turns)
        if markers != len(request.images):
            raise RecordError(f"{markers} markers, {len(request.images)} images", reason="image_count")
        sizes = ["{}x{}".format(*Image.open(io.BytesIO(data)).size) for data in request.images]
        extra = [request.model] if request.model else []
        words = [*extra, *sizes, *said.replace("<image>", "").replace("PID", str(os.getpid())).split()]
        num_prompt = len(said.split()) + 16 * len(sizes)
        finished = False
        self.waiting.add(request.request_id)
        try:
            async with self.slots:
                self.waiting.discard(request.request_id)
                self.running.add(request.request_id)
                await asyncio.sleep(self.prefill_s)
                self.num_prompt_tokens += num_prompt
                async for chunk in self.words(request, words, num_prompt):
                    yield chunk
                finished = True
        finally:
            self.running.discard(request.request_id)
            self.waiting.discard(request.request_id)
            self.num_cancelled += not finished

    async def read_prompt(self, request: GenerationRequest) -> PromptReading:
        text = request.prompt or "".join(turn.value for turn in request.turns)
        return PromptReading(tuple(range(len(text.split()))), tuple(text.split()))

    async def read_ids(self, token_ids: Sequence[int], model: str | None, field: str) -> str:
        return " ".join(map(str, token_ids))

    async def words(
        self, request: GenerationRequest, words: list[str], num_prompt: int
    ) -> AsyncGenerator[GenerationChunk, None]:
        sampling, text = request.sampling, ""
        for index, word in enumerate(words):
            piece = f" {word}" if index else word
            stopped = any(stop in text + piece for stop in sampling.stop)
            text += piece
            self.num_tokens += 1
            reason = "stop" if stopped or index == len(words) - 1 else None
            if reason is None and index + 1 == sampling.max_tokens:
                reason = "length"
            logprobs = ()
            if sampling.logprobs is not None:
                top = ((index, piece, -0.5), (index + 1, "other", -1.5))[: sampling.logprobs]
                logprobs = (TokenLogprob(index, piece, -0.5, top),)
            yield GenerationChunk("" if stopped else piece, (index,), logprobs, reason, num_prompt)
            if reason is not None:
                return
            await asyncio.sleep(self.token_s)

    async def load_adapter(self, name: str, folder: str | Path) -> None:
        self.num_loads += 1
        await asyncio.sleep(self.load_s)
        if self.load_error is not None:
            raise self.load_error
        if not (Path(folder) / "adapter_config.json").is_file():
            raise ModelError(f"{folder} holds no adapter")
        assert name not in self.loaded
        self.loaded[name] = Path(folder)

    async def unload_adapter(self, name: str) -> None:
        await asyncio.sleep(0)
        assert not any(request.model == name for request in self.seen if request.request_id in self.running)
        del self.loaded[name]

    async def cancel(self, request_id: str) -> None:
        raise NotImplementedError  # the service leaves the iterator

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            kv_tokens_used=16 * len(self.running),
            kv_tokens_capacity=1024,
            prompt_tokens=self.num_prompt_tokens,
            generation_tokens=self.num_tokens,
            image_cache_hits=0,
            image_cache_queries=0,
            num_cancelled=self.num_cancelled,
        )

    def check_health(self) -> None:
        if self.broken is not None:
            raise ModelError(self.broken)

    async def stop(self) -> None:
        self.slots = asyncio.Semaphore(0)


def make_engine(source: ModelSource, settings: ServeSettings) -> EchoEngine:
    """What ``engine=serving:make_engine`` calls; the model's path holds the speeds, ``echo?token_s=0.01``."""
    speeds = {key: float(value) for key, value in urllib.parse.parse_qsl(source.path.partition("?")[2])}
    adapters = tuple(name for name, _ in source.adapters)
    return EchoEngine(source.name, max_num_seqs=settings.max_num_seqs, adapters=adapters, **speeds)


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def asking(text: str, *images: str, **fields: object) -> dict[str, object]:
    """A chat of one question."""
    parts: list[dict[str, object]] = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    return {
        "model": "echo",
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
        **fields,
    }


@contextlib.contextmanager
def served(app: ASGIApp, host: str = "127.0.0.1") -> Iterator[str]:
    """A real uvicorn on a free port of this machine, in a thread; yields its address."""
    config = uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    listener = socket.socket()
    listener.bind((host, 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive(), "the app did not start; the log above says why"
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
    listener.close()


def write_examples(folder: Path) -> str:
    """Write two questions to begin with, the first about an image of 384 x 384 pixels; return their file."""
    (folder / "shape.png").write_bytes(picture(384, 384, colour="blue"))
    rows = [{"text": "What shape is in this image?", "image": "shape.png"}, {"text": "What is it for?"}]
    (folder / "examples.json").write_text(json.dumps(rows))
    return str(folder / "examples.json")

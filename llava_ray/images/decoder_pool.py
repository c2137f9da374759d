"""A pool of processes that decode images, and are killed when an image takes too long or its client has left.

A few slots are shared by all clients. An image that takes longer than most releases its slot and continues at a low
priority, or waits until fewer such images are running, so that slow images never block the others.
"""

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_ray.errors import ImageError
from llava_ray.images.anyres import Size
from llava_ray.images.decoder_starter import DecoderProcess, DecoderReply, DecoderStarter
from llava_ray.images.geometry import ImageSpec
from llava_ray.images.views import OpenedImage

_WALL_PER_CPU = 3.0  # wall time may exceed CPU time by this factor on a busy machine
_MORE_MOMENTS = 3


@dataclass(frozen=True)
class DecodeLimits:
    """Limits of concurrent images and of the time of one image."""

    cpu_s: float = 10.0
    """Seconds of CPU time for one image."""
    num_places: int = 4
    """Concurrent fast images."""
    num_slow: int = 8
    """Concurrent slow images, which have released their slot."""
    patience_s: float = 0.25
    """Seconds after which an image releases its slot."""


class DecoderPool:
    """A bounded number of decoder processes, started on demand. Implements ``views.ImageDecoder``."""

    def __init__(self, limits: DecodeLimits | None = None) -> None:
        """Create an empty pool; processes start on demand."""
        self.limits = limits or DecodeLimits()
        most = self.limits.num_places + self.limits.num_slow
        self._places = asyncio.Semaphore(self.limits.num_places)
        self._slow = asyncio.Semaphore(self.limits.num_slow)
        self._threads = ThreadPoolExecutor(most, thread_name_prefix="image-decoders")
        self._starter = DecoderStarter()
        self._idle: list[DecoderProcess] = []
        self._shared: dict[tuple[int, ImageSpec | None], Shared] = {}
        self._closed = False

    async def check(self, data: bytes, name: str, *, max_pixels: int, max_frames: int, whole: bool) -> Size:
        """Return an image's size after reading its header, or after decoding the whole. Raises ImageError."""
        head = {"task": "check" if whole else "header", "max_pixels": max_pixels, "max_frames": max_frames}
        answer, _ = await self._run({**head, "name": name}, data)
        return _size(answer)

    async def open_views(self, data: bytes, name: str, *, max_pixels: int, spec: ImageSpec | None) -> OpenedImage:
        """Decode an image and cut it into ``spec``'s views; leave it whole for None. Raises ImageError.

        Concurrent calls for the same image (the choices of one request) share one result.
        """
        key = (id(data), spec)
        shared = self._shared.get(key)
        if shared is None:
            head = {"task": "views", "name": name, "max_pixels": max_pixels, "spec": spec and spec.to_dict()}
            shared = self._shared[key] = Shared(asyncio.ensure_future(self._run(head, data)))
        shared.num_waiting += 1
        try:
            answer, payload = await asyncio.shield(shared.task)
        finally:
            shared.num_waiting -= 1
            if not shared.num_waiting:
                shared.task.cancel()
                self._shared.pop(key, None)
        return OpenedImage(_size(answer), np.frombuffer(payload, np.uint8).reshape(answer["shape"]))

    def close(self) -> None:
        """Stop the idle processes; busy ones end after their image."""
        self._closed = True
        while self._idle:
            self._idle.pop().kill()
        self._starter.close()
        self._threads.shutdown(wait=False)

    async def _run(self, head: Mapping[str, Any], data: bytes) -> DecoderReply:
        limits = self.limits
        bounds = {"cpu_s": limits.cpu_s, "wall_s": (1 + _WALL_PER_CPU) * limits.cpu_s}
        answer = await self._ask({**head, **bounds}, data)
        if "error" in answer[0]:
            raise ImageError(answer[0]["error"], reason=answer[0]["reason"])
        return answer

    async def _ask(self, head: Mapping[str, Any], data: bytes) -> DecoderReply:
        """Run a request in one process, which is reused only if it answered in time.

        A slow image never keeps its slot. Where too many of them are running already it is cancelled, and started again
        when one has ended: fast images proceed however many slow ones there are.
        """
        limits, process, finished = self.limits, None, False
        await self._places.acquire()
        held: asyncio.Semaphore | None = self._places
        try:
            process, job = await self._begin(head, data)
            await self._wait_a_moment(process, job)
            if not job.done():
                self._places.release()
                held = None
                if self._slow.locked():
                    process.kill()
                    process = None
                await self._slow.acquire()
                held = self._slow
                if process is None:
                    process, job = await self._begin(head, data)
                process.lower_priority()
                await asyncio.wait({job}, timeout=_WALL_PER_CPU * limits.cpu_s)
            if not job.done():
                raise _too_long(head["name"])
            answer = job.result()
            finished = True
        except (EOFError, OSError) as error:  # killed by its limits, by the out-of-memory killer, or by a crash
            raise _too_long(head["name"]) from error
        finally:
            if held is not None:
                held.release()
            if process is not None:
                self._put_away(process, again=finished and held is self._places)
        return answer

    async def _wait_a_moment(self, process: DecoderProcess, job: "asyncio.Future[DecoderReply]") -> None:
        """Wait for a fast image; while no other slot is free, also until its CPU time is used up."""
        patience_s = self.limits.patience_s
        await asyncio.wait({job}, timeout=patience_s)
        border = process.processor_s() + patience_s
        for _ in range(_MORE_MOMENTS):
            if job.done() or not self._slow.locked() or process.processor_s() >= border:
                return
            await asyncio.wait({job}, timeout=patience_s)

    def _put_away(self, process: DecoderProcess, *, again: bool) -> None:
        """Return a process to the idle ones, or stop it."""
        if again and not self._closed:
            self._idle.append(process)
        else:
            process.kill()

    async def _begin(
        self, head: Mapping[str, Any], data: bytes
    ) -> "tuple[DecoderProcess, asyncio.Future[DecoderReply]]":
        """Start decoding an image in a process."""
        process = await self._process()
        job = asyncio.get_running_loop().run_in_executor(self._threads, process.ask, head, data)
        job.add_done_callback(_forget)
        return process, job

    async def _process(self) -> DecoderProcess:
        """Return an idle process, or a new one."""
        while self._idle:
            process = self._idle.pop()
            if process.is_alive():
                return process
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._starter.start)


@dataclass
class Shared:
    """A decoding job that several callers await."""

    task: "asyncio.Task[DecoderReply]"
    num_waiting: int = 0


def _size(answer: Mapping[str, Any]) -> Size:
    width, height = answer["size"]
    return int(width), int(height)


def _too_long(name: str) -> ImageError:
    return ImageError(
        f"{name}: decoding it took more time (image_decode_s) or memory than is allowed, or crashed the decoder; send "
        "it smaller, or saved again as a plain PNG or JPEG",
        reason="image_too_costly",
    )


def _forget(job: "asyncio.Future[DecoderReply]") -> None:
    if not job.cancelled():
        job.exception()

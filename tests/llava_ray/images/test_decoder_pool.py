"""Processes that decode: the same pixels as here, killed beyond their bounds, freed when the client leaves."""

import asyncio
import contextlib
import io
import os
import signal
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
from hostile_images import codestream, gif_comment, jp2_of, plain, slow_netpbm, tiff_one_payload
from pictures import picture
from PIL import Image

from llava_ray.errors import ImageError, LlavaRayError
from llava_ray.images import decoder_process
from llava_ray.images.decoder_pool import DecodeLimits, DecoderPool
from llava_ray.images.geometry import ImageSpec
from llava_ray.images.views import open_views

pytestmark = pytest.mark.slow

T = TypeVar("T")
LIMIT = 50_000_000
SPEC = ImageSpec(56, None, None, 56, 56, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 3, 1 / 255, "pad")
QUICK = DecodeLimits(cpu_s=1.0, num_places=2, num_slow=8, patience_s=0.1)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


OTHERS: set[int] = set()


@pytest.fixture(autouse=True)
def _others() -> None:
    """Decoders of pools that tests of other files have left to this process are not this test's."""
    OTHERS.clear()
    OTHERS.update(child.pid for child in psutil.Process().children(recursive=True))


def children() -> list[psutil.Process]:
    """The decoder processes of this test that are alive."""
    found = []
    for child in psutil.Process().children(recursive=True):
        if child.pid in OTHERS:
            continue
        try:
            if (
                child.ppid() != os.getpid()
                and "decoder_process" in " ".join(child.cmdline())
                and child.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


async def gone(process: psutil.Process) -> None:
    async with asyncio.timeout(2):
        with contextlib.suppress(psutil.NoSuchProcess):  # ended between the two questions
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                await asyncio.sleep(0.01)


async def views(pool: DecoderPool, data: bytes, spec: ImageSpec | None = SPEC) -> Any:
    return await pool.open_views(data, "image 1", max_pixels=LIMIT, spec=spec)


async def refusal(pool: DecoderPool, data: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        await views(pool, data)
    assert "image 1" in str(caught.value)
    return caught.value


def test_pixels_are_those_of_this_process_and_processes_are_used_again() -> None:
    async def compare() -> None:
        pool = DecoderPool()
        for kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF"):
            file = io.BytesIO()
            noise = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
            Image.fromarray(noise).save(file, kind)
            for spec in (SPEC, None):
                there = await views(pool, file.getvalue(), spec)
                here = open_views(file.getvalue(), "x", max_pixels=LIMIT, spec=spec)
                assert there.size == here.size == (90, 70)
                assert np.array_equal(there.pixels, here.pixels)
                there.pixels[0] = 0  # may be written to, as torch expects
            assert await pool.check(file.getvalue(), "x", max_pixels=LIMIT, max_frames=1, whole=True) == (90, 70)
            assert await pool.check(file.getvalue(), "x", max_pixels=LIMIT, max_frames=1, whole=False) == (90, 70)
        assert len(children()) == 1
        pool.close()

    run(compare())


def test_refusals_are_those_of_this_process() -> None:
    async def refuse() -> None:
        pool = DecoderPool()
        for data, reason in [
            (b"<svg/>", "image_unreadable"),
            (picture(200, 200)[:300], "image_truncated"),
            (gif_comment(), "image_too_costly"),
            (tiff_one_payload(), "image_too_costly"),
        ]:
            error = await refusal(pool, data)
            assert error.reason == reason
            with pytest.raises(ImageError) as caught:
                open_views(data, "image 1", max_pixels=LIMIT, spec=SPEC)
            assert str(caught.value) == str(error)
        with pytest.raises(ImageError) as caught:
            await pool.open_views(picture(200, 200), "image 1", max_pixels=100, spec=SPEC)
        assert caught.value.reason == "image_too_large"
        assert len(children()) == 1
        pool.close()

    run(refuse())


def test_what_takes_too_long_is_killed_and_the_pool_recovers() -> None:
    async def overrun() -> None:
        pool = DecoderPool(QUICK)
        start = time.monotonic()
        error = await refusal(pool, slow_netpbm())
        assert time.monotonic() - start < 6
        assert error.reason == "image_too_costly"
        assert "image_decode_s" in str(error)
        assert (await views(pool, picture())).size == (40, 30)
        pool.close()

    run(overrun())
    assert not children()


def test_what_takes_too_much_memory_is_refused() -> None:
    tiles = jp2_of(codestream(128, 64, tile=1, components=16), 128, 64)

    async def overrun() -> None:
        pool = DecoderPool(DecodeLimits(patience_s=10.0))
        error = await refusal(pool, tiles)
        assert error.reason in ("image_too_costly", "image_truncated")  # openjpeg says only that it failed
        assert max(child.memory_info().rss for child in children()) < 200 * 2**20
        assert (await views(pool, picture())).size == (40, 30)
        pool.close()

    run(overrun())


def test_memory_beyond_the_bound_is_the_images_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, so that the bound can be set below what an ordinary image takes."""
    monkeypatch.setattr(decoder_process, "answer_request", lambda *_: bytearray(2**50))
    head = {"name": "image 1", "cpu_s": 10, "wall_s": 10}
    answer, payload = decoder_process.answer_safely(head, picture(), 0)
    assert (answer["reason"], payload) == ("image_too_costly", b"")


def test_a_client_that_leaves_ends_its_decoding() -> None:
    async def leave() -> None:
        pool = DecoderPool()
        await views(pool, picture())
        asking = asyncio.create_task(views(pool, slow_netpbm()))
        await asyncio.sleep(0.6)
        [busy] = children()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await gone(busy)
        assert (await views(pool, picture())).size == (40, 30)
        pool.close()

    run(leave())


def test_eight_slow_images_do_not_hold_up_the_others() -> None:
    async def attack() -> None:
        pool = DecoderPool(DecodeLimits(cpu_s=2.0))
        slow = slow_netpbm()
        hostile = [asyncio.create_task(refusal(pool, bytes(bytearray(slow)))) for _ in range(8)]
        await asyncio.sleep(0.2)
        for _ in range(5):
            assert (await views(pool, picture())).size == (40, 30)
        assert not any(task.done() for task in hostile)  # nothing waited for one of them to end
        assert len(children()) <= 12
        assert {error.reason for error in await asyncio.gather(*hostile)} == {"image_too_costly"}
        pool.close()

    run(attack())


def test_more_slow_images_than_may_be_at_work_do_not_hold_up_the_others() -> None:
    async def attack() -> None:
        pool = DecoderPool(DecodeLimits(cpu_s=20.0, num_places=1, num_slow=1, patience_s=0.05))
        await views(pool, picture())
        slow = slow_netpbm()
        hostile = [asyncio.create_task(views(pool, bytes(bytearray(slow)))) for _ in range(5)]
        await asyncio.sleep(0.2)
        start = time.monotonic()
        assert (await views(pool, picture())).size == (40, 30)
        assert time.monotonic() - start < 5
        assert len(children()) <= 3  # the slow one, the quick one, and one that has been killed just now
        for task in hostile:
            task.cancel()
        await asyncio.gather(*hostile, return_exceptions=True)
        pool.close()

    run(attack())


def test_a_slow_image_that_waits_for_others_is_decoded_in_the_end() -> None:
    async def wait() -> None:
        pool = DecoderPool(DecodeLimits(num_places=1, num_slow=1, patience_s=0.0))
        images = [picture(200, 100 + number) for number in range(4)]
        opened = await asyncio.gather(*(views(pool, image, None) for image in images))
        assert [one.size for one in opened] == [(200, 100 + number) for number in range(4)]
        pool.close()

    run(wait())


def test_those_who_ask_for_the_same_at_once_share_one_decoding() -> None:
    async def share() -> None:
        pool = DecoderPool()
        data, asked = picture(300, 300), []
        run_once = pool._run

        async def counting(*arguments: Any) -> Any:
            asked.append(arguments)
            return await run_once(*arguments)

        pool._run = counting  # type: ignore[method-assign]
        first, *others = [asyncio.create_task(views(pool, data)) for _ in range(4)]
        await asyncio.sleep(0)
        first.cancel()
        assert {(await other).size for other in others} == {(300, 300)}
        assert len(asked) == 1
        assert not pool._shared
        pool.close()

    run(share())


def test_processes_that_die_are_replaced_and_a_crash_is_the_images_fault() -> None:
    async def die() -> None:
        pool = DecoderPool()
        await views(pool, plain())
        [idle] = children()
        for process in (idle, idle.parent()):
            process.kill()
            await gone(process)
        assert (await views(pool, plain())).size == (16, 16)
        asking = asyncio.create_task(refusal(pool, slow_netpbm()))
        await asyncio.sleep(0.6)
        os.kill(children()[0].pid, signal.SIGSEGV)
        assert (await asking).reason == "image_too_costly"
        assert (await views(pool, plain())).size == (16, 16)
        pool.close()

    run(die())


def test_a_process_that_cannot_start_is_not_the_images_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_ray.images.decoder_starter.sys.executable", "/bin/false")

    async def fail() -> None:
        with pytest.raises(LlavaRayError, match="did not start") as caught:
            await views(DecoderPool(), plain())
        assert not isinstance(caught.value, ImageError)

    run(fail())

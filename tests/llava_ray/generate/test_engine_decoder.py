"""Who decodes the images of an engine's requests: whoever it is told, once for each, and the answers stay the same."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from engines import ask, make_image, make_parts, request, started

from llava_ray.errors import ImageError
from llava_ray.generate.vllm.vllm_prompts import as_image
from llava_ray.images.decoder_pool import DecoderPool
from llava_ray.images.geometry import ImageSpec, crop_views
from llava_ray.images.reading import open_image
from llava_ray.images.views import OpenedImage, open_views

pytestmark = pytest.mark.slow


class CountingPool(DecoderPool):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    async def open_views(self, data: bytes, name: str, *, max_pixels: int, spec: ImageSpec | None) -> OpenedImage:
        self.names.append(name)
        return await super().open_views(data, name, max_pixels=max_pixels, spec=spec)


def test_answers_are_the_same_and_a_known_image_is_not_decoded_again(tmp_path: Path) -> None:
    asked = [
        request("what is it?", "one", make_image(1), max_tokens=8),
        request("and these?", "two", make_image(1), make_image(2), max_tokens=8),
        request("once more", "three", make_image(1), make_image(2), max_tokens=8),
    ]

    async def answers(pool: CountingPool | None) -> list[list[int]]:
        engine = await started(make_parts(tmp_path))
        if pool is not None:
            engine.use_decoder(pool)
        try:
            found = [(await ask(engine, one)).ids for one in asked]
            with pytest.raises(ImageError, match="image 1"):
                await ask(engine, request("?", "bad", b"no image"))
            return found
        finally:
            await engine.stop()

    async def compare() -> None:
        pool = CountingPool()
        assert await answers(pool) == await answers(None)
        assert pool.names == ["image 1", "image 2", "image 1"]  # the last one is none
        pool.close()

    asyncio.run(compare())


@pytest.mark.parametrize("spec", [ImageSpec(56, None, None, 56, 56, (0.5,) * 3, (0.5,) * 3, 3, 1 / 255, "pad"), None])  # type: ignore[arg-type]
def test_vllm_gets_the_view_that_was_cut_or_the_whole(spec: ImageSpec | None) -> None:
    data = make_image(3)
    image = as_image(open_views(data, "x", max_pixels=10**6, spec=spec))
    whole = open_image(data, "x", max_pixels=10**6)
    expected = np.asarray(whole) if spec is None else crop_views(whole, spec)[0].transpose(1, 2, 0)
    assert np.array_equal(np.asarray(image), expected)


def test_leaving_while_an_image_is_decoded_leaves_nothing(tmp_path: Path) -> None:
    class Waiting:
        left = False

        async def open_views(self, *_: object, **__: object) -> OpenedImage:
            try:
                await asyncio.sleep(60)
            finally:
                self.left = True
            raise AssertionError

    async def leave() -> None:
        engine, decoder = await started(make_parts(tmp_path)), Waiting()
        engine.use_decoder(decoder)
        asking = asyncio.create_task(ask(engine, request("?", "slow", make_image(1))))
        await asyncio.sleep(0.2)
        assert len((await ask(engine, request("and without?", "other", max_tokens=4))).ids) <= 4
        asking.cancel()
        await asyncio.wait([asking])
        assert decoder.left
        assert engine.stats().num_running == engine.stats().num_waiting == 0
        await engine.stop()

    asyncio.run(leave())

"""Hostile images sent to the service, many at once: each is refused, and nobody else waits or loses memory for it."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from hostile_images import BOMBS, gif_comment, slow_netpbm, tiff_one_payload, tiff_same_tag
from pictures import picture
from serving import EchoEngine, asking, data_uri, served

from llava_ray.deployments.front import build_front
from llava_ray.deployments.gateway import LocalGateway
from llava_ray.deployments.http.routes import Front
from llava_ray.deployments.media.request_images import MediaReader
from llava_ray.deployments.replica import Replica
from llava_ray.deployments.settings import ServeSettings
from llava_ray.generate.builtin.builtin_engine import BuiltinEngine
from llava_ray.generate.vllm.vllm_engine import VllmEngine
from llava_ray.images.decoder_pool import DecoderPool

pytestmark = pytest.mark.slow

ATTACK = Path(__file__).parents[2] / "attack"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def service() -> Iterator[httpx.Client]:
    settings = ServeSettings.parsed({"model": "echo@somewhere", "image_decode_s": "2"})
    [source] = settings.sources
    replica = Replica(EchoEngine(), source, settings)
    with served(build_front(Front(LocalGateway({source: replica}), settings))) as address:
        yield httpx.Client(base_url=address, timeout=60)
    replica.decoder.close()


def is_refused(response: httpx.Response, *codes: str) -> None:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["code"] in codes, error
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    "name", ["tiff one payload", "exif in png text", "gif comment", "jpeg scans", "jpeg 2000 tiles"]
)
def test_a_costly_image_is_a_400(service: httpx.Client, name: str) -> None:
    start = time.monotonic()
    is_refused(service.post(CHAT, json=asking("x", data_uri(BOMBS[name]()))), "image_too_costly")
    assert time.monotonic() - start < 3


def test_an_image_that_takes_too_long_is_a_400(service: httpx.Client) -> None:
    is_refused(service.post(CHAT, json=asking("x", data_uri(slow_netpbm()))), "image_too_costly")


@pytest.mark.parametrize("path", sorted(ATTACK.glob("img_*.bin")), ids=lambda path: path.stem)
def test_odd_files_are_answered_or_a_400(service: httpx.Client, path: Path) -> None:
    response = service.post(CHAT, json=asking("x", data_uri(path.read_bytes())))
    if response.status_code != 200:
        is_refused(response, "image_truncated", "image_unreadable", "image_too_costly")


def held_bytes() -> int:
    """Of this process, which serves, and its decoders; pages that they share are counted in parts."""
    me = psutil.Process()
    total = 0
    for process in (me, *me.children(recursive=True)):
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total


def test_eight_hostile_images_at_once_hold_nobody_up(service: httpx.Client) -> None:
    hostile = [gif_comment(2**21 + 2 * number) for number in range(4)]
    hostile += [tiff_one_payload(64 + number, 2_500_000) for number in range(2)]
    hostile += [tiff_same_tag(payload=2_500_000 + number) for number in range(2)]
    bodies = [asking("x", data_uri(data)) for data in hostile]
    ordinary = asking("what is this?", data_uri(picture(640, 480)))
    assert service.post(CHAT, json=ordinary).status_code == 200

    async def attack() -> tuple[list[httpx.Response], list[float], int]:
        async with httpx.AsyncClient(base_url=service.base_url, timeout=60) as client:
            before, most, waits = held_bytes(), 0, []
            asked = [asyncio.create_task(client.post(CHAT, json=body)) for body in bodies]
            for _ in range(8):
                start = time.monotonic()
                answer = await client.post(CHAT, json=ordinary)
                waits.append(time.monotonic() - start)
                assert answer.status_code == 200
                most = max(most, await asyncio.to_thread(held_bytes))
            return await asyncio.gather(*asked), waits, most - before

    refused, waits, growth = asyncio.run(attack())
    for response in refused:
        is_refused(response, "image_too_costly")
    assert max(waits) < 2, waits
    assert growth < 300 * 2**20


def test_eight_slow_images_whose_clients_hang_up_are_given_up(service: httpx.Client) -> None:
    body = asking("x", data_uri(slow_netpbm(1800, 1500)))

    async def attack() -> float:
        async with httpx.AsyncClient(base_url=service.base_url) as client:
            left = await asyncio.gather(
                *(client.post(CHAT, json=body, timeout=1.5) for _ in range(8)), return_exceptions=True
            )
            assert all(isinstance(one, httpx.TimeoutException) or one.status_code == 400 for one in left)  # type: ignore[union-attr]
            start = time.monotonic()
            answer = await client.post(CHAT, json=asking("x", data_uri(picture())), timeout=30)
            assert answer.status_code == 200
            return time.monotonic() - start

    assert asyncio.run(attack()) < 2


def test_engines_of_ours_decode_in_the_pool_and_others_get_what_was_decoded_before() -> None:
    settings = ServeSettings.parsed({"model": "echo@somewhere"})
    [source] = settings.sources
    for engine in (BuiltinEngine(lambda: None), VllmEngine("none")):  # type: ignore[arg-type, return-value]
        replica = Replica(engine, source, settings)
        assert engine.decoder is replica.decoder is replica.media.decoder
        assert not replica.media.decode_whole
    assert Replica(EchoEngine(), source, settings).media.decode_whole


def test_another_engine_never_sees_a_damaged_image() -> None:
    settings = ServeSettings.parsed({"model": "echo@somewhere"})
    cut = picture(300, 300)[:400]

    async def check(*, whole: bool) -> str:
        pool = DecoderPool()
        reader = MediaReader(settings, decoder=pool, decode_whole=whole)
        try:
            return f"{len(await reader.read(data_uri(cut)))} bytes"
        except Exception as error:  # noqa: BLE001
            return str(error)
        finally:
            pool.close()

    assert asyncio.run(check(whole=False)) == "400 bytes"
    assert "cut off or damaged" in asyncio.run(check(whole=True))

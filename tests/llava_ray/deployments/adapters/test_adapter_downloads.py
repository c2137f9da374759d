"""Adapters from addresses, of a small server on this machine: bounded, under allowed addresses only."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from llava_ray.deployments.adapters.downloads import AdapterDownloads, DownloadLimits
from llava_ray.deployments.adapters.places import AdapterRef
from llava_ray.deployments.refusal import RefusalError, Refused

pytestmark = pytest.mark.slow

FILES = {
    "/adapters/one/adapter_config.json": b"{}",
    "/adapters/one/adapter_model.safetensors": b"a" * 1000,
    "/adapters/bundle/llava.json": b"{}",
    "/adapters/bundle/adapter/adapter_config.json": b"[]",
    "/adapters/empty/readme": b"",
    "/secret/adapter_config.json": b"secret",
}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    async def answer(request: Request) -> Response:
        path = request.url.path
        if path.startswith("/adapters/out/"):
            return RedirectResponse("/secret/adapter_config.json")
        if path.startswith("/adapters/moved/"):
            return RedirectResponse(path.replace("moved", "one"))
        if path.startswith("/adapters/slow/"):
            await asyncio.sleep(5)
        if path.startswith("/adapters/broken/"):
            return PlainTextResponse("no", 500)
        return Response(FILES[path]) if path in FILES else Response(status_code=404)

    with served(Starlette(routes=[Route("/{path:path}", answer)])) as address:
        yield address


def find(folder: Path, address: str, name: str, revision: str | None = None, **limits: float) -> Path:
    bounds = {"max_bytes": 10_000, "cache_bytes": 10_000, "timeout_s": 60.0, "max_redirects": 2, **limits}
    downloads = AdapterDownloads(folder, DownloadLimits([f"{address}/adapters"], **bounds))  # type: ignore[arg-type]
    adapter = AdapterRef(name, f"{address}/adapters/{name}", "base", revision or name)
    return asyncio.run(downloads.find(adapter))


def refused(*arguments: object, **limits: float) -> Refused:
    with pytest.raises(RefusalError) as error:
        find(*arguments, **limits)  # type: ignore[arg-type]
    return error.value.refused


def test_peft_folders_and_bundles(address: str, tmp_path: Path) -> None:
    one = find(tmp_path, address, "one")
    assert {file.name: file.stat().st_size for file in one.iterdir()} == {
        "adapter_config.json": 2,
        "adapter_model.safetensors": 1000,
    }
    moved = find(tmp_path, address, "moved")
    assert sorted(file.name for file in moved.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    bundle = find(tmp_path, address, "bundle")
    assert (bundle / "adapter" / "adapter_config.json").read_bytes() == b"[]"
    assert not list(tmp_path.glob(".new-*"))


def test_a_download_is_made_once(address: str, tmp_path: Path) -> None:
    one = find(tmp_path, address, "one")
    (one / "adapter_config.json").write_text("kept")
    assert (find(tmp_path, address, "one") / "adapter_config.json").read_text() == "kept"


def test_what_is_refused(address: str, tmp_path: Path) -> None:
    expected = {
        "out": (403, "adapter_place"),
        "../secret": (403, "adapter_place"),
        "empty": (404, "adapter_not_found"),
        "broken": (503, "adapter_unreachable"),
    }
    for name, (status, code) in expected.items():
        found = refused(tmp_path, address, name, "r")
        assert (found.status, found.code, found.param) == (status, code, "lora_path"), name
    assert refused(tmp_path, address, "slow", timeout_s=0.2).code == "adapter_timeout"
    assert refused(tmp_path, address, "one", max_bytes=500).code == "adapter_too_large"
    gone = refused(tmp_path, "http://127.0.0.1:9", "one")
    assert (gone.status, gone.code) == (422, "adapter_unreachable")
    assert list(tmp_path.iterdir()) == []


def test_the_least_recently_used_downloads_are_deleted(address: str, tmp_path: Path) -> None:
    for age, revision in enumerate("abc"):
        os.utime(find(tmp_path, address, "one", revision), (1000 + age, 1000 + age))
    find(tmp_path, address, "one", "a")
    find(tmp_path, address, "one", "d", cache_bytes=2500)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "d"]
    find(tmp_path, address, "one", "e", cache_bytes=10)  # more than all: it stays while it is read
    assert [path.name for path in tmp_path.iterdir()] == ["e"]

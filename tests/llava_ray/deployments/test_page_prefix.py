"""The page below a path, in a real Chromium: behind a proxy that takes the path off, and mounted there."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from browser import ENTER, Browser, chromium
from fastapi import FastAPI
from pictures import picture
from serving import EchoEngine, served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from llava_ray.deployments.front import build_front
from llava_ray.deployments.gateway import LocalGateway
from llava_ray.deployments.http.routes import Front
from llava_ray.deployments.replica import Replica
from llava_ray.deployments.settings import ServeSettings

pytestmark = pytest.mark.browser

PREFIX = "/tools/llava"
ICONS = ("/manifest.json", "/favicon.ico", "/static/img/logo_nosize.svg")
LAST_ANSWER = """
const all = document.querySelectorAll('#chat .bot.message');
return all.length ? all[all.length - 1].innerText.trim() : '';
"""


def make_app(**told: object) -> FastAPI:
    settings = ServeSettings.parsed({"model": "echo@x,parrot@y", **told})
    front = Front(
        LocalGateway({source: Replica(EchoEngine(), source, settings) for source in settings.sources}), settings
    )
    return build_front(front, with_page=True)


def proxy(target: str) -> Starlette:
    """What nginx does with ``location /tools/llava/ { proxy_pass http://target/; }``."""
    client = httpx.AsyncClient(base_url=target, timeout=60)

    async def forward(request: Request) -> StreamingResponse:
        path = request.url.path.removeprefix(PREFIX)
        headers = [pair for pair in request.headers.items() if pair[0] not in ("host", "content-length")]
        headers += [("x-forwarded-host", request.headers["host"]), ("x-forwarded-proto", "http")]
        asked = client.build_request(
            request.method, path, params=request.query_params, headers=headers, content=await request.body()
        )
        response = await client.send(asked, stream=True)

        async def body() -> AsyncIterator[bytes]:
            async for piece in response.aiter_raw():
                yield piece
            await response.aclose()

        kept = {key: value for key, value in response.headers.items() if key != "transfer-encoding"}
        return StreamingResponse(body(), response.status_code, kept)

    methods = ["GET", "POST", "HEAD"]
    return Starlette(routes=[Route(PREFIX + "/{path:path}", forward, methods=methods)])


def mounted(app: FastAPI) -> ASGIApp:
    """What Serve does with a route_prefix: the whole path, and how much of it is the prefix."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "root_path": PREFIX} if scope["type"] == "http" else scope, receive, send)

    return call


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        started.resize(1200, 900)
        yield started


@pytest.fixture(params=["proxied", "mounted"])
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "proxied":
        with served(make_app(page_root_path=PREFIX)) as inner, served(proxy(inner)) as outer:
            yield outer + PREFIX
    else:
        with served(mounted(make_app())) as outer:
            yield outer + PREFIX


def test_a_question_about_an_image(address: str, browser: Browser, tmp_path: Path) -> None:
    browser.open(f"{address}/?model=parrot")
    browser.find("#box textarea")
    (tmp_path / "red.png").write_bytes(picture(40, 30))
    browser.type("#box input[type=file]", str(tmp_path / "red.png"))
    browser.until(lambda: browser.run("return document.querySelectorAll('#box img').length") == 1)
    browser.type("#box textarea", "what is it?")
    browser.press(ENTER)
    browser.until(lambda: browser.run(LAST_ANSWER) == "40x30 what is it?")
    assert browser.run("return document.querySelector('#model input').value") == "parrot"
    loaded = browser.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
    # Gradio asks for its icons and manifest at the root, and does without them.
    mine = [name for name in loaded if not name.startswith("blob:") and not name.endswith(ICONS)]
    assert len(mine) > 10
    assert [name for name in mine if not name.startswith(address)] == []
    assert httpx.get(f"{address}/v1/models").json()["data"][0]["id"] == "echo"

"""A small client of ChromeDriver's W3C protocol: enough to use a page as a person does."""

import base64
import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from commands import free_port

PATIENCE_S = 60.0  # a busy machine draws slowly
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the W3C's name for a reference to one
ENTER, ESCAPE, DOWN = "\ue007", "\ue00c", "\ue015"

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]


class Browser:
    """One Chromium with one window."""

    def __init__(self, driver: str, profile: str) -> None:
        self.http = httpx.Client(timeout=60)
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
        asked = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        session = self.http.post(f"{driver}/session", json=asked).json()["value"]
        self.base = f"{driver}/session/{session['sessionId']}"

    def call(self, path: str, **body: Any) -> Any:
        value = self.http.post(f"{self.base}/{path}", json=body).json()["value"]
        if isinstance(value, dict) and "error" in value:
            raise LookupError(f"{path}: {value['error']}: {value['message'].splitlines()[0]}")
        return value

    def open(self, address: str) -> None:
        self.call("url", url=address)

    def resize(self, width: int, height: int) -> None:
        """The page's own size: a window cannot be as narrow as a phone."""
        metrics = {
            "width": width,
            "height": height,
            "deviceScaleFactor": 2 if width < 600 else 1,
            "mobile": width < 600,
        }
        self.call("goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=metrics)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.call("execute/sync", script=script, args=list(arguments))

    def find(self, selector: str, seconds: float = PATIENCE_S) -> str:
        return self.until(lambda: self.call("element", using="css selector", value=selector)[ELEMENT], seconds)

    def click(self, selector: str) -> None:
        self.until(lambda: self.call(f"element/{self.find(selector)}/click") or True)

    def type(self, selector: str, text: str) -> None:
        self.call(f"element/{self.find(selector)}/value", text=text)

    def press(self, *keys: str) -> None:
        """Keys for whatever has the focus."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("actions", actions=[{"type": "key", "id": "keys", "actions": strokes}])

    def text(self, selector: str) -> str:
        return (
            self.run("const it = document.querySelector(arguments[0]); return it ? it.innerText : ''", selector) or ""
        )

    def enabled(self, selector: str) -> bool:
        return bool(self.run("const it = document.querySelector(arguments[0]); return !!it && !it.disabled", selector))

    def until(self, condition: Callable[[], Any], seconds: float = PATIENCE_S) -> Any:
        """Wait for something true; a missing element is not yet."""
        end, problem = time.monotonic() + seconds, ""
        while time.monotonic() < end:
            try:
                if found := condition():
                    return found
            except LookupError as error:
                problem = str(error)
            time.sleep(0.05)
        raise AssertionError(
            f"did not happen within {seconds} s; {problem}; the page says:\n{self.text('body')[:3000]}"
        )

    def screenshot(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.http.get(f"{self.base}/screenshot").json()["value"]))

    def close(self) -> None:
        self.http.delete(self.base)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium with an empty profile. Raises FileNotFoundError where ChromeDriver is not installed."""
    program = shutil.which("chromedriver")
    if program is None:
        raise FileNotFoundError("chromedriver: install the packages chromium and chromium-driver")
    port = free_port()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen([program, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            for _ in range(600):
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"http://127.0.0.1:{port}/status").json()["value"]["ready"]:
                        break
                time.sleep(0.05)
            browser = Browser(f"http://127.0.0.1:{port}", profile)
            yield browser
            browser.close()
        finally:
            process.terminate()
            process.wait(10)

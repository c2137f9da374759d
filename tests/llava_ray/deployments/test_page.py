"""The page as a person uses it, in a real Chromium; the model behind it echoes."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import DOWN, ENTER, ESCAPE, Browser, chromium
from pictures import picture
from serving import EchoEngine, served, write_examples

from llava_ray.deployments.front import build_front
from llava_ray.deployments.gateway import LocalGateway
from llava_ray.deployments.http.auth import ApiKey, digest
from llava_ray.deployments.http.routes import Front
from llava_ray.deployments.replica import Replica
from llava_ray.deployments.settings import ServeSettings

pytestmark = pytest.mark.browser

LAST_ANSWER = """
const all = document.querySelectorAll('#chat .bot.message');
return all.length ? all[all.length - 1].innerText.trim() : '';
"""
CATCH_DOWNLOAD = """
window.saved = null;
const made = URL.createObjectURL;
URL.createObjectURL = (blob) => { blob.text().then(text => window.saved = text); return made.call(URL, blob); };
"""
OUT_OF_SIGHT = """
return [...document.querySelectorAll('#actions button')].filter(e => {
  const r = e.getBoundingClientRect();
  return r.left < 0 || r.right > innerWidth || r.bottom > innerHeight;
}).length;
"""
NAMELESS = """
return [...document.querySelectorAll('#actions button, #box textarea, #model input')]
  .filter(e => !(e.innerText || e.ariaLabel || e.placeholder)).length;
"""

KEY = "a key of more than sixteen characters"


class Page:
    """The page's address, its engine and its log."""

    def __init__(self, browser: Browser, address: str, engine: EchoEngine, log: Path, folder: Path) -> None:
        self.browser, self.address, self.engine, self.log, self.folder = browser, address, engine, log, folder

    def show(self, colour: str, size: tuple[int, int]) -> None:
        """Attach an image to the next question."""
        path = self.folder / f"{colour}.png"
        path.write_bytes(picture(*size, colour=colour))
        before = self.browser.run("return document.querySelectorAll('#box img').length")
        self.browser.run("document.querySelector('#box input[type=file]').value = ''")  # the driver would add to it
        self.browser.type("#box input[type=file]", str(path))
        self.browser.until(lambda: self.browser.run("return document.querySelectorAll('#box img').length") > before)

    def ask(self, text: str) -> None:
        self.browser.type("#box textarea", text)
        self.browser.press(ENTER)

    def answer(self) -> str:
        """The last answer on the page, which may still grow."""
        return str(self.browser.run(LAST_ANSWER))

    def is_done(self, text: str) -> None:
        self.browser.until(lambda: self.answer() == text and self.browser.enabled("#again"))

    def click(self, name: str) -> None:
        self.browser.until(lambda: self.browser.enabled(f"#{name}"))
        self.browser.click(f"#{name}")

    def records(self) -> list[dict[str, object]]:
        return [json.loads(line) for file in self.log.glob("*.jsonl") for line in file.read_text().splitlines()]

    def screenshot(self, name: str) -> None:
        """Kept where LLAVA_RAY_SCREENSHOTS says."""
        self.browser.screenshot(Path(os.environ.get("LLAVA_RAY_SCREENSHOTS", self.folder)) / f"{name}.png")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder, engine = tmp_path_factory.mktemp("page"), EchoEngine(token_s=0.01)
    settings = ServeSettings.parsed(
        {
            "model": "echo@x,parrot@y",
            "page_log_dir": str(folder / "log"),
            "page_examples": write_examples(folder),
            "max_images": 2,
            "max_queued_requests": 0,
            "max_num_seqs": 1,
        }
    )
    front = Front(LocalGateway({source: Replica(engine, source, settings) for source in settings.sources}), settings)
    with served(build_front(front, with_page=True)) as address, chromium() as browser:
        browser.resize(1200, 900)
        yield Page(browser, address, engine, folder / "log", folder)


@pytest.fixture
def fresh(page: Page) -> Page:
    """The page as it is when somebody comes."""
    page.engine.prefill_s, page.engine.token_s = 0.0, 0.01
    page.browser.open(page.address)
    page.browser.find("#box textarea")
    page.browser.until(lambda: page.browser.run("return document.activeElement?.tagName") == "TEXTAREA")
    return page


def test_images_are_shown_and_asked_about_turn_by_turn(fresh: Page) -> None:
    fresh.show("red", (40, 30))
    fresh.ask("what is this?")
    fresh.is_done("40x30 what is this?")
    fresh.show("blue", (7, 5))
    fresh.ask("and this?")
    fresh.browser.until(lambda: fresh.engine.seen[-1].turns[-1].value == "<image>\nand this?")
    fresh.is_done("40x30 7x5 and this?")
    assert len(fresh.engine.seen[-1].images) == 2


def test_an_answer_streams_and_stops(fresh: Page) -> None:
    fresh.engine.token_s = 0.1
    fresh.ask(" ".join(f"word{index}" for index in range(300)))
    fresh.browser.until(lambda: "word2" in fresh.answer())
    assert fresh.answer().endswith("▌")
    start = time.monotonic()
    fresh.click("stop")
    fresh.browser.until(lambda: not fresh.engine.running, 1.0)
    assert time.monotonic() - start < 2
    fresh.browser.until(lambda: fresh.browser.enabled("#again"))
    kept = fresh.answer()
    assert kept.startswith("word0 word1 word2")
    assert "▌" not in kept
    assert "written" in fresh.browser.text("#status")


def test_escape_stops_too_before_the_first_word(fresh: Page) -> None:
    fresh.engine.prefill_s = 30
    fresh.ask("anything")
    fresh.browser.until(lambda: fresh.engine.running and fresh.browser.enabled("#stop"))
    fresh.browser.press(ESCAPE)
    fresh.browser.until(lambda: not fresh.engine.running, 1.0)


def test_regenerate_asks_the_same_again(fresh: Page) -> None:
    fresh.ask("once more")
    fresh.is_done("once more")
    before = len(fresh.engine.seen)
    fresh.click("again")
    fresh.browser.until(lambda: len(fresh.engine.seen) == before + 1)
    fresh.is_done("once more")
    assert len(fresh.engine.seen[-1].turns) == 1


def test_edit_puts_the_question_back(fresh: Page) -> None:
    fresh.show("red", (40, 30))
    fresh.ask("what is it")
    fresh.is_done("40x30 what is it")
    fresh.click("edit")
    fresh.browser.until(
        lambda: fresh.browser.run("return document.querySelector('#box textarea').value") == "what is it"
    )
    fresh.ask(" made of")
    fresh.is_done("40x30 what is it made of")
    assert len(fresh.engine.seen[-1].turns) == 1


def test_clear_begins_anew(fresh: Page) -> None:
    fresh.ask("something")
    fresh.is_done("something")
    fresh.click("clear")
    fresh.browser.until(lambda: fresh.answer() == "" and not fresh.browser.enabled("#again"))


def test_votes_and_flags_are_kept_only_with_consent(fresh: Page) -> None:
    fresh.ask("between us")
    fresh.is_done("between us")
    fresh.click("upvote")
    fresh.browser.until(lambda: "your upvote was counted." in fresh.browser.text("#status"))
    assert not any("between us" in json.dumps(record) for record in fresh.records())
    fresh.browser.click("#agreed input")
    fresh.ask("for all")
    fresh.is_done("for all")
    fresh.click("flag")
    fresh.browser.until(lambda: "your flag was counted with the conversation" in fresh.browser.text("#status"))
    assert [record["type"] for record in fresh.records()][-2:] == ["chat", "flag"]


def test_another_model_answers(fresh: Page) -> None:
    fresh.browser.click("#model input")
    fresh.browser.press(DOWN, ENTER)
    fresh.browser.until(lambda: fresh.browser.run("return document.querySelector('#model input').value") == "parrot")
    fresh.ask("who are you?")
    fresh.is_done("who are you?")


def test_a_link_chooses_the_model(page: Page) -> None:
    page.browser.open(f"{page.address}/?model=parrot")
    page.browser.until(lambda: page.browser.run("return document.querySelector('#model input')?.value") == "parrot")


def test_errors_say_what_failed(fresh: Page) -> None:
    fresh.engine.broken = "the GPU is on fire"
    fresh.ask("hello")
    fresh.browser.until(lambda: "the GPU is on fire" in fresh.browser.text("#status [role=alert]"))
    fresh.screenshot("error")
    fresh.engine.broken = None
    fresh.click("again")
    fresh.is_done("hello")


def test_too_many_images_are_refused_with_the_limit(fresh: Page) -> None:
    for index, colour in enumerate(("red", "blue", "green")):
        fresh.show(colour, (10 + index, 10))
    fresh.ask("which?")
    fresh.browser.until(lambda: "3 images; at most 2" in fresh.browser.text("#status [role=alert]"))


def test_a_chat_is_exported_as_a_request(fresh: Page) -> None:
    fresh.browser.run(CATCH_DOWNLOAD)
    fresh.ask("keep this")
    fresh.is_done("keep this")
    fresh.click("export")
    saved = json.loads(fresh.browser.until(lambda: fresh.browser.run("return window.saved")))
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant"]


def test_examples_are_asked_with_their_image(fresh: Page) -> None:
    fresh.browser.click("#chat button.example")
    fresh.browser.until(lambda: fresh.answer().startswith("384x384 What shape") and fresh.browser.enabled("#again"))


def test_it_fits_a_phone_and_the_keyboard(fresh: Page) -> None:
    browser = fresh.browser
    browser.resize(390, 844)
    try:
        fresh.ask("does it fit?")
        fresh.is_done("does it fit?")
        assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
        assert browser.run(OUT_OF_SIGHT) == 0
        assert browser.run("return document.activeElement.tagName") == "TEXTAREA"  # the next question can be typed
        assert browser.run(NAMELESS) == 0
        fresh.screenshot("phone")
    finally:
        browser.resize(1200, 900)


def test_a_closed_tab_frees_its_place(fresh: Page) -> None:
    fresh.engine.token_s = 0.1
    fresh.ask(" ".join(["word"] * 300))
    fresh.browser.until(lambda: fresh.engine.running)
    fresh.browser.open("about:blank")
    fresh.browser.until(lambda: not fresh.engine.running, 5.0)


def test_with_keys_the_page_asks_for_one(page: Page) -> None:
    settings = ServeSettings.parsed({"model": "echo@x"})
    [source] = settings.sources
    front = Front(
        LocalGateway({source: Replica(EchoEngine(), source, settings)}), settings, [ApiKey("alice", digest(KEY))]
    )
    with served(build_front(front, with_page=True)) as address:
        browser = page.browser
        browser.open(address)
        browser.until(lambda: "Log in with the name of your API key" in browser.text("body"))
        assert browser.run("return document.querySelector('#box')") is None
        browser.type("input:not([type=password])", "alice")
        browser.type("input[type=password]", KEY)
        browser.press(ENTER)
        browser.find("#box textarea")
        path = page.folder / "green.png"
        path.write_bytes(picture(30, 20, colour="green"))
        browser.type("#box input[type=file]", str(path))
        browser.find("#box img")
        browser.type("#box textarea", "who am I?")
        browser.press(ENTER)
        browser.until(lambda: str(browser.run(LAST_ANSWER)) == "30x20 who am I?")
        page.screenshot("logged_in")

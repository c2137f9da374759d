"""Settings, keys, rates, merging, each alone."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import pytest
from pydantic import ValidationError
from serving import write_examples

from llava_ray.deployments.admission import Admission
from llava_ray.deployments.applications import with_absolute_paths
from llava_ray.deployments.chat_page.examples import read_examples
from llava_ray.deployments.http.auth import ENVIRONMENT, Guard, digest, read_api_keys
from llava_ray.deployments.http.schema import ChatMessage
from llava_ray.deployments.media.addresses import is_public, matches
from llava_ray.deployments.merging import merge_streams, with_heartbeats
from llava_ray.deployments.messages import as_turn
from llava_ray.deployments.refusal import RefusalError, Refused
from llava_ray.deployments.settings import ServeSettings
from llava_ray.errors import ConfigError

KEY = "a key of more than sixteen characters"


def test_settings_are_read_as_serve_gives_them() -> None:
    """A dictionary of texts, lists with commas."""
    settings = ServeSettings.parsed(
        {
            "model": "runs/one/model, two@runs/other",
            "adapters": "runs/lora",
            "max_replicas": "3",
            "media_timeout_s": "2.5",
        }
    )
    assert [source.names for source in settings.sources] == [("one", "lora"), ("two",)]
    assert (settings.max_replicas, settings.media_timeout_s) == (3, 2.5)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/quickstart/model", "quickstart"),
        ("runs/tune-01234567/model/", "tune-01234567"),
        ("/models/llava-v1.5-7b", "llava-v1.5-7b"),
        ("llava-hf/llava-1.5-7b-hf", "llava-1.5-7b-hf"),
        ("mine@runs/quickstart/model", "mine"),
        ("model@runs/quickstart/model", "model"),
        ("model", "model"),
        ("./model", "model"),
    ],
)
def test_a_model_is_called_by_its_folder_or_as_one_says(path: str, name: str) -> None:
    assert [source.name for source in ServeSettings.parsed({"model": path}).sources] == [name]


def test_a_models_folder_is_known_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine")
    assert with_absolute_paths(ServeSettings.parsed({"model": "model"})).sources[0].name == "mine"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (None, r"page_examples \S+ cannot be read \(FileNotFoundError"),
        ("[", "cannot be read"),
        ({"text": "x"}, "expected a list of at most 8 examples"),
        ([{"text": "x"}] * 9, "expected a list of at most 8 examples"),
        ([{"text": "x"}, "y"], "entry 1 is 'y'; expected"),
        ([{"txt": "x"}], r"entry 0 is {'txt': 'x'}; expected"),
        ([{"image": "a.png"}], "entry 0 has no text"),
        ([{"text": "x", "image": "gone.png"}], "entry 0: no image .*gone.png"),
        ([{"text": "x", "image": "examples.json"}], "entry 0: .*choose another image"),
    ],
)
def test_examples_that_cannot_be_shown_are_named(written: object, message: str, tmp_path: Path) -> None:
    file = tmp_path / "examples.json"
    if written is not None:
        file.write_text(written if isinstance(written, str) else json.dumps(written))
    with pytest.raises(ConfigError, match=message):
        read_examples(str(file))


def test_examples_are_those_of_a_file_or_none(tmp_path: Path) -> None:
    assert read_examples(None) == []
    [shape, text] = read_examples(write_examples(tmp_path))
    assert Path(shape["files"][0]).read_bytes() == (tmp_path / "shape.png").read_bytes()  # type: ignore[arg-type]
    assert text == {"text": "What is it for?"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": ""}, "expected model=PATH"),
        ({"max_queue": 3}, "max_queued_requests"),
        ({"min_replicas": 3}, "min_replicas 3 > max_replicas 1"),
        ({"model": "a/llava,b/llava"}, "have the same name"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServeSettings.parsed({"model": "a"} | changed)
    with pytest.raises(ValidationError):
        ServeSettings.model_validate({"model": "a"} | changed)


def test_keys_come_from_a_file_and_the_environment_and_are_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(
        f'[keys.alice]\nkey = "{KEY}"\nrequests_per_minute = 4\n[keys.bob]\nsha256 = "{digest("b" * 20)}"\n'
    )
    keys = read_api_keys(str(file), {ENVIRONMENT: f"carol={'c' * 20}"})
    assert [key.name for key in keys] == ["alice", "bob", "carol"]
    assert KEY not in repr(keys)
    guard = Guard(keys)
    for key, name in [(KEY, "alice"), ("b" * 20, "bob"), ("c" * 20, "carol")]:
        found = guard.identify(f"Bearer {key}")
        assert not isinstance(found, Refused)
        assert found.name == name


@pytest.mark.parametrize("text", ['[keys.x]\nkey = "short"', "[keys.x]", "x", '[keys.x]\nkey="' + KEY + '"\nrate=3'])
def test_a_bad_key_file_says_what_it_should_be_but_no_key(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_api_keys(str(file), {})
    assert KEY not in str(error.value)
    assert "short" not in str(error.value)


def test_a_rate_lets_a_few_through_at_once_and_then_one_at_a_time() -> None:
    now = [0.0]
    guard = Guard(read_api_keys(None, {ENVIRONMENT: f"a={KEY},b={KEY}b"}), 60, clock=lambda: now[0])
    alice, bob = guard.keys
    assert [guard.admit(alice) for _ in range(15)] == [None] * 15
    refused = guard.admit(alice)
    assert refused is not None
    assert (refused.status, refused.retry_after_s) == (429, 2)
    assert guard.admit(bob) is None
    now[0] = 1.0
    assert guard.admit(alice) is None
    assert guard.admit(alice) is not None


def test_admission_counts_answers_and_lets_go() -> None:
    admission = Admission(max_running=1, max_queued=2, retry_after_s=5)
    with admission.admitted(2), admission.admitted():
        with pytest.raises(RefusalError) as refused, admission.admitted():
            pass
        assert refused.value.refused.headers() == {"retry-after": "5"}
    assert admission.held == 0


async def counting(count: int, pause_s: float, closed: list[int]) -> AsyncGenerator[int, None]:
    try:
        for number in range(count):
            yield number
            await asyncio.sleep(pause_s)
    finally:
        closed.append(count)


def test_merging_keeps_each_streams_order_and_joins_what_is_near() -> None:
    async def run() -> list[list[tuple[int, int]]]:
        return [batch async for batch in merge_streams([counting(100, 0.001, []), counting(50, 0.001, [])])]

    batches = asyncio.run(run())
    for index, count in ((0, 100), (1, 50)):
        assert [number for batch in batches for place, number in batch if place == index] == list(range(count))
    assert len(batches) < 40


def test_merging_without_pauses_gives_all_at_the_end() -> None:
    async def run() -> list[list[tuple[int, int]]]:
        return [batch async for batch in merge_streams([counting(3, 0.0, []), counting(2, 0.01, [])], None)]

    [batch] = asyncio.run(run())
    assert sorted(batch) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_a_stream_that_has_nothing_to_say_gives_signs_of_life() -> None:
    closed: list[int] = []

    async def run() -> list[int | None]:
        return [item async for item in with_heartbeats(counting(3, 0.05, closed), 0.02)]

    items = asyncio.run(run())
    assert [item for item in items if item is not None] == [0, 1, 2]
    assert items.count(None) >= 3
    assert closed


def test_leaving_a_stream_with_signs_of_life_closes_it() -> None:
    closed: list[int] = []

    async def run() -> None:
        async with aclosing(with_heartbeats(counting(1000, 0.05, closed), 0.02)) as items:
            async for _ in items:
                break

    asyncio.run(run())
    assert closed


def test_leaving_a_merged_stream_closes_all_of_them() -> None:
    closed: list[int] = []

    async def run() -> None:
        stream = merge_streams([counting(1000, 0.001, closed), counting(2000, 0.001, closed)])
        await anext(stream)
        await stream.aclose()

    asyncio.run(run())
    assert sorted(closed) == [1000, 2000]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
        ("2001:0:7f00:1::", False),
    ],
)
def test_which_addresses_are_the_internets(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize(
    ("host", "port", "entry", "fits"),
    [
        ("a.org", 443, "a.org", True),
        ("a.org", 8080, "a.org", False),
        ("a.org", 8080, "a.org:8080", True),
        ("b.a.org", 443, ".a.org", True),
        ("a.org", 443, ".a.org", False),
        ("xa.org", 443, "a.org", False),
        ("::1", 443, "[::1]", True),
    ],
)
def test_which_hosts_an_entry_lets_in(host: str, port: int, entry: str, fits: bool) -> None:
    assert matches(host, port, entry) is fits


def test_images_stand_where_they_were_sent_and_markers_in_texts_are_none() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    text = {"type": "text", "text": "is <image> like"}
    message = ChatMessage.model_validate({"role": "user", "content": [image, text, image]})
    assert as_turn(message).value == "<image>\nis < image > like\n<image>"

"""Where adapters may come from: folders with links resolved, addresses without tricks."""

import os
from pathlib import Path

import pytest

from llava_ray.deployments.adapters.places import check_place, find_folder, is_allowed_url, is_plain_url
from llava_ray.deployments.refusal import RefusalError, Refused
from llava_ray.deployments.settings import ServeSettings
from llava_ray.errors import ConfigError

MANY = 2**30


def refused(place: str, allowed: Path, max_bytes: int = MANY) -> Refused:
    with pytest.raises(RefusalError) as error:
        find_folder(place, [str(allowed)], max_bytes)
    assert error.value.refused.param == "lora_path"
    return error.value.refused


@pytest.fixture
def allowed(tmp_path: Path) -> Path:
    (tmp_path / "allowed" / "one").mkdir(parents=True)
    (tmp_path / "allowed" / "one" / "adapter_config.json").write_text("{}")
    (tmp_path / "allowed-too" / "one").mkdir(parents=True)
    return tmp_path / "allowed"


def test_a_folder_below_an_allowed_one(allowed: Path) -> None:
    assert find_folder(str(allowed / "one"), [str(allowed)], MANY) == (allowed / "one").resolve()
    assert find_folder(f"{allowed}/two/../one", [str(allowed)], MANY) == (allowed / "one").resolve()
    linked = allowed.parent / "linked"
    linked.symlink_to(allowed)
    assert find_folder(str(linked / "one"), [str(allowed)], MANY) == (allowed / "one").resolve()
    assert find_folder(str(allowed / "one"), [str(linked)], MANY) == (allowed / "one").resolve()


@pytest.mark.parametrize(
    "place", ["../allowed-too/one", "one/../../allowed-too", "..", "one/../../nowhere", "../../../etc"]
)
def test_other_folders_are_refused_whether_they_exist_or_not(allowed: Path, place: str) -> None:
    found = refused(f"{allowed}/{place}", allowed)
    assert (found.status, found.code) == (403, "adapter_place")
    assert "allowed_adapter_paths" in found.message


def test_links_out_of_the_folder_are_refused(allowed: Path) -> None:
    (allowed / "out").symlink_to(allowed.parent / "allowed-too" / "one")
    assert refused(str(allowed / "out"), allowed).status == 403
    (allowed / "one" / "adapter_model.safetensors").symlink_to("/etc/passwd")
    assert refused(str(allowed / "one"), allowed).status == 403


def test_loops_pipes_and_null_bytes(allowed: Path) -> None:
    (allowed / "loop").symlink_to(allowed / "loop")
    assert refused(str(allowed / "loop"), allowed).status in (403, 404)
    assert refused(f"{allowed}/a\0b", allowed).status == 403
    os.mkfifo(allowed / "one" / "adapter_model.bin")
    assert refused(str(allowed / "one"), allowed).code == "bad_adapter"


def test_missing_and_too_large_folders(allowed: Path) -> None:
    assert refused(str(allowed / "two"), allowed).status == 404
    assert refused(str(allowed / "one" / "adapter_config.json"), allowed).status == 404
    (allowed / "one" / "adapter_model.bin").write_bytes(bytes(1000))
    found = refused(str(allowed / "one"), allowed, 999)
    assert (found.status, found.code) == (400, "adapter_too_large")
    for number in range(1001):
        (allowed / "one" / f"{number}").touch()
    assert "more than 1,000 files" in refused(str(allowed / "one"), allowed).message


@pytest.mark.parametrize("place", ["relative/folder", "org/adapter", "~/adapters", "", "a\nb", "/" + 5000 * "a"])
def test_places_that_are_neither_an_absolute_path_nor_an_address(place: str) -> None:
    with pytest.raises(RefusalError, match="lora_path"):
        check_place(place)


ALLOWED = ("https://example.org/adapters/", "http://store.internal:9000")


@pytest.mark.parametrize(
    "place",
    [
        "https://example.org/adapters/one",
        "https://example.org:443/adapters/one/",
        "https://EXAMPLE.org/adapters/team/one",
        "http://store.internal:9000/any/thing",
    ],
)
def test_allowed_addresses(place: str) -> None:
    assert is_allowed_url(place, ALLOWED)


@pytest.mark.parametrize(
    "place",
    [
        "http://example.org/adapters/one",
        "https://example.org/adapters-too/one",
        "https://example.org/adapter",
        "https://example.org:444/adapters/one",
        "https://example.org.evil.org/adapters/one",
        "https://example.org@evil.org/adapters/one",
        "https://user:word@example.org/adapters/one",
        "https://example.org/adapters/../secret",
        "https://example.org/adapters/%2e%2e/secret",
        "https://example.org/adapters/%252e%252e/secret",
        "https://example.org/adapters/..%2fsecret",
        "https://example.org/adapters\\..\\secret",
        "https://example.org/adapters/one?x=../..",
        "https://example.org/adapters/one#x",
        "https://evil.org/https://example.org/adapters/",
        "https://example.org:x/adapters/one",
        "https://[::1/adapters/one",
        "ftp://example.org/adapters/one",
        "file:///etc/passwd",
        "https:///adapters/one",
        "https://exämple.org/adapters/one",
    ],
)
def test_other_addresses(place: str) -> None:
    assert not is_allowed_url(place, ALLOWED)


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match=r"allowed_adapter_urls: 'https://x\.org/\.\./'"):
        ServeSettings.parsed({"model": "m", "allowed_adapter_urls": "https://x.org/../"})
    with pytest.raises(ConfigError, match="admin_keys: set allowed_adapter_paths"):
        ServeSettings.parsed({"model": "m", "admin_keys": "alice"})
    assert not ServeSettings.parsed({"model": "m", "allowed_adapter_paths": "/a"}).loads_adapters
    assert ServeSettings.parsed({"model": "m", "allowed_adapter_paths": "/a", "admin_keys": "alice"}).loads_adapters
    assert is_plain_url("https://x.org")

"""The adapters in a replica's memory, over an engine that only remembers names."""

import asyncio
import contextlib
from pathlib import Path

import pytest
from serving import EchoEngine

from llava_ray.deployments.adapters.loaded import ReplicaAdapters
from llava_ray.deployments.adapters.places import AdapterRef
from llava_ray.deployments.refusal import RefusalError
from llava_ray.deployments.settings import ServeSettings


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in "abcd":
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    (tmp_path / "bad").mkdir()
    return tmp_path


def make(root: Path, most: int = 2) -> ReplicaAdapters:
    told = {"model": "echo@x", "admin_keys": "admin", "allowed_adapter_paths": str(root), "max_loaded_adapters": most}
    return ReplicaAdapters(EchoEngine(), ServeSettings.parsed(told))


def ref(root: Path, name: str, revision: str = "") -> AdapterRef:
    return AdapterRef(name, str(root / name), "echo", revision or name)


def names(adapters: ReplicaAdapters) -> list[str]:
    assert sorted(adapters.engine.loaded) == sorted(adapters.names.values())
    return list(adapters.names.values())


def test_the_least_recently_used_one_makes_room_and_comes_back_under_another_name(root: Path) -> None:
    async def run() -> None:
        adapters = make(root)
        for name in "abab":
            await adapters.load(ref(root, name))
        assert names(adapters) == ["a#1", "b#2"]
        await adapters.load(ref(root, "c"))
        assert names(adapters) == ["b#2", "c#3"]
        async with adapters.used(ref(root, "a")) as name:
            assert name == "a#4"
        assert names(adapters) == ["c#3", "a#4"]

    asyncio.run(run())


def test_what_requests_use_stays(root: Path) -> None:
    async def run() -> None:
        adapters = make(root)
        async with adapters.used(ref(root, "a")), adapters.used(ref(root, "b")):
            with pytest.raises(RefusalError) as error:
                await adapters.load(ref(root, "c"))
            assert (error.value.refused.status, error.value.refused.retry_after_s) == (429, 2)
            assert names(adapters) == ["a#1", "b#2"]
            await adapters.drop(ref(root, "a"))
            assert names(adapters) == ["a#1", "b#2"]
        await asyncio.sleep(0.01)
        assert names(adapters) == ["b#2"]
        await adapters.load(ref(root, "c"))
        assert names(adapters) == ["b#2", "c#3"]
        assert not adapters.users
        assert not adapters.dropped

    asyncio.run(run())


def test_requests_share_one_loading_and_survive_one_that_leaves(root: Path) -> None:
    async def run() -> None:
        adapters = make(root)
        adapters.engine.load_s = 0.02
        first = asyncio.create_task(adapters.load(ref(root, "a")))
        others = [asyncio.create_task(adapters.load(ref(root, "a"))) for _ in range(5)]
        await asyncio.sleep(0.005)
        first.cancel()
        await asyncio.gather(*others)
        assert names(adapters) == ["a#1"]
        assert first.cancelled()

    asyncio.run(run())


def test_a_bad_one_takes_nobodys_place_and_is_not_read_again_at_once(root: Path) -> None:
    async def run() -> None:
        adapters = make(root)
        for name in "ab":
            await adapters.load(ref(root, name))
        for _ in range(3):
            with pytest.raises(RefusalError, match="cannot be served") as error:
                await adapters.load(ref(root, "bad"))
        assert (error.value.refused.status, error.value.refused.param) == (400, "lora_path")
        assert names(adapters) == ["a#1", "b#2"]
        assert adapters.engine.num_loads == 3
        assert not adapters.users

    asyncio.run(run())


def test_an_error_that_no_reader_knows_is_ours_and_not_the_clients(root: Path) -> None:
    async def run() -> None:
        adapters = make(root)
        adapters.engine.load_error = MemoryError("no room")
        with pytest.raises(RefusalError) as error:
            await adapters.load(ref(root, "a"))
        assert (error.value.refused.status, error.value.refused.code) == (500, "adapter_failed")
        adapters.engine.load_error = None
        await adapters.load(ref(root, "b"))
        assert names(adapters) == ["b#2"]

    asyncio.run(run())


def test_many_requests_with_few_places(root: Path) -> None:
    async def one(adapters: ReplicaAdapters, number: int) -> bool:
        await asyncio.sleep(number % 7 / 1000)
        with contextlib.suppress(RefusalError):
            async with adapters.used(ref(root, "abcd"[number % 4])) as name:
                for _ in range(3):
                    assert name in adapters.engine.loaded
                    assert name.startswith("abcd"[number % 4])
                    await asyncio.sleep(0.001)
                return True
        return False

    async def run() -> None:
        adapters = make(root, most=3)
        adapters.engine.load_s = 0.002
        answered = await asyncio.gather(*(one(adapters, number) for number in range(200)))
        assert sum(answered) > 20
        assert len(names(adapters)) <= 3
        assert not adapters.users

    asyncio.run(run())

"""Adapters that come and go over HTTP, over the built-in engine itself, while requests are answered."""

import asyncio
import gc
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from engines import by_transformers, make_parts, merged, with_ends, write_adapter
from pictures import noise, picture
from safetensors.torch import load_file, save_file
from serving import asking, data_uri

from llava_ray.chat.conversation import Turn
from llava_ray.deployments.applications import with_absolute_paths
from llava_ray.deployments.builtin import make_engine
from llava_ray.deployments.front import build_front
from llava_ray.deployments.gateway import LocalGateway
from llava_ray.deployments.http.auth import ApiKey, check_admin_keys, digest
from llava_ray.deployments.http.routes import Front
from llava_ray.deployments.replica import Replica
from llava_ray.deployments.settings import ServeSettings
from llava_ray.errors import ConfigError
from llava_ray.generate.decoding import answer_text
from llava_ray.generate.engine import GenerationRequest, Sampling
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.saving import save_bundle

pytestmark = pytest.mark.slow

ADMIN, USER = "an admin's key, long enough", "a user's key, also long enough"
KEYS = (ApiKey("admin", digest(ADMIN)), ApiKey("user", digest(USER)))
QUESTION = "what is it?"
ALL = {"plain": {}, "seeing": {"own_projector": True, "own_tower": True}, "dora": {"use_dora": True, "lora_r": 3}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loaded")
    save_bundle(root / "base", make_parts(root), include="all")
    for seed, (name, settings) in enumerate(ALL.items()):
        write_adapter(root / "adapters" / name, load_pretrained_model(root / "base"), seed=seed, **settings)  # type: ignore[arg-type]
    return root


class Client:
    """The service as an admin and as a user see it."""

    def __init__(self, http: httpx.AsyncClient, replica: Replica) -> None:
        self.http = http
        self.replica = replica

    async def post(self, path: str, body: object, key: str = ADMIN) -> httpx.Response:
        return await self.http.post(path, json=body, headers={"authorization": f"Bearer {key}"})

    async def load(self, name: str, place: object, **fields: object) -> httpx.Response:
        return await self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(place), **fields})

    async def unload(self, name: str) -> httpx.Response:
        return await self.post("/v1/unload_lora_adapter", {"lora_name": name})

    async def ask(self, model: str, num_tokens: int = 12, **fields: object) -> httpx.Response:
        asked = asking(QUESTION, data_uri(picture()), temperature=0, max_tokens=num_tokens, **fields)
        return await self.post("/v1/chat/completions", {**asked, "model": model}, USER)

    async def text(self, model: str, num_tokens: int = 12) -> str:
        response = await self.ask(model, num_tokens)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])

    async def models(self) -> dict[str, str | None]:
        listed = await self.http.get("/v1/models", headers={"authorization": f"Bearer {USER}"})
        return {one["id"]: one["parent"] for one in listed.json()["data"]}


@asynccontextmanager
async def service(root: Path, **told: object) -> AsyncIterator[Client]:
    settings = ServeSettings.parsed(
        {
            "model": f"base@{root / 'base'}",
            "admin_keys": "admin",
            "allowed_adapter_paths": str(root / "adapters"),
            "adapter_cache_dir": str(root / "cache"),
            "max_num_seqs": 8,
            **told,
        }
    )
    [source] = settings.sources
    engine = make_engine(source, settings)
    await engine.start()
    with_ends(engine._ready().parts)
    replica = Replica(engine, source, settings)
    transport = httpx.ASGITransport(build_front(Front(LocalGateway({source: replica}), settings, KEYS)))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=120) as http:
            yield Client(http, replica)
    finally:
        await engine.stop()


def error_of(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


def alone(root: Path, name: str) -> str:
    """What transformers says to the same question, over the merged model."""
    folder = root / "adapters" / name
    parts = with_ends(load_pretrained_model(root / "base")) if name == "base" else merged(folder)
    turns, sampling = (Turn("human", f"<image>\n{QUESTION}"),), Sampling(max_tokens=12)
    expected = by_transformers(parts, GenerationRequest("r", turns, images=(picture(),), sampling=sampling))
    return answer_text(parts, expected.ids).rstrip("\N{REPLACEMENT CHARACTER}")


def test_adapters_are_loaded_used_replaced_and_unloaded(root: Path) -> None:
    async def run() -> None:
        async with service(root) as client:
            before = await client.text("base")
            assert (await client.models()) == {"base": None}
            for name in ALL:
                loaded = await client.load(name, root / "adapters" / name)
                assert (loaded.status_code, loaded.text) == (200, f"Success: LoRA adapter '{name}' added successfully.")
            assert (await client.models()) == {"base": None, **dict.fromkeys(sorted(ALL), "base")}
            one = await client.http.get("/v1/models/dora", headers={"authorization": f"Bearer {USER}"})
            assert (one.json()["id"], one.json()["parent"]) == ("dora", "base")
            names = ["base", *ALL]
            assert await asyncio.gather(*map(client.text, names)) == [alone(root, name) for name in names]
            assert before == alone(root, "base")

            again = await client.load("plain", root / "adapters" / "dora")
            assert error_of(again) == (400, "already_loaded", "lora_name")
            assert (await client.load("plain", root / "adapters" / "seeing", load_inplace=True)).status_code == 200
            assert await client.text("plain") == alone(
                root, "seeing"
            )  # neither its image nor its terms are the old ones
            assert len(client.replica.adapters.names) == 3

            for name in ALL:
                gone = await client.unload(name)
                assert (gone.status_code, gone.text) == (200, f"Success: LoRA adapter '{name}' removed successfully.")
                assert error_of(await client.ask(name)) == (404, "model_not_found", "model")
                assert error_of(await client.unload(name)) == (404, "adapter_not_found", "lora_name")
            assert (await client.models()) == {"base": None}
            batch = client.replica.engine._ready().batch  # type: ignore[attr-defined]
            assert not batch.adapters.layers
            assert await client.text("base") == before

    asyncio.run(run())


def test_one_in_use_is_not_unloaded_and_the_least_recent_one_comes_back(root: Path) -> None:
    async def run() -> None:
        async with service(root, max_loaded_adapters=2) as client:
            for name in ("plain", "seeing"):
                assert (await client.load(name, root / "adapters" / name)).status_code == 200
            expected = {name: await client.text(name, 300) for name in ("plain", "seeing")}
            running = asyncio.create_task(client.text("plain", 300))
            while not client.replica.adapters.users:
                await asyncio.sleep(0.001)
            assert error_of(await client.unload("plain")) == (409, "adapter_in_use", "lora_name")
            assert (await client.load("dora", root / "adapters" / "dora")).status_code == 200
            in_memory = [name.partition("#")[0] for name in client.replica.adapters.names.values()]
            assert (await running) == expected["plain"]
            assert "seeing" not in in_memory
            assert await client.text("seeing", 300) == expected["seeing"]  # loaded again
            assert len(client.replica.adapters.names) == 2
            assert (await client.unload("plain")).status_code == 200

    asyncio.run(run())


def test_fifty_adapters_while_streams_run(root: Path) -> None:
    """Each a copy of one of three; base answers as without them, no stream ends early or waits for a load to end."""
    many = root / "adapters" / "many"
    for number in range(50):
        shutil.copytree(root / "adapters" / list(ALL)[number % 3], many / f"{number}", dirs_exist_ok=True)

    async def run() -> None:
        async with service(root, max_loaded_adapters=8) as client:
            assert (await client.load("kept", root / "adapters" / "plain")).status_code == 200
            expected = {name: await client.text(name, 60) for name in ("base", "kept")}
            stop, answers = asyncio.Event(), []

            async def keep_asking(name: str) -> None:
                while not stop.is_set():
                    answers.append((name, await client.text(name, 60)))

            asking_on = [asyncio.create_task(keep_asking(name)) for name in ("base", "base", "kept")]
            for number in range(50):
                loaded = await client.load(f"many/{number}", many / f"{number}")
                assert loaded.status_code == 200, loaded.text
                while [name for name, _ in answers].count("base") < number // 4:  # on a slow machine they take longer
                    await asyncio.sleep(0.01)
            stop.set()
            await asyncio.gather(*asking_on)
            print(f"{len(answers)} answers while 50 adapters were loaded")
            assert len([name for name, _ in answers if name == "base"]) >= 10
            assert all(text == expected[name] for name, text in answers)
            assert len(client.replica.adapters.names) == 8
            assert len(await client.models()) == 52
            assert await client.text("many/1") == alone(root, "seeing")  # of which the memory holds none any more
            rows, columns = client.replica.engine._ready().batch.adapters.foreign.shape  # type: ignore[attr-defined]
            assert rows <= 16
            assert columns <= 64

    asyncio.run(run())


@pytest.mark.verify
@pytest.mark.timeout(1800)
def test_memory_stays_flat_while_adapters_come_and_go(root: Path) -> None:
    """5,000 short requests: texts, images, schemas, cancelled ones; an adapter is loaded or dropped all the time."""
    names = [f"churn/{number}" for number in range(12)]
    for number, name in enumerate(names):
        shutil.copytree(root / "adapters" / list(ALL)[number % 3], root / "adapters" / name, dirs_exist_ok=True)
    schema = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
    draw, process, counts = random.Random(3), psutil.Process(), Counter[str]()

    async def one(client: Client, number: int) -> None:
        image = (data_uri(noise(3 * (1000 + (20 + number % 60) ** 2))),) if number % 3 else ()
        body = asking(
            f"{number % 500} is it? " * draw.randint(1, 8), *image, max_tokens=draw.randint(1, 12), seed=number
        )
        if number % 5 == 0:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        known = [name for name in await client.models() if name != "base"]
        body["model"] = draw.choice(known) if known and number % 2 else "base"
        asked = asyncio.create_task(client.post("/v1/chat/completions", body, USER))
        if number % 11 == 0:
            await asyncio.sleep(0.02)
            asked.cancel()
        try:
            counts[str((await asked).status_code)] += 1
        except asyncio.CancelledError:
            counts["cancelled"] += 1

    async def change(client: Client) -> None:
        while True:
            name = draw.choice(names)
            is_known = name in await client.models()
            done = await (client.unload(name) if is_known else client.load(name, root / "adapters" / name))
            counts[f"adapters {done.status_code}"] += 1
            await asyncio.sleep(0.05)

    async def run() -> list[int]:
        bounds = {"engine.kv_cache_tokens": 4096, "engine.image_cache_bytes": 2**20}  # else they fill for an hour
        async with service(root, max_loaded_adapters=6, **bounds) as client:
            changing, sizes = asyncio.create_task(change(client)), []
            for first in range(0, 5000, 50):
                await asyncio.gather(*(one(client, number) for number in range(first, first + 50)))
                gc.collect()
                sizes.append(process.memory_info().rss // 2**20)
            changing.cancel()
            return sizes

    begun = time.monotonic()
    sizes = asyncio.run(run())
    print(f"{time.monotonic() - begun:.0f} s, {dict(counts)}, MiB {sizes[::10]}, then {sizes[-1]}")
    assert set(counts) <= {"200", "404", "429", "cancelled", "adapters 200", "adapters 409", "adapters 429"}
    assert counts["200"] > 4000
    assert counts["adapters 200"] > 100
    assert sizes[-1] - sizes[30] < 48


def damaged(root: Path, name: str) -> Path:
    folder = root / "adapters" / "damaged" / name
    shutil.copytree(root / "adapters" / "plain", folder, dirs_exist_ok=True)
    return folder


def test_bad_adapters_are_refused_by_field_and_disturb_nobody(root: Path, tmp_path: Path) -> None:
    tensors = load_file(root / "adapters/plain/adapter/adapter_model.safetensors")
    first = next(name for name in tensors if "lora_B" in name)
    config = json.loads((root / "adapters/plain/adapter/adapter_config.json").read_text())

    def write(name: str, changed: dict[str, torch.Tensor] | None = None, **settings: object) -> Path:
        folder = damaged(root, name)
        if changed is not None:
            save_file(tensors | changed, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config | settings))
        return folder

    bare = root / "adapters" / "bare"  # peft's files, with code in the pickle
    bare.mkdir(exist_ok=True)
    (bare / "adapter_config.json").write_text(json.dumps(config))
    marker = tmp_path / "ran"
    (bare / "adapter_model.bin").write_bytes(f"cos\nsystem\n(S'touch {marker}'\ntR.".encode())
    other = write_adapter(root / "adapters" / "other", make_parts(tmp_path, seed=5), seed=1)
    cut = write("cut")
    file = cut / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    empty = root / "adapters" / "empty"
    empty.mkdir(exist_ok=True)
    missing = write("missing")
    (missing / "adapter" / "adapter_model.safetensors").unlink()
    bad = {
        "of another base": other,
        "NaN": write("nan", {first: tensors[first] * float("nan")}),
        "infinite": write("inf", {first: tensors[first] + float("inf")}),
        "another shape": write("shape", {first: torch.ones(7, 4)}),
        "another rank": write("rank", r=8),
        "no rank": write("none", r="many"),
        "code": bare,
        "cut": cut,
        "empty": empty,
        "missing": missing,
        "whole model": root / "adapters" / "whole",
        "rank too large": write_adapter(
            root / "adapters" / "large", load_pretrained_model(root / "base"), seed=1, lora_r=12
        ),
    }
    shutil.copytree(root / "base", root / "adapters" / "whole", dirs_exist_ok=True)

    async def run() -> None:
        async with service(root, max_lora_rank=8) as client:
            assert (await client.load("plain", root / "adapters" / "plain")).status_code == 200
            expected = {name: await client.text(name, 60) for name in ("base", "plain")}
            for what, folder in bad.items():
                together = asyncio.gather(*(client.text(name, 60) for name in expected))
                refused = await client.load("bad", folder)
                assert error_of(refused) == (400, "bad_adapter", "lora_path"), (what, refused.text)
                assert await together == list(expected.values()), what
                assert error_of(await client.ask("bad")) == (404, "model_not_found", "model")
            assert (await client.models()) == {"base": None, "plain": "base"}
            assert not marker.exists()
            outside = await client.load("bad", root / "base")
            assert error_of(outside) == (403, "adapter_place", "lora_path")
            nowhere = await client.load("bad", root / "adapters" / "nowhere")
            assert error_of(nowhere) == (404, "adapter_not_found", "lora_path")
            assert error_of(await client.load("base", root / "adapters" / "plain")) == (400, "name_taken", "lora_name")
            assert error_of(await client.unload("base")) == (404, "adapter_not_found", "lora_name")
            elsewhere = await client.load("x", root / "adapters" / "plain", base_model_name="other")
            assert error_of(elsewhere) == (404, "model_not_found", "base_model_name")
            client.replica.engine.check_health()
            assert (await client.load("again", root / "adapters" / "plain")).status_code == 200
            assert await client.text("again", 60) == expected["plain"]
            assert await client.text("base", 60) == expected["base"]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_path": "/x"}, "lora_name"),
        ({"lora_name": "x"}, "lora_path"),
        ({"lora_name": "../x", "lora_path": "/x"}, "lora_name"),
        ({"lora_name": "x\n", "lora_path": "/x"}, "lora_name"),
        ({"lora_name": 129 * "x", "lora_path": "/x"}, "lora_name"),
        ({"lora_name": 3, "lora_path": "/x"}, "lora_name"),
        ({"lora_name": "x", "lora_path": ["/x"]}, "lora_path"),
        ({"lora_name": "x", "lora_path": "org/adapter"}, "lora_path"),
        ({"lora_name": "x", "lora_path": ""}, "lora_path"),
        ({"lora_name": "x", "lora_path": "/x", "load_inplace": "yes"}, "load_inplace"),
        ({"lora_name": "x", "lora_path": "/x", "other": 1}, "other"),
        ([], None),
    ],
)
def test_wrong_bodies_name_the_field(body: object, param: str | None) -> None:
    response = asyncio.run(posted(body))
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


async def posted(body: object, key: str = ADMIN, **told: object) -> httpx.Response:
    """What a service without any replica's engine started answers."""
    from serving import EchoEngine

    settings = ServeSettings.parsed({"model": "echo@x", "admin_keys": "admin", "allowed_adapter_paths": "/tmp", **told})
    [source] = settings.sources
    front = Front(LocalGateway({source: Replica(EchoEngine(), source, settings)}), settings, KEYS if key else ())
    transport = httpx.ASGITransport(build_front(front))
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
        return await http.post(
            "/v1/load_lora_adapter", json=body, headers={"authorization": f"Bearer {key}"} if key else {}
        )


def test_who_may_load_adapters() -> None:
    body = {"lora_name": "x", "lora_path": "/x"}
    assert error_of(asyncio.run(posted(body, "wrong"))) == (401, "invalid_api_key", None)
    assert error_of(asyncio.run(posted(body, USER))) == (403, "not_admin", None)
    assert error_of(asyncio.run(posted(body, ""))) == (403, "not_admin", None)
    closed = asyncio.run(posted(body, admin_keys="", allowed_adapter_paths="/tmp"))
    assert error_of(closed) == (404, "adapters_closed", None)
    assert "admin_keys" in closed.text
    with pytest.raises(ConfigError, match="no API key of the name 'bob'"):
        check_admin_keys(("admin", "bob"), KEYS)


def test_allowed_folders_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapters").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = ServeSettings.parsed({"model": "m", "admin_keys": "a", "allowed_adapter_paths": "adapters"})
    assert with_absolute_paths(settings).allowed_adapter_paths == (str(tmp_path / "adapters"),)

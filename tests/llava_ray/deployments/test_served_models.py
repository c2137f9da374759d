"""The service over the built-in engine itself: a base and adapters over it, each a model of the API and the page."""

import asyncio
from pathlib import Path

import httpx
import openai
import pytest
from engines import by_transformers, make_parts, merged, with_ends, write_adapter
from pictures import picture
from prometheus_client.parser import text_string_to_metric_families
from serving import asking, data_uri

from llava_ray.chat.conversation import Turn
from llava_ray.deployments.builtin import make_engine
from llava_ray.deployments.chat_page.page import ChatPage
from llava_ray.deployments.front import build_front
from llava_ray.deployments.gateway import LocalGateway
from llava_ray.deployments.http.routes import Front
from llava_ray.deployments.replica import Replica
from llava_ray.deployments.settings import ServeSettings
from llava_ray.generate.decoding import answer_text
from llava_ray.generate.engine import Engine, GenerationRequest, Sampling
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.saving import save_bundle

pytestmark = pytest.mark.slow

NAMES = ["base", "first", "seeing"]
QUESTION = "what is it?"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    save_bundle(root / "base", make_parts(root), include="all")
    for seed, name in enumerate(NAMES[1:]):
        parts = load_pretrained_model(root / "base")
        write_adapter(root / name, parts, seed=seed, own_projector=name == "seeing")
    return root


def make_front(root: Path) -> tuple[Engine, Front]:
    told = {"model": str(root / "base"), "adapters": f"{root / 'first'}, seeing@{root / 'seeing'}", "max_num_seqs": "4"}
    settings = ServeSettings.parsed(told)
    [source] = settings.sources
    engine = make_engine(source, settings)
    return engine, Front(LocalGateway({source: Replica(engine, source, settings)}), settings, ())


def alone(root: Path, name: str, image: bytes) -> str:
    """What transformers says to the same question, over the merged model."""
    parts = with_ends(load_pretrained_model(root / "base")) if name == "base" else merged(root / name)
    turns, sampling = (Turn("human", f"<image>\n{QUESTION}"),), Sampling(max_tokens=12)
    expected = by_transformers(parts, GenerationRequest("r", turns, images=(image,), sampling=sampling))
    return answer_text(parts, expected.ids).rstrip("\N{REPLACEMENT CHARACTER}")


def test_base_and_adapters_are_models_of_the_api(root: Path) -> None:
    engine, front = make_front(root)
    image = picture()

    async def run() -> tuple[list[openai.types.Model], list[str], str]:
        await engine.start()
        transport = httpx.ASGITransport(build_front(front))
        async with httpx.AsyncClient(transport=transport, base_url="http://here/v1", timeout=60) as http:
            client = openai.AsyncOpenAI(base_url="http://here/v1", api_key="none", max_retries=0, http_client=http)
            listed = await client.models.list()
            asked = asking(QUESTION, data_uri(image), temperature=0, max_tokens=12)
            together = [client.chat.completions.create(**{**asked, "model": name}) for name in NAMES]
            answers = [answer.choices[0].message.content for answer in await asyncio.gather(*together)]
            metrics = (await http.get("http://here/metrics")).text
        await engine.stop()
        return listed.data, answers, metrics

    models, answers, metrics = asyncio.run(run())
    assert [(model.id, model.root, model.parent) for model in models] == [
        ("base", "base", None),
        ("first", "base", "base"),
        ("seeing", "base", "base"),
    ]
    assert answers == [alone(root, name, image) for name in NAMES]
    assert len(set(answers)) == 3
    families = {family.name: family for family in text_string_to_metric_families(metrics)}
    queue = {sample.name: sample.value for sample in families["vllm:request_queue_time_seconds"].samples}
    assert queue["vllm:request_queue_time_seconds_count"] == 3
    assert 0 < queue["vllm:request_queue_time_seconds_sum"] < 60


def test_the_page_offers_them_all(root: Path) -> None:
    _, front = make_front(root)
    assert ChatPage(front).names == NAMES

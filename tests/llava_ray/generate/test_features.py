"""Features instead of answers: the vectors that transformers computes, beside answers that stay as they are."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import answer_all, ask, by_transformers, make_image, make_parts, make_requests, request, started
from torch.nn.functional import normalize

from llava_ray.errors import ModelError, RecordError
from llava_ray.generate.builtin.features import as_vector_chunk
from llava_ray.generate.engine import GenerationChunk, GenerationRequest, Sampling
from llava_ray.generate.prompt_reading import read_text, read_tokens
from llava_ray.generate.prompts import PromptMaker
from llava_ray.generate.vision_cache import VisionCache
from llava_ray.images.views import open_views
from llava_ray.model.assembly import LlavaParts

ONE = Sampling(max_tokens=1)


def as_vector(chunk: GenerationChunk) -> torch.Tensor:
    assert chunk.finish_reason == "stop"
    assert chunk.reading is not None
    return torch.from_numpy(np.frombuffer(chunk.reading.vector, "<f4").copy())


@torch.no_grad()
def last_state(parts: LlavaParts, asked: GenerationRequest) -> torch.Tensor:
    """The language model's last state of a prompt, by transformers alone."""
    prompt = PromptMaker(parts, VisionCache(0), 2048).make(asked)
    views = [image.views for image in prompt.images if image.views is not None]
    features = parts.tower(torch.cat(views)) if views else None
    embedded = parts.llava.embed(torch.tensor([prompt.ids]), features, [image.size for image in prompt.images])
    states = parts.llava.language_model.base_model(inputs_embeds=embedded).last_hidden_state
    return normalize(states[0, -1].float(), dim=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_language_features_are_the_last_states_and_answers_stay(kind: str, tmp_path: Path) -> None:
    parts = make_parts(tmp_path, kind)
    texts = ["a", "is it red or blue? " * 9, "Größe"]
    wanted = [GenerationRequest(f"f{i}", prompt=text, sampling=ONE) for i, text in enumerate(texts)]
    wanted.append(replace(request("what is this?", "f9", make_image(1), make_image(2)), sampling=ONE))
    wanted.append(GenerationRequest("f10", prompt_ids=(5, 9, 70), sampling=ONE))
    expected = [last_state(parts, one) for one in wanted]
    answers = make_requests(6)
    alone = [by_transformers(parts, one) for one in answers]
    mixed = [*answers[:3], *(replace(one, features="language") for one in wanted), *answers[3:]]
    for share in (0.5, 0.0):
        found = answer_all(parts, mixed, prefill_chunk=16, prefix_cache_share=share)
        vectors = [as_vector(one.chunks[-1]) for one in found[3:-3]]
        torch.testing.assert_close(torch.stack(vectors), torch.stack(expected), atol=2e-5, rtol=1e-4)
        assert [one.ids for one in (*found[:3], *found[-3:])] == [one.ids for one in alone]
        assert all(len(one.chunks) == 1 for one in found[3:-3])


@pytest.mark.slow
def test_features_of_images_are_means_before_and_behind_the_projector(tmp_path: Path) -> None:
    parts = make_parts(tmp_path)
    data = make_image(3)
    opened = open_views(data, "image 1", max_pixels=10**6, spec=parts.image_spec)
    image = PromptMaker(parts, VisionCache(0), 2048).prepare("k", opened)
    assert image.views is not None
    with torch.no_grad():
        features = parts.tower(image.views)
        expected = {"tower": features.flatten(0, 1).mean(0), "projector": parts.llava.projector(features)[0].mean(0)}

    async def run() -> None:
        engine = await started(parts)
        answering = asyncio.create_task(ask(engine, request("go on", "a", data, max_tokens=40)))
        for name in ("tower", "projector", "projector", "tower"):
            [chunk] = (await ask(engine, GenerationRequest(name, images=(data,), features=name))).chunks  # type: ignore[arg-type]
            torch.testing.assert_close(as_vector(chunk), normalize(expected[name], dim=0), atol=1e-5, rtol=1e-4)
            assert chunk.num_prompt_tokens == image.num_tokens
        assert len((await answering).ids) == 40
        with pytest.raises(RecordError, match="image 1"):
            await ask(engine, GenerationRequest("bad", images=(b"no image",), features="tower"))
        with pytest.raises(RecordError, match="token 2 is 99999"):
            await ask(engine, GenerationRequest("bad", prompt_ids=(1, 99999), features="language", sampling=ONE))
        await engine.stop()

    asyncio.run(run())


@pytest.mark.slow
def test_an_engine_that_has_gone_on_frees_the_memory_of_features(tmp_path: Path) -> None:
    parts = make_parts(tmp_path)

    async def run() -> None:
        engine = await started(parts, kv_cache_tokens=256, max_running=2)
        many = [GenerationRequest(f"f{i}", prompt="a b " * 20, sampling=ONE, features="language") for i in range(20)]
        await asyncio.gather(*(ask(engine, one) for one in many))
        left = asyncio.create_task(ask(engine, replace(many[0], prompt="c d " * 40)))
        await asyncio.sleep(0.01)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        while engine.stats().num_running or engine.stats().num_waiting:
            await asyncio.sleep(0.01)
        assert engine.stats().kv_tokens_used == 0
        await engine.stop()

    asyncio.run(run())


@pytest.mark.slow
def test_requests_are_read_as_the_model_reads_them(tmp_path: Path) -> None:
    parts = make_parts(tmp_path)
    prompts = PromptMaker(parts, VisionCache(0), 64)
    data = make_image(1)
    asked = request("what is it? " * 40, "r", data)  # longer than the context
    opened = [open_views(data, "image 1", max_pixels=10**6, spec=parts.image_spec)]
    reading = read_tokens(prompts, asked, opened)
    assert list(reading.token_ids) == PromptMaker(parts, VisionCache(0), 9999).make(asked).ids
    assert reading.token_ids.count(-200) == parts.image_tokens.count(*opened[0].size)
    assert reading.token_texts.count("<image>") == reading.token_ids.count(-200)
    whole = read_tokens(prompts, GenerationRequest("p", prompt="a red Größe"), ())
    bare = read_tokens(prompts, GenerationRequest("p", prompt="a red Größe", add_special_tokens=False), ())
    assert whole.token_ids[1:] == bare.token_ids
    assert read_text(prompts, bare.token_ids, "tokens") == "a red Größe"
    for wrong in (-200, -1, len(parts.tokenizer)):
        with pytest.raises(RecordError, match=f"token 2 is {wrong}") as caught:
            read_text(prompts, [1, wrong], "tokens")
        assert (caught.value.reason, caught.value.field) == ("tokens", "tokens")


def test_a_vector_is_of_length_one_and_finite() -> None:
    chunk = as_vector_chunk(torch.tensor([3.0, -4.0]), 7)
    assert as_vector(chunk).tolist() == pytest.approx([0.6, -0.8])
    assert chunk.num_prompt_tokens == 7
    assert as_vector(as_vector_chunk(torch.zeros(3), 1)).tolist() == [0, 0, 0]
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ModelError, match="not finite"):
            as_vector_chunk(torch.tensor([1.0, bad]), 1)

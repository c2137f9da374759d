"""What was read before is copied, not read again, and no answer is another one for it."""

import asyncio
import gc
import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from engines import (
    Answered,
    Expected,
    answer_all,
    ask,
    by_transformers,
    count_differing,
    make_image,
    make_parts,
    make_requests,
    request,
    spoil,
    started,
    write_adapter,
)

from llava_ray.chat.conversation import Turn
from llava_ray.errors import BusyError, ModelError, RecordError
from llava_ray.generate.builtin.builtin_engine import BuiltinEngine
from llava_ray.generate.builtin.prefix_keys import BLOCK
from llava_ray.generate.engine import GenerationRequest
from llava_ray.generate.prompts import PromptMaker
from llava_ray.generate.vision_cache import VisionCache
from llava_ray.model.assembly import LlavaParts

pytestmark = pytest.mark.slow

NUM_TURNS = 8
IMAGES_IN = (0, 4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LlavaParts:
    return make_parts(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def alone(llama: LlavaParts) -> tuple[list[GenerationRequest], list[Expected]]:
    """64 requests, of which many begin like another, and what transformers answers to each."""
    asked = make_requests(32, seed=11)
    beginnings = [one for one in asked if one.turns and one.images][:4]
    for number in range(32):
        first = beginnings[number % 4]
        turns = (*first.turns, Turn("gpt", "It is red."), Turn("human", f"And {number % 8}?"))
        asked.append(replace(first, request_id=f"more{number}", turns=turns))
    random.Random(2).shuffle(asked)
    return asked, [by_transformers(llama, one) for one in asked]


def ids_of(parts: LlavaParts, asked: GenerationRequest) -> list[int]:
    return PromptMaker(parts, VisionCache(0), 2048).make(asked).ids


def num_common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (mine, its) in pairs if mine != its), min(len(one), len(other)))


async def converse(
    engine: BuiltinEngine, parts: LlavaParts, name: str, *, is_first: bool = False
) -> list[tuple[int, int]]:
    """Hold a chat of eight turns, and check that each reads only what is new; return (tokens read, all) of each."""
    turns: list[Turn] = []
    images: list[bytes] = []
    before: list[int] = []
    read = []
    for number in range(NUM_TURNS):
        if number in IMAGES_IN:
            images.append(make_image(number + len(name)))
        marker = "<image>\n" if number in IMAGES_IN else ""
        turns.append(Turn("human", f"{marker}{name} asks {'what is it ' * 4}{number}?"))
        asked = replace(request(max_tokens=20), request_id=f"{name}{number}", turns=tuple(turns), images=tuple(images))
        answer = await ask(engine, asked)
        ids = ids_of(parts, asked)
        common = min(num_common(before, ids), len(ids) - 1)
        known = common // BLOCK * BLOCK
        assert answer.chunks[0].num_cached_tokens >= known, number
        assert answer.chunks[0].num_cached_tokens == known or not is_first  # others know the template's beginning
        assert answer.chunks[0].num_prompt_tokens == len(ids)
        read.append((len(ids) - answer.chunks[0].num_cached_tokens, len(ids)))
        before = [*ids, *answer.ids][: len(ids) + 19]  # the last token of an answer is never read
        turns.append(Turn("gpt", answer.text))
    return read


def test_each_turn_of_a_chat_reads_only_what_is_new(llama: LlavaParts) -> None:
    async def run() -> list[list[tuple[int, int]]]:
        engine = await started(llama, prefill_chunk=40)
        try:
            chats = [await converse(engine, llama, "Ann", is_first=True)]
            chats += await asyncio.gather(*(converse(engine, llama, name) for name in ("Robert", "Eve")))
            stats = engine.stats()
            assert stats.prompt_tokens - stats.prefix_cache_hits == sum(read for chat in chats for read, _ in chat)
            assert stats.prefix_cache_queries == stats.prompt_tokens
            assert 0 < stats.prefix_cache_tokens <= stats.kv_tokens_capacity / 2
            return chats
        finally:
            await engine.stop()

    for chat in asyncio.run(run()):
        # A question of about 50 tokens, an answer of 20, an image of 16, and less than a block again.
        assert max(read for read, _ in chat[1:]) < 120
        assert chat[-1][1] > 600


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prefix_cache_share": 0.0},
        {"kv_cache_tokens": 1024, "prefix_cache_share": 0.9},
    ],
)
def test_answers_are_those_of_generate_whatever_is_known(
    llama: LlavaParts, alone: tuple[list[GenerationRequest], list[Expected]], settings: dict[str, float]
) -> None:
    asked, expected = alone

    async def run() -> list[Answered]:
        engine = await started(llama, max_running=24, prefill_chunk=40, **settings)
        try:
            draw = random.Random(3)
            first = await asyncio.gather(*(ask(engine, one, draw.uniform(0, 0.4)) for one in asked))
            again = await asyncio.gather(*(ask(engine, replace(one, request_id=one.request_id + "b")) for one in asked))
            stats = engine.stats()
            assert (stats.prefix_cache_hits > 0) == (settings.get("prefix_cache_share") != 0)
            evicted = engine._ready().batch.kv.prefixes.num_evicted
            assert (evicted > 0) == ("kv_cache_tokens" in settings)
            assert stats.kv_tokens_used == 0
            return [*first, *again]
        finally:
            await engine.stop()

    assert count_differing(asyncio.run(run()), [*expected, *expected]) == 0


def test_several_answers_to_one_prompt_read_it_once(llama: LlavaParts) -> None:
    asked = [request("what is it? " * 20, f"r{n}", make_image(1), seed=n, temperature=1.0) for n in range(6)]
    length = len(ids_of(llama, asked[0]))

    async def run() -> int:
        engine = await started(llama, prefill_chunk=64)
        try:
            answers = await asyncio.gather(*(ask(engine, one) for one in asked))
            assert {answer.chunks[0].num_prompt_tokens for answer in answers} == {length}
            return engine._ready().batch.num_prompt_tokens
        finally:
            await engine.stop()

    assert asyncio.run(run()) <= length + 5 * BLOCK
    plain = [answer.ids for answer in answer_all(llama, asked, prefix_cache_share=0.0)]
    assert [answer.ids for answer in answer_all(llama, asked, prefill_chunk=64)] == plain


def test_neither_images_nor_adapters_are_mistaken_for_others(tmp_path: Path) -> None:
    base = make_parts(tmp_path)
    folders = {
        name: write_adapter(tmp_path / name, make_parts(tmp_path), seed=seed, own_projector=name == "own")
        for seed, name in enumerate(("one", "own"))
    }
    questions = [request("is it red or blue? " * 3, "", make_image(number), max_tokens=4) for number in (1, 2)]
    start = ids_of(base, questions[0]).index(-200)  # what both questions to a model begin with

    async def run() -> None:
        engine = await started(base, folders)
        answers: dict[tuple[str | None, int], list[int]] = {}
        try:
            for turn in range(2):
                for model in (None, "one", "own"):
                    for number, asked in enumerate(questions):
                        named = replace(asked, request_id=f"{turn}{model}{number}", model=model)
                        answer = await ask(engine, named)
                        known = answer.chunks[0].num_cached_tokens
                        assert known > start if turn else known == (start // BLOCK * BLOCK if number else 0)
                        assert answers.setdefault((model, number), answer.ids) == answer.ids
        finally:
            await engine.stop()

    asyncio.run(run())


def test_what_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    spoiled = spoil(make_parts(tmp_path), "~")

    async def run() -> None:
        engine = await started(spoiled, prefill_chunk=32)
        try:
            long = "what is it? " * 10
            for number in range(2):
                with pytest.raises(ModelError, match="not finite"):
                    await ask(engine, request(f"{long}~ {long}", f"bad{number}"))
            assert engine.stats().prefix_cache_tokens == 0
            assert len((await ask(engine, request(f"{long} {long}"))).ids) == 8
        finally:
            await engine.stop()

    asyncio.run(run())


def test_guesses_change_no_answer(llama: LlavaParts) -> None:
    """Long greedy answers of a small model repeat themselves, beside answers that may not be guessed."""
    asked = [request("is it red? " * number, f"r{number}", max_tokens=120) for number in range(1, 5)]
    others = [
        request("blue", "cold", temperature=1.0, seed=1, max_tokens=40),
        request("circle", "sure", logprobs=2, max_tokens=40),
        request("red", "stopping", stop=("e",), max_tokens=100),
    ]
    ending = [
        replace(one, request_id=f"e{one.request_id}", sampling=replace(one.sampling, ignore_eos=False)) for one in asked
    ]
    every = [*asked, *others, *ending]

    async def run(num_guessed: int) -> tuple[list[Answered], int, int, int]:
        engine = await started(llama, speculative_tokens=num_guessed)
        try:
            answers = await asyncio.gather(*(ask(engine, one) for one in every))
            stats = engine.stats()
            return list(answers), stats.draft_tokens, stats.accepted_tokens, stats.generation_tokens
        finally:
            await engine.stop()

    plain, *counts = asyncio.run(run(0))
    assert counts[:2] == [0, 0]
    guessed, drafted, accepted, written = asyncio.run(run(8))
    assert [answer.ids for answer in guessed] == [answer.ids for answer in plain]
    assert [(answer.text, answer.finish_reason) for answer in guessed] == [
        (answer.text, answer.finish_reason) for answer in plain
    ]
    assert accepted > 0.2 * written
    assert accepted <= drafted


def test_a_request_beyond_the_memory_is_refused_with_the_numbers(
    llama: LlavaParts, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def run() -> None:
        engine = await started(llama, kv_cache_tokens=400)
        try:
            assert engine.card.max_model_len == 384
            with pytest.raises(
                RecordError, match=r"holds 384 tokens .* \(its KV cache has 400 tokens, the model 2,048\)"
            ):
                await ask(engine, request(max_tokens=380))
        finally:
            await engine.stop()

    asyncio.run(run())
    assert "for 400 tokens (kv_cache_tokens is 400); one request of 384 tokens takes 96.0 % of it" in caplog.text
    assert "requests of more than 384 tokens are refused" in caplog.text
    with pytest.raises(ModelError, match=r"longest slot 384, but max_model_len is 1,000"):
        asyncio.run(started(llama, kv_cache_tokens=400, max_model_len=1000))
    with pytest.raises(ModelError, match="less than one slot"):
        asyncio.run(started(llama, kv_cache_bytes=1000))


def test_tokens_that_wait_are_bounded(llama: LlavaParts) -> None:
    async def run() -> None:
        engine = await started(llama, kv_cache_tokens=384, max_waiting_tokens=1000)
        try:
            asked = [request("is it?", f"r{number}", max_tokens=100) for number in range(12)]
            answers = await asyncio.gather(*(ask(engine, one) for one in asked), return_exceptions=True)
            refused = [answer for answer in answers if isinstance(answer, BusyError)]
            assert 4 < len(refused) < 11
            assert "at most 1,000 may wait (max_waiting_tokens)" in str(refused[0])
            assert all(len(answer.ids) == 100 for answer in answers if isinstance(answer, Answered))
            assert len((await ask(engine, request(max_tokens=200))).ids) == 200  # what waits no more is not counted
        finally:
            await engine.stop()

    asyncio.run(run())


@pytest.mark.parametrize(
    "num_requests", [pytest.param(150), pytest.param(2000, marks=pytest.mark.verify)], ids=["few", "many"]
)
def test_memory_stays_flat(llama: LlavaParts, num_requests: int) -> None:
    draw = random.Random(5)

    async def run() -> tuple[int, int]:
        engine = await started(llama, max_running=16, kv_cache_tokens=4096)
        process, after = psutil.Process(), 0

        async def leave(asked: GenerationRequest) -> None:
            stream = engine.generate(asked)
            await anext(stream)
            await stream.aclose()

        async def one(number: int) -> None:
            images = [make_image(draw.randrange(40))] * (number % 2)
            asked = request("is it? " * draw.randint(1, 30), f"r{number}", *images, max_tokens=draw.randint(2, 12))
            await (leave(asked) if number % 7 == 0 else ask(engine, asked))

        try:
            for first in range(0, num_requests, 25):
                await asyncio.gather(*(one(number) for number in range(first, min(first + 25, num_requests))))
                if first == num_requests // 3 // 25 * 25:
                    gc.collect()
                    after = process.memory_info().rss
            stats = engine.stats()
            assert (stats.kv_tokens_used, stats.num_running, stats.num_waiting) == (0, 0, 0)
            kv = engine._ready().batch.kv
            assert kv.num_allocated + kv.prefixes.num_tokens <= 4096
            gc.collect()
            return after, process.memory_info().rss
        finally:
            await engine.stop()

    after, end = asyncio.run(run())
    print(f"{after / 2**20:.0f} MiB after a third of {num_requests} requests, {end / 2**20:.0f} MiB after all")
    assert end - after < 32 * 2**20

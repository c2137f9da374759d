"""The built-in engine says what transformers alone would have said, whoever joins and leaves meanwhile."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from threading import Semaphore
from typing import Any

import fakes
import pytest
import torch
from engines import (
    WRONG,
    Answered,
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
)

from llava_ray.chat.templates import find_template
from llava_ray.errors import ModelError, RecordError
from llava_ray.generate.builtin.builtin_engine import BuiltinEngine
from llava_ray.generate.builtin.running_batch import RunningBatch
from llava_ray.generate.decoding import answer_text
from llava_ray.generate.engine import GenerationRequest, Sampling
from llava_ray.generate.settings import EngineSettings
from llava_ray.model.assembly import LlavaParts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LlavaParts:
    return make_parts(tmp_path_factory.mktemp("models"))


async def until(condition: Callable[[], bool], seconds: float = 200) -> None:
    """Wait for the model's thread to have done something."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


def test_64_requests_at_random_times_equal_transformers_alone(llama: LlavaParts) -> None:
    asked = make_requests(64)
    expected = [by_transformers(llama, one) for one in asked]
    draw = random.Random(1)
    delays = [draw.uniform(0, 0.4) for _ in asked]
    answers = answer_all(llama, asked, delays, max_running=24, prefill_chunk=40)
    differing = count_differing(answers, expected)
    print(f"{differing} of {len(asked)} answers differ where the two likeliest tokens are less than 1e-3 apart")
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    assert len({len(answer.ids) for answer in answers}) > 8
    for one, answer in zip(asked, answers, strict=True):
        whole = answer_text(llama, answer.ids) if one.prompt is None else llama.tokenizer.decode(answer.ids)
        assert answer.text == whole.rstrip("\N{REPLACEMENT CHARACTER}").rstrip(" \n" if one.prompt is None else "")


@pytest.mark.parametrize("kind", fakes.LANGUAGE_MODELS)
def test_every_language_model_in_chunks(kind: str, tmp_path: Path) -> None:
    parts = make_parts(tmp_path, kind)
    asked = make_requests(9, seed=2)
    expected = [by_transformers(parts, one) for one in asked]
    assert count_differing(answer_all(parts, asked, prefill_chunk=7), expected) == 0
    assert count_differing(answer_all(parts, asked, prefill_chunk=1000), expected) == 0


def test_images_of_several_views(tmp_path: Path) -> None:
    parts = make_parts(tmp_path, anyres=True)
    asked = make_requests(12, seed=3)
    expected = [by_transformers(parts, one) for one in asked]
    assert count_differing(answer_all(parts, asked, prefill_chunk=30), expected) == 0


def test_the_model_is_given_back(llama: LlavaParts) -> None:
    before = by_transformers(llama, request())
    answer_all(llama, [request()])
    assert by_transformers(llama, request()) == before


@pytest.mark.parametrize("temperature", [0.7, 5.0])
def test_a_seed_gives_the_same_answer_whoever_else_is_answered(llama: LlavaParts, temperature: float) -> None:
    mine = request(seed=5, temperature=temperature, top_p=0.9, top_k=40, max_tokens=16)
    others = [request(f"{n} circles", f"o{n}", temperature=2.0) for n in range(7)]
    alone = answer_all(llama, [mine])[0]
    among = answer_all(llama, [*others[:3], mine, *others[3:]], prefill_chunk=9)[3]
    assert among.ids == alone.ids
    other = answer_all(llama, [replace(mine, sampling=replace(mine.sampling, seed=6))])[0]
    assert other.ids != alone.ids
    unseeded = [request(name=str(n), temperature=5.0, max_tokens=16) for n in range(2)]
    first, second = answer_all(llama, unseeded)
    assert first.ids != second.ids


def test_stop_texts_across_tokens_are_cut(llama: LlavaParts) -> None:
    free = answer_all(llama, [request(max_tokens=24)])[0]
    assert len(free.text) > 8
    stop = free.text[4:7]
    before = free.text.partition(stop)[0]
    stopped = answer_all(llama, [request(max_tokens=24, stop=("never said", stop))])[0]
    assert (stopped.text, stopped.finish_reason) == (before.rstrip(), "stop")
    assert len(stopped.ids) < 24
    raw = GenerationRequest("r", prompt="red", sampling=Sampling(max_tokens=24, stop=("<|im_start|>",)))
    assert answer_all(llama, [raw])[0].finish_reason is not None


def test_logprobs_are_those_of_the_model(llama: LlavaParts) -> None:
    plain, with_logprobs = request(), request(logprobs=3)
    answer, silent = answer_all(llama, [with_logprobs, replace(plain, request_id="q")])
    assert answer.ids == silent.ids
    assert not any(chunk.logprobs for chunk in silent.chunks)
    for chunk in answer.chunks:
        (mine,) = chunk.logprobs
        assert mine.token_id == mine.top[0][0] == chunk.token_ids[0]
        assert mine.logprob == mine.top[0][2] >= mine.top[1][2] >= mine.top[2][2]
    (only,) = answer_all(llama, [request(logprobs=0, max_tokens=1)])[0].chunks
    assert only.logprobs[0].top == ()


def test_the_same_image_is_seen_once(llama: LlavaParts) -> None:
    async def run() -> None:
        engine = await started(llama)
        image, other = make_image(1), make_image(2)
        pair = [ask(engine, request("is it?", f"a{n}", image)) for n in range(2)]
        first, second = await asyncio.gather(*pair)
        again = await ask(engine, request("is it?", "b", image, other))
        assert first.ids == second.ids
        assert again.chunks[0].num_cached_images == 1
        assert engine.stats().image_cache_hits >= 1
        assert engine.stats().image_cache_queries == 4
        await engine.stop()

    asyncio.run(run())


class Gated(RunningBatch):
    """Takes a step only when it is let."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gate = Semaphore(0)
        self.num_steps = 0

    def step(self) -> Any:
        self.gate.acquire()
        told = super().step()
        self.num_steps += 1
        return told

    async def let(self, count: int = 1) -> None:
        wanted = self.num_steps + count
        for _ in range(count):
            self.gate.release()
        await until(lambda: self.num_steps >= wanted)


@asynccontextmanager
async def gated(parts: LlavaParts, **settings: Any) -> AsyncIterator[tuple[BuiltinEngine, Gated]]:
    """An engine whose steps the test lets go, and which gives the model back whatever happens."""
    made: list[Gated] = []

    def make(*arguments: Any) -> Gated:
        made.append(Gated(*arguments))
        return made[0]

    engine = BuiltinEngine(lambda: parts, settings=EngineSettings(**settings), make_batch=make)
    await engine.start()
    try:
        yield engine, made[0]
    finally:
        made[0].gate.release(1000)
        await engine.stop()


def test_others_wait_while_the_cache_is_full(llama: LlavaParts) -> None:
    async def run() -> list[Answered]:
        async with gated(llama, kv_cache_tokens=384, max_running=8) as (engine, batch):
            assert engine.card.max_model_len == 384
            answers = [asyncio.create_task(ask(engine, request(f"{n}", f"r{n}", max_tokens=3))) for n in range(5)]
            await until(lambda: engine.stats().num_waiting == 5)
            seen = set()
            while not all(answer.done() for answer in answers):
                await batch.let(1 if batch.has_work else 0)
                await asyncio.sleep(0.01)
                stats = engine.stats()
                seen.add((stats.num_running, stats.kv_tokens_used))
                assert batch.kv.num_allocated <= 384
            assert (2, 384) in seen  # two of 192 fill it; which other moments are seen is a matter of timing
            assert max(seen) == (2, 384)
            done = await asyncio.gather(*answers)
            assert engine.stats().kv_tokens_used == 0
            return done

    crowded = asyncio.run(run())
    alone = answer_all(llama, [request(f"{n}", f"r{n}", max_tokens=3) for n in range(5)])
    assert [answer.ids for answer in crowded] == [answer.ids for answer in alone]


def test_cancelled_requests_free_their_memory_within_a_step(llama: LlavaParts) -> None:
    async def run() -> None:
        async with gated(llama, prefill_chunk=100, max_running=2) as (engine, batch):
            writing = engine.generate(request("red", "writing", max_tokens=400))
            first = asyncio.create_task(anext(writing))
            await until(lambda: engine.stats().num_waiting == 1)
            await batch.let(3)
            await first
            reading = asyncio.create_task(ask(engine, request("is it " * 300, "reading")))
            await until(lambda: engine.stats().num_waiting == 1)
            waiting = asyncio.create_task(ask(engine, request("no place", "waiting")))
            await until(lambda: engine.stats().num_waiting == 2)
            await batch.let(2)
            assert (engine.stats().num_running, engine.stats().num_waiting) == (2, 1)
            assert 0 < batch.running[1].num_read < len(batch.running[1].prompt.ids)
            await engine.cancel("waiting")
            assert (await waiting).chunks == []
            reading.cancel()
            await asyncio.wait([reading])
            await batch.let(2)
            assert (engine.stats().num_running, engine.stats().num_waiting) == (1, 0)
            await writing.aclose()
            batch.gate.release()
            await until(lambda: engine.stats().num_running == 0)
            assert engine.stats().num_cancelled == 3
            assert engine.stats().kv_tokens_used == 0
            await engine.cancel("nobody")
            batch.gate.release(8)
            assert len((await ask(engine, request("again", max_tokens=1))).ids) == 1  # it lives

    asyncio.run(run())


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        *WRONG,
        (request(max_tokens=4000), RecordError, "max_tokens is 4000, but this engine holds 2048"),
        (replace(request(), model="adapter"), RecordError, "no adapter 'adapter'"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_chunk(
    llama: LlavaParts, asked: GenerationRequest, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        answer_all(llama, [asked])


def test_two_requests_of_one_id(llama: LlavaParts) -> None:
    with pytest.raises(RecordError, match="'r' is being answered"):
        answer_all(llama, [request(), request()])


def test_a_system_prompt_takes_the_place_of_the_templates(llama: LlavaParts) -> None:
    replaced = find_template("v1").with_system("Be brief.")
    asked = replace(request(), system="Be brief.")
    answer = answer_all(llama, [asked])[0]
    assert answer.ids == answer_all(replace(llama, template=replaced), [request()])[0].ids
    assert answer.ids != answer_all(llama, [request()])[0].ids
    plain = replace(llama, template=find_template("plain"))
    with pytest.raises(RecordError, match="no place for a system prompt"):
        answer_all(plain, [asked])


def test_death_is_heard_by_all(llama: LlavaParts) -> None:
    class Dying(RunningBatch):
        def step(self):
            if self.num_new_tokens > 3:
                raise RuntimeError("out of memory")
            return super().step()

    async def run() -> None:
        engine = BuiltinEngine(lambda: llama, make_batch=Dying)
        with pytest.raises(ModelError, match="not running"):
            engine.check_health()
        await engine.start()
        engine.check_health()
        asked = [ask(engine, request(name=f"r{n}", max_tokens=50)) for n in range(2)]
        heard = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(error, ModelError) and "out of memory" in str(error) for error in heard)
        with pytest.raises(ModelError, match="loop died"):
            engine.check_health()
        with pytest.raises(ModelError, match="loop died"):
            await ask(engine, request())
        await engine.stop()

    asyncio.run(run())


def test_a_model_that_cannot_be_batched_is_refused(llama: LlavaParts) -> None:
    layers = llama.llava.language_model.model.layers
    attention = layers[1].self_attn
    layers[1].self_attn = _Recurrent()
    try:
        with pytest.raises(ModelError, match="differs from itself alone"):
            answer_all(llama, [request()])
    finally:
        layers[1].self_attn = attention


class _Recurrent(torch.nn.Module):
    """A layer with a memory of its own, as state space models have."""

    def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        return hidden_states.cumsum(1), None


BAD = "~"  # the character whose embedding is spoiled
LONGER = " red" * 12  # a prompt in a row of the same length


@pytest.fixture
def spoiled(tmp_path: Path) -> LlavaParts:
    return spoil(make_parts(tmp_path), BAD)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 1}, {"temperature": 0.3, "top_k": 3, "seed": 1}])
def test_logits_that_are_not_finite_end_that_request_and_no_other(
    spoiled: LlavaParts, sampling: dict[str, Any]
) -> None:
    good = [request("is it red?", f"good{index}", logprobs=1, **sampling) for index in range(6)]
    bad = [
        request(f"is {BAD} red?{LONGER}", f"bad{index}", logprobs=index % 2 or None, **sampling) for index in range(6)
    ]

    async def run() -> list[Answered | BaseException]:
        engine = await started(spoiled, prefill_chunk=2000)
        try:
            alone = await ask(engine, good[0])
            mixed = [one for pair in zip(good, bad, strict=True) for one in pair]
            asked = [ask(engine, one, 0.002 * index) for index, one in enumerate(mixed)]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            await asyncio.gather(*(ask(engine, one) for one in bad), return_exceptions=True)
            # Rows that spoiled requests have left are taken by others; beside a long one the short ones' are read
            # (and masked) beyond their own tokens.
            long = ask(engine, request(f"is it red?{LONGER}", "long", max_tokens=12))
            later = (await asyncio.gather(*(ask(engine, one) for one in good), long))[:-1]
            engine.check_health()
            return [alone, *answers, *later]
        finally:
            await engine.stop()

    alone, *answers = asyncio.run(run())
    assert isinstance(alone, Answered)
    for place, answer in enumerate(answers):
        if place < 12 and place % 2:
            assert isinstance(answer, ModelError)
            assert "logits are not finite (token 1 of this answer" in str(answer)
        else:
            assert isinstance(answer, Answered)
            assert answer.ids == alone.ids


def test_a_model_that_says_nothing_finite_is_not_served(spoiled: LlavaParts) -> None:
    with torch.no_grad():
        spoiled.llava.language_model.get_output_embeddings().weight[7, 0] = torch.nan
    with pytest.raises(ModelError, match="logits are not finite"):
        asyncio.run(started(spoiled))

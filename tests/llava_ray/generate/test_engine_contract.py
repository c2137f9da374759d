"""What every engine does, asked of each for real: vLLM's where it is installed (``make test-vllm``)."""

import asyncio
import importlib.util
import json
import random
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import jsonschema
import pytest
from engines import (
    NEVER,
    WRONG,
    Answered,
    Expected,
    ask,
    by_transformers,
    count_differing,
    make_image,
    make_parts,
    make_requests,
    merged,
    request,
    write_adapter,
)
from test_sampling_requests import EDITS, follow, logits_of, prompt_of

from llava_ray.chat.conversation import Turn
from llava_ray.errors import ModelError, RecordError
from llava_ray.generate.builtin.builtin_engine import BuiltinEngine
from llava_ray.generate.decoding import answer_text
from llava_ray.generate.engine import Constraint, Engine, GenerationRequest, Sampling
from llava_ray.generate.prompts import PromptMaker
from llava_ray.generate.settings import EngineSettings, VllmSettings
from llava_ray.generate.vision_cache import VisionCache
from llava_ray.generate.vllm.vllm_engine import VllmEngine
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.saving import save_bundle

pytestmark = pytest.mark.slow

T = TypeVar("T")

MAX_MODEL_LEN = 1024
HAS_VLLM = importlib.util.find_spec("vllm") is not None
# A width that vLLM's attention has kernels for.
WIDE = {"hidden_size": 128, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Models:
    """A bundle, adapters over it, and what transformers alone says."""

    bundle: Path
    adapters: dict[str, Path]
    wholes: dict[str | None, LlavaParts]

    def expected(self, asked: Sequence[GenerationRequest]) -> list[Expected]:
        return [by_transformers(self.wholes[one.model], one) for one in asked]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("contract")
    save_bundle(root / "model", make_parts(root, **WIDE), include="all")
    folders = {
        "first": write_adapter(root / "first", load_pretrained_model(root / "model"), seed=1),
        "second": write_adapter(
            root / "second", load_pretrained_model(root / "model"), seed=2, lora_r=6, use_rslora=True
        ),
    }
    wholes = {None: load_pretrained_model(root / "model")} | {name: merged(place) for name, place in folders.items()}
    return Models(root / "model", folders, wholes)  # type: ignore[arg-type]


def make_builtin(models: Models, cache: Path) -> Engine:
    del cache
    settings = EngineSettings(max_running=24, prefill_chunk=40, max_model_len=MAX_MODEL_LEN)
    return BuiltinEngine(
        lambda: load_pretrained_model(models.bundle), name="tiny", settings=settings, adapters=models.adapters
    )


def make_vllm(models: Models, cache: Path) -> Engine:
    settings = VllmSettings(
        max_running=24, max_model_len=MAX_MODEL_LEN, dtype="float32", kv_cache_bytes=2**28, cache_dir=str(cache)
    )
    return VllmEngine(models.bundle, name="tiny", settings=settings, adapters=models.adapters)


ENGINES: dict[str, Callable[[Models, Path], Engine]] = {"builtin": make_builtin, "vllm": make_vllm}


class Running:
    """An engine on an event loop that lives as long as it."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name
        self.loop = asyncio.Runner()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run(coroutine)

    def answer(self, asked: Sequence[GenerationRequest], delays: Sequence[float] | None = None) -> list[Answered]:
        async def run() -> list[Answered]:
            waits = delays or [0.0] * len(asked)
            return await asyncio.gather(*(ask(self.engine, one, wait) for one, wait in zip(asked, waits, strict=True)))

        return self.run(run())


@pytest.fixture(
    scope="module",
    params=[
        "builtin",
        pytest.param("vllm", marks=pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed: make test-vllm")),
    ],
)
def running(
    request: pytest.FixtureRequest, models: Models, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    started = Running(ENGINES[request.param](models, tmp_path_factory.mktemp("cache")), request.param)
    with pytest.raises(ModelError, match="not running"):
        started.engine.check_health()
    started.run(started.engine.start())
    yield started
    started.run(started.engine.stop())
    with pytest.raises(ModelError, match="not running"):
        started.engine.check_health()
    started.loop.close()


async def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def test_the_card_says_what_is_served(running: Running) -> None:
    card = running.engine.card
    assert (card.name, card.max_model_len, card.vision, card.template) == ("tiny", MAX_MODEL_LEN, True, "v1")
    assert tuple(card.adapters) == ("first", "second")
    running.engine.check_health()
    with pytest.raises(ModelError, match="started already"):
        running.run(running.engine.start())


def test_64_requests_at_random_times_equal_transformers_alone(running: Running, models: Models) -> None:
    names = [None, "first", "second"]
    asked = [replace(one, model=names[index % 4 % 3]) for index, one in enumerate(make_requests(64))]
    draw = random.Random(1)
    answers = running.answer(asked, [draw.uniform(0, 0.4) for _ in asked])
    differing = count_differing(answers, models.expected(asked))
    print(f"{running.name}: {differing} of 64 answers differ where the two likeliest tokens are less than 1e-3 apart")
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    parts = models.wholes[None]
    for one, answer in zip(asked, answers, strict=True):
        whole = answer_text(parts, answer.ids) if one.prompt is None else parts.tokenizer.decode(answer.ids)
        whole = whole.rstrip("\N{REPLACEMENT CHARACTER}")
        assert answer.text == (whole.rstrip() if one.prompt is None else whole)


def test_prompts_have_as_many_tokens_as_we_count(running: Running, models: Models) -> None:
    asked = make_requests(9, seed=4)
    maker = PromptMaker(models.wholes[None], VisionCache(0), MAX_MODEL_LEN)
    found = [answer.chunks[-1].num_prompt_tokens for answer in running.answer(asked)]
    assert found == [len(maker.make(one).ids) for one in asked]


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_a_seed_gives_the_same_answer_whoever_else_is_answered(running: Running, temperature: float) -> None:
    mine = request(seed=5, temperature=temperature, top_p=0.9, top_k=40, max_tokens=16)
    others = [request(f"{n} circles", f"o{n}", temperature=2.0) for n in range(7)]
    alone = running.answer([mine])[0]
    assert running.answer([*others[:3], mine, *others[3:]])[3].ids == alone.ids
    assert running.answer([replace(mine, sampling=replace(mine.sampling, seed=6))])[0].ids != alone.ids
    first, second = running.answer([request(name=str(n), temperature=2.0, max_tokens=16) for n in range(2)])
    assert first.ids != second.ids


def test_stop_texts_are_cut(running: Running) -> None:
    free = running.answer([request(max_tokens=24)])[0]
    stop = free.text[4:7]
    stopped = running.answer([request(max_tokens=24, stop=("never said", stop))])[0]
    assert (stopped.text, stopped.finish_reason) == (free.text.partition(stop)[0].rstrip(), "stop")
    assert len(stopped.ids) < 24
    raw = GenerationRequest("r", prompt="red", sampling=Sampling(max_tokens=24, stop=("<|im_start|>",)))
    assert running.answer([raw])[0].finish_reason is not None


def test_an_answer_goes_on_to_max_tokens_where_it_is_told_to(running: Running) -> None:
    answer = running.answer([request(max_tokens=40)])[0]
    assert (len(answer.ids), answer.finish_reason) == (40, "length")
    assert len(answer.chunks) > 3  # it streams


def test_logprobs_are_those_of_the_model(running: Running) -> None:
    answer, silent = running.answer([request(logprobs=3), request(name="q")])
    assert answer.ids == silent.ids
    assert not any(chunk.logprobs for chunk in silent.chunks)
    told = [one for chunk in answer.chunks for one in chunk.logprobs]
    assert [one.token_id for one in told] == answer.ids
    for one in told:
        assert one.token_id == one.top[0][0]
        assert one.logprob == one.top[0][2] >= one.top[1][2] >= one.top[2][2]
        assert len(one.top) == 3
    sampled = running.answer([request(logprobs=0, max_tokens=3, temperature=2.0)])[0]
    assert [one.top for chunk in sampled.chunks for one in chunk.logprobs] == [()] * 3


def test_a_system_prompt_takes_the_place_of_the_templates(running: Running, models: Models) -> None:
    asked = replace(request(), system="Be brief.")
    assert running.answer([asked])[0].ids == models.expected([asked])[0].ids
    assert running.answer([asked])[0].ids != running.answer([request()])[0].ids


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        *WRONG,
        (request(max_tokens=4000), RecordError, f"max_tokens is 4000, but this engine holds {MAX_MODEL_LEN}"),
        (request("what?", "r", *[make_image(1)] * 63, max_tokens=400), RecordError, "this engine holds"),
        (replace(request(), model="pirate"), RecordError, "no adapter 'pirate' here; this engine serves 'first'"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_chunk(
    running: Running, asked: GenerationRequest, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        running.answer([asked])
    assert running.engine.stats().num_running == running.engine.stats().num_waiting == 0


def test_two_requests_of_one_id(running: Running) -> None:
    async def both() -> None:
        first = asyncio.create_task(ask(running.engine, request(max_tokens=60)))
        await asyncio.sleep(0)
        with pytest.raises(RecordError, match="'r' is being answered"):
            await ask(running.engine, request())
        assert len((await first).ids) == 60

    running.run(both())


def test_cancelled_requests_end_and_free_their_memory(running: Running) -> None:
    long = {"max_tokens": 700}

    async def run() -> None:
        engine, before = running.engine, running.engine.stats().num_cancelled
        left = engine.generate(request("red", "left", **long))
        await anext(left)
        told = asyncio.create_task(ask(engine, request("blue", "told", **long)))
        gone = asyncio.create_task(ask(engine, request("is it", "gone", **long)))
        await until(lambda: engine.stats().num_running == 3)
        assert engine.stats().kv_tokens_used > 0
        await left.aclose()  # type: ignore[attr-defined]
        await engine.cancel("told")
        assert 0 <= len((await told).ids) < 700
        gone.cancel()
        await asyncio.wait([gone])
        await until(lambda: engine.stats().num_running == 0, 5)
        assert engine.stats().num_cancelled - before == 3
        assert (engine.stats().kv_tokens_used, engine.stats().num_waiting) == (0, 0)
        await engine.cancel("nobody")
        engine.check_health()
        assert (await ask(engine, request(max_tokens=5))).finish_reason == "length"

    running.run(run())


def test_more_than_fit_wait_and_are_counted(running: Running) -> None:
    before = running.engine.stats()
    image = make_image(7)
    answers = running.answer([request("is it?", f"r{n}", image, max_tokens=12) for n in range(40)])
    after = running.engine.stats()
    assert len({tuple(answer.ids) for answer in answers}) == 1
    assert after.generation_tokens - before.generation_tokens == 40 * 12
    assert after.prompt_tokens - before.prompt_tokens == sum(answer.chunks[0].num_prompt_tokens for answer in answers)
    assert after.image_cache_queries - before.image_cache_queries == 40
    assert after.image_cache_hits > before.image_cache_hits
    waits = [answer.chunks[0].queued_s for answer in answers]
    assert min(waits) >= 0
    assert max(waits) > 3 * min(waits) > 0  # 24 have places
    assert after.kv_tokens_capacity > 0


def test_vllms_own_bounds_are_the_requests_fault(running: Running) -> None:
    if running.name != "vllm":
        assert running.answer([request(temperature=5.0)])[0].finish_reason == "length"
        return
    with pytest.raises(RecordError, match="vLLM rejects the request: temperature"):
        running.answer([request(temperature=5.0)])


OBJECT = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("kind", "text", "schema"),
    [
        ("json", json.dumps(OBJECT), OBJECT),
        (
            "json",
            '{"type": "integer", "minimum": 3, "maximum": 700}',
            {"type": "integer", "minimum": 3, "maximum": 700},
        ),
        ("regex", r"[a-c]{2}/\d", {"pattern": r"^[a-c]{2}/\d$"}),
        ("choice", '["yes", "no way"]', {"enum": ["yes", "no way"]}),
        ("grammar", 'start: "<" inner ">"\ninner: inner "x" | "y"', {"pattern": "^<yx*>$"}),
    ],
)
def test_answers_are_held_to_a_constraint(running: Running, kind: Any, text: str, schema: Any) -> None:
    names = (None, "first", None)
    sampling = {"max_tokens": 200, "temperature": 1.0, "ignore_eos": False, "constraint": Constraint(kind, text, "it")}
    asked = [replace(request("is it?", f"r{seed}", seed=seed, **sampling), model=names[seed]) for seed in range(3)]
    plain = request(max_tokens=20)
    alone = running.answer([plain])[0]
    *held, beside = running.answer([*asked, plain])
    assert beside.ids == alone.ids
    assert any(answer.finish_reason == "stop" for answer in held)
    for answer in held:
        if answer.finish_reason == "stop":
            jsonschema.validate(json.loads(answer.text) if kind == "json" else answer.text, schema)


@pytest.mark.parametrize(
    ("kind", "text"), [("json", '{"type": "object", "minProperties": 3, "maxProperties": 1}'), ("regex", "(")]
)
def test_what_no_answer_can_be_is_refused(running: Running, kind: Any, text: str) -> None:
    with pytest.raises(RecordError, match=r"^it"):
        running.answer([request(constraint=Constraint(kind, text, "it"))])


def test_penalties_and_biases_follow_the_formulas(running: Running, models: Models) -> None:
    asked = [
        replace(one, sampling=replace(one.sampling, max_tokens=16, **EDITS[place % len(EDITS)]))
        for place, one in enumerate(make_requests(2 * len(EDITS), seed=31))
        if not one.images or running.name == "builtin"  # vLLM counts the token in the place of an image, too
    ]
    plain = [replace(one, request_id=f"plain{one.request_id}") for one in make_requests(6, seed=32)]
    answers = running.answer([*asked, *plain])
    for one, answer in zip(asked, answers, strict=False):
        follow(models.wholes[None], one, answer)
    assert count_differing(answers[len(asked) :], models.expected(plain)) == 0
    with pytest.raises(RecordError, match="logit_bias"):
        running.answer([request(logit_bias=((10**8, 1.0),))])


def test_min_p_leaves_the_likeliest(running: Running, models: Models) -> None:
    asked = request(name="hot", max_tokens=8, temperature=2.0, seed=1, min_p=1.0)
    [answer] = running.answer([asked])
    assert answer.ids == by_transformers(models.wholes[None], replace(asked, sampling=NEVER)).ids


def test_scores_of_prompts(running: Running, models: Models, tmp_path: Path) -> None:
    if running.name == "builtin":
        check_scores(running, models)
        return
    with pytest.raises(RecordError, match="prompt_logprobs: vLLM cannot compute them") as caught:
        running.answer([request(prompt_logprobs=0)])  # it would end vLLM's process
    assert caught.value.field == "prompt_logprobs"
    alone = Running(make_vllm(replace(models, adapters={}), tmp_path), "vllm")
    alone.run(alone.engine.start())
    try:
        check_scores(alone, models)
    finally:
        alone.run(alone.engine.stop())
        alone.loop.close()


def check_scores(running: Running, models: Models) -> None:
    asked = request("is it red or blue? " * 3, "scored", make_image(1), max_tokens=3, prompt_logprobs=2)
    plain = replace(asked, request_id="plain", sampling=replace(asked.sampling, prompt_logprobs=None))
    [before] = running.answer([plain])
    scored, other = running.answer([asked, replace(plain, request_id="other")])
    assert scored.ids == before.ids == other.ids
    prompt = prompt_of(models.wholes[None], asked)
    wanted = logits_of(models.wholes[None], prompt, []).log_softmax(-1)
    rows, differences = scored.chunks[0].prompt_logprobs, []
    assert not any(chunk.prompt_logprobs for chunk in [*scored.chunks[1:], *before.chunks])
    assert [row is None for row in rows] == [not place or token < 0 for place, token in enumerate(prompt.ids)]
    for place, (token, row) in enumerate(zip(prompt.ids, rows, strict=True)):
        for one in row or ():
            differences.append(abs(one.logprob - float(wanted[place - 1, one.token_id])))
        if row is not None:
            assert row[0].token_id == token
            assert len(row) == (2 if row[0].rank <= 2 else 3)
    print(f"{running.name}: scores of {len(differences)} tokens differ from transformers' by {max(differences):.2g}")
    assert max(differences) < (2e-3 if running.name == "builtin" else 2e-2)  # vLLM's kernels round otherwise


def test_a_message_is_continued(running: Running, models: Models) -> None:
    asked = request("is it red?", "begun", make_image(2), max_tokens=6)
    begun = replace(asked, turns=(*asked.turns, Turn("gpt", "It is blue and")), continue_final_message=True)
    [answer] = running.answer([begun])
    assert count_differing([answer], models.expected([replace(begun, sampling=answer_length(answer))])) == 0
    ids = prompt_of(models.wholes[None], begun).ids
    decode = models.wholes[None].tokenizer.decode
    assert decode(ids[-8:]) + answer.text == decode([*ids[-8:], *answer.ids]).rstrip("\N{REPLACEMENT CHARACTER}")
    with pytest.raises(RecordError, match="continue_final_message"):
        running.answer([replace(asked, continue_final_message=True)])


def answer_length(answered: Answered) -> Sampling:
    return replace(NEVER, max_tokens=len(answered.ids))

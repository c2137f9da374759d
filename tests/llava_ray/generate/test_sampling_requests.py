"""Penalties, biases, prompts' scores and continued messages in the built-in engine, in a batch of mixed requests."""

import asyncio
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
from engines import Answered, answer_all, ask, make_image, make_parts, make_requests, request, spoil, started
from test_logit_edits import by_hand
from tool_models import only_end_token

from llava_ray.chat.conversation import Turn
from llava_ray.errors import ModelError, RecordError
from llava_ray.generate.builtin.prompt_scores import MOST_SCORED, PromptScores, bound_scored
from llava_ray.generate.builtin.scheduling import PrefillChunk
from llava_ray.generate.engine import Constraint, GenerationRequest, Sampling
from llava_ray.generate.prompts import Prompt, PromptMaker
from llava_ray.generate.vision_cache import VisionCache
from llava_ray.model.assembly import LlavaParts

GAP = 1e-3  # between the two likeliest logits: rounding may decide

EDITS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 2.0},
    {"frequency_penalty": -2.0, "presence_penalty": -0.5},
    {"logit_bias": ((40, 100.0), (41, 99.0)), "frequency_penalty": 0.5},
    {"logit_bias": tuple((token, -100.0) for token in range(0, 300, 2))},
    {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.3, "logit_bias": ((60, 5.0),)},
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LlavaParts:
    return make_parts(tmp_path_factory.mktemp("models"))


def prompt_of(parts: LlavaParts, asked: GenerationRequest) -> Prompt:
    return PromptMaker(parts, VisionCache(0), 2048).make(asked)


@torch.no_grad()
def logits_of(parts: LlavaParts, prompt: Prompt, answer: list[int]) -> torch.Tensor:
    """The logits after each token of a prompt and its answer, by transformers alone."""
    ids = torch.tensor([[*prompt.ids, *answer]])
    views = [image.views for image in prompt.images if image.views is not None]
    features = parts.tower(torch.cat(views)) if views else None
    embedded = parts.llava.embed(ids, features, [image.size for image in prompt.images])
    return parts.llava.language_model(inputs_embeds=embedded).logits[0].float()


def follow(parts: LlavaParts, asked: GenerationRequest, answered: Answered) -> None:
    """Check each token of a greedy answer against transformers' formulas over the whole vocabulary."""
    prompt, ids = prompt_of(parts, asked), answered.ids
    logits = logits_of(parts, prompt, ids)[len(prompt.ids) - 1 :]
    for place, token in enumerate(ids):
        edited = by_hand(asked.sampling, prompt.ids, ids[:place], logits[place])
        assert edited[token] >= edited.max() - GAP
    if answered.finish_reason == "stop":
        edited = by_hand(asked.sampling, prompt.ids, ids, logits[len(ids)])
        assert max(edited[stop] for stop in prompt.stops.ids) >= edited.max() - GAP
    else:
        assert len(ids) == asked.sampling.max_tokens


def edited_requests(**sampling: Any) -> list[GenerationRequest]:
    asked = make_requests(3 * len(EDITS), seed=21)
    return [
        replace(one, sampling=replace(one.sampling, max_tokens=24, **EDITS[place % len(EDITS)], **sampling))
        for place, one in enumerate(asked)
    ]


@pytest.mark.slow
def test_greedy_answers_in_a_mixed_batch_follow_the_formulas(llama: LlavaParts) -> None:
    edited = edited_requests()
    plain = [replace(one, request_id=f"plain{one.request_id}") for one in make_requests(16, seed=22)]
    plain = [replace(one, sampling=replace(one.sampling, max_tokens=12, logprobs=2)) for one in plain]
    mixed = [one for pair in zip(edited[:16], plain, strict=True) for one in pair] + edited[16:]
    answers = dict(zip(mixed, answer_all(llama, mixed, max_running=24, prefill_chunk=40), strict=True))
    for one in edited:
        follow(llama, one, answers[one])
    beside = answer_all(llama, plain, max_running=24, prefill_chunk=40)
    for one, answer in zip(plain, beside, strict=True):
        assert answers[one].ids == answer.ids
    without = answer_all(llama, [replace(one, sampling=Sampling(max_tokens=24)) for one in edited])
    assert sum(answers[one].ids != other.ids for one, other in zip(edited, without, strict=True)) > len(edited) / 2


@pytest.mark.slow
def test_a_plain_row_keeps_its_bits_beside_edited_ones(llama: LlavaParts) -> None:
    """The same batch twice: in one its neighbours' logits are changed, but not their tokens."""
    plain = request("is it red?", "plain", max_tokens=12, logprobs=3)
    same = {"frequency_penalty": 1e-9, "repetition_penalty": 1 + 1e-7}
    others = [request(f"{number} circles", f"o{number}", max_tokens=12) for number in range(5)]
    edited = [replace(one, sampling=replace(one.sampling, **same)) for one in others]

    first, second = (
        answer_all(llama, [*some[:2], plain, *some[2:]], speculative_tokens=0) for some in (others, edited)
    )
    assert [one.ids for one in first] == [one.ids for one in second]
    assert [chunk.logprobs for chunk in first[2].chunks] == [chunk.logprobs for chunk in second[2].chunks]


@pytest.mark.slow
def test_logprobs_are_the_models_own_before_edits(llama: LlavaParts) -> None:
    asked = request(max_tokens=6, logprobs=2, logit_bias=((40, 100.0),), presence_penalty=2.0)
    answer = answer_all(llama, [asked])[0]
    assert answer.ids == [40] * 6
    prompt = prompt_of(llama, asked)
    wanted = logits_of(llama, prompt, answer.ids)[len(prompt.ids) - 1 :].log_softmax(-1)
    for place, chunk in enumerate(answer.chunks):
        [told] = chunk.logprobs
        assert told.logprob == pytest.approx(float(wanted[place, 40]), abs=1e-3)
        assert told.top[0][2] == pytest.approx(float(wanted[place].max()), abs=1e-3)


@pytest.mark.slow
def test_seeds_are_reproducible_with_every_setting(llama: LlavaParts) -> None:
    asked = [
        replace(one, sampling=replace(one.sampling, temperature=1.5, min_p=0.05, top_p=0.95, seed=number))
        for number, one in enumerate(edited_requests())
    ]
    together = answer_all(llama, asked, max_running=16, prefill_chunk=30)
    for place in (0, 5, 7):
        assert answer_all(llama, [asked[place]])[0].ids == together[place].ids


@pytest.mark.slow
def test_a_bias_of_minus_100_bans_and_a_grammar_stays_held(tmp_path: Path) -> None:
    llama = only_end_token(make_parts(tmp_path))
    held = Constraint("choice", '["red", "blue"]', "guided_choice")
    texts = [llama.tokenizer.decode([token]).strip() for token in range(300)]
    with_r = [token for token, text in enumerate(texts) if text.startswith("r")]
    for bias, first in ((-100.0, with_r), (100.0, [texts.index("r")])):
        asked = request(
            max_tokens=12, ignore_eos=False, constraint=held, logit_bias=tuple((token, bias) for token in first)
        )
        assert answer_all(llama, [asked])[0].text == ("blue" if bias < 0 else "red")
    with pytest.raises(RecordError, match="logit_bias names tokens"):
        answer_all(llama, [request(logit_bias=((10**8, 1.0),))])


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"prefill_chunk": 9}, {"prefix_cache_share": 0.0}], ids=str)
def test_scores_of_prompts_are_those_of_the_whole_model(llama: LlavaParts, settings: dict[str, Any]) -> None:
    text = "is it red or blue? " * 5
    asked = request(text, "scored", make_image(1), make_image(2), max_tokens=4, prompt_logprobs=3)
    plain = replace(asked, request_id="before", sampling=Sampling(max_tokens=4, ignore_eos=True))

    async def run() -> list[Answered]:
        engine = await started(llama, **settings)
        try:
            before = await ask(engine, plain)  # leaves the prompt in the cache
            others = [replace(plain, request_id=f"o{number}") for number in range(3)]
            return [before, *await asyncio.gather(*(ask(engine, one) for one in (asked, *others)))]
        finally:
            await engine.stop()

    before, scored, *others = asyncio.run(run())
    assert all(one.ids == before.ids for one in (scored, *others))
    assert not any(chunk.prompt_logprobs for one in (before, *others) for chunk in one.chunks)
    if settings.get("prefix_cache_share") != 0.0:
        assert others[0].chunks[0].num_cached_tokens > 0
    assert scored.chunks[0].num_cached_tokens == 0
    rows, prompt = scored.chunks[0].prompt_logprobs, prompt_of(llama, asked)
    assert not any(chunk.prompt_logprobs for chunk in scored.chunks[1:])
    assert len(rows) == len(prompt.ids)
    wanted = logits_of(llama, prompt, []).log_softmax(-1)
    assert [row is None for row in rows] == [not place or token < 0 for place, token in enumerate(prompt.ids)]
    for place, (token, row) in enumerate(zip(prompt.ids, rows, strict=True)):
        if row is None:
            continue
        mine, *best = row
        assert (mine.token_id, mine.text) == (token, llama.tokenizer.decode([token]))
        assert mine.logprob == pytest.approx(float(wanted[place - 1, token]), abs=1e-3)
        for one in row:
            higher = int((wanted[place - 1] > wanted[place - 1, one.token_id] + GAP).sum()) + 1
            lower = int((wanted[place - 1] > wanted[place - 1, one.token_id] - GAP).sum()) + 1
            assert higher <= one.rank <= lower
        assert len(row) == (3 if mine.rank <= 3 else 4)
        assert [one.rank for one in best] == sorted(set(range(1, 4)) - {mine.rank})


@pytest.mark.slow
def test_scores_beyond_one_step_and_of_the_token_alone(llama: LlavaParts) -> None:
    long = "red blue " * 70  # a byte a token
    asked = [
        GenerationRequest(f"r{number}", prompt=long, sampling=Sampling(max_tokens=1, prompt_logprobs=0))
        for number in range(3)
    ]
    answers = answer_all(llama, asked, prefill_chunk=2048)
    prompt = prompt_of(llama, asked[0])
    assert len(prompt.ids) > MOST_SCORED
    wanted = logits_of(llama, prompt, []).log_softmax(-1)
    expected = [float(wanted[place, token]) for place, token in enumerate(prompt.ids[1:])]
    for answer in answers:
        rows = answer.chunks[0].prompt_logprobs
        assert [row[0].logprob for row in rows[1:] if row] == pytest.approx(expected, abs=1e-3)
        assert all(len(row) == 1 for row in rows[1:] if row)


@pytest.mark.slow
def test_a_prompt_whose_scores_are_not_finite_fails_alone(tmp_path: Path) -> None:
    parts = spoil(make_parts(tmp_path), "Q")
    bad, good = request("is it Q?", "bad", prompt_logprobs=1), request("is it red?", "good", prompt_logprobs=1)

    async def run() -> tuple[object, object]:
        engine = await started(parts)
        try:
            return tuple(await asyncio.gather(ask(engine, bad), ask(engine, good), return_exceptions=True))
        finally:
            await engine.stop()

    failed, answered = asyncio.run(run())
    assert isinstance(failed, ModelError)
    assert isinstance(answered, Answered)
    assert answered.chunks[0].prompt_logprobs


@pytest.mark.slow
def test_a_message_is_continued_and_only_the_rest_is_said(llama: LlavaParts) -> None:
    question = request("is it red?", "q", make_image(3), max_tokens=12)
    whole = answer_all(llama, [question])[0]
    tokenizer = llama.tokenizer
    beginning = tokenizer.decode(whole.ids[:5]).strip() + " and "
    begun = replace(
        question,
        request_id="c",
        turns=(*question.turns, Turn("gpt", beginning)),
        continue_final_message=True,
        sampling=replace(question.sampling, repetition_penalty=1.2),
    )
    prompt = prompt_of(llama, begun)
    assert tokenizer.decode(prompt.ids[-12:]).endswith(beginning)
    rest = answer_all(llama, [begun])[0]
    follow(llama, begun, rest)
    said = tokenizer.decode([*prompt.ids[-12:], *rest.ids]).removeprefix(tokenizer.decode(prompt.ids[-12:]))
    assert rest.text == said.rstrip("\N{REPLACEMENT CHARACTER}")
    closed = replace(begun, request_id="d", continue_final_message=False, add_generation_prompt=False)
    assert prompt_of(llama, closed).ids == [*prompt.ids, fakes.EOS]
    with pytest.raises(RecordError, match="continue_final_message"):
        prompt_of(llama, replace(question, continue_final_message=True))
    with pytest.raises(RecordError, match="no last message"):
        prompt_of(llama, GenerationRequest("p", prompt="x", continue_final_message=True))


def test_scores_of_a_random_prompt_by_hand() -> None:
    draw = random.Random(3)
    ids = [draw.choice([-200, 1, 5, 9]) for _ in range(40)]
    logits = torch.randn(40, 11, generator=torch.Generator().manual_seed(3))
    scores, place = PromptScores(ids, 2), 0
    while place < 39:
        size = min(draw.randint(1, 9), 39 - place)
        scores.add(place, logits[place : place + size])
        place += size
    rows = scores.read(str)
    assert scores.is_finite
    assert len(rows) == 40
    for before, (token, row) in enumerate(zip(ids[1:], rows[1:], strict=True)):
        assert (row is None) == (token < 0)
        for one in row or ():
            values = logits[before].log_softmax(-1)
            assert one.logprob == pytest.approx(float(values[one.token_id]))
            assert one.rank == sorted(values.tolist(), reverse=True).index(float(values[one.token_id])) + 1
            assert one.text == f"[{one.token_id}]"
    scores.add(0, logits[:1] * torch.nan)
    assert not scores.is_finite


def test_a_step_scores_a_bounded_number_of_tokens() -> None:
    class Reader:
        num_read = num_unread = num_tokens = 0

        def __init__(self, scored: bool) -> None:
            self.scores = object() if scored else None

    readers = [Reader(scored) for scored in (True, False, True, True)]
    chunks: Any = [PrefillChunk(reader, 200) for reader in readers]
    kept = bound_scored(chunks)
    assert [(chunk.request, chunk.num_tokens) for chunk in kept] == [
        (readers[0], 200),
        (readers[1], 200),
        (readers[2], MOST_SCORED - 200),
    ]

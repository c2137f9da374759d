"""Weighed answers are as likely as the model alone says, whatever is beside them in the batch."""

from pathlib import Path

import fakes
import pytest
import torch
from engines import spoil

from llava_ray.chat.conversation import IMAGE_TOKEN, Turn
from llava_ray.chat.tokens import TokenizedConversation, tokenize_conversation
from llava_ray.config.model import ModelConfig
from llava_ray.errors import ModelError
from llava_ray.generate.decoding import expand_prompt, find_sizes
from llava_ray.generate.likelihoods import compute_log_likelihoods, shared_prompt
from llava_ray.model.assembly import LlavaParts, assemble

pytestmark = pytest.mark.slow

QUESTIONS = (
    (f"{IMAGE_TOKEN}\nWhat is it?", ("a cat", "a very long dog", "B")),
    ("Two and two?", ("4", "five, or six")),
    (f"{IMAGE_TOKEN}{IMAGE_TOKEN} Which of both is it that shows more of them?", ("A", "B", "C", "D")),
)


@pytest.fixture(scope="module", params=["v1", "llava_llama_2"])
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LlavaParts:
    root: Path = tmp_path_factory.mktemp("models")
    language_model, tower = fakes.make_language_model(root / "llama"), fakes.make_vision_tower(root / "tower")
    config = ModelConfig(model_name_or_path=str(language_model), vision_tower=str(tower), version=request.param)
    made = assemble(config, "pad", seed=3)
    made.llava.eval()
    return made


def answered(parts: LlavaParts) -> list[list[TokenizedConversation]]:
    return [
        [
            tokenize_conversation([Turn("human", asked), Turn("gpt", answer)], parts.template, parts.tokenizer)
            for answer in answers
        ]
        for asked, answers in QUESTIONS
    ]


@torch.no_grad()
def alone(parts: LlavaParts, one: TokenizedConversation, pixels: torch.Tensor | None) -> tuple[float, int]:
    ids = expand_prompt(parts, one.input_ids, find_sizes(parts, pixels, None))
    features = None if pixels is None else parts.tower(pixels)
    embedded = parts.llava.embed(torch.tensor([ids]), features)
    said = parts.llava.language_model(inputs_embeds=embedded).logits[0].log_softmax(-1)
    learnt = len([label for label in one.labels if label != -100])
    first = len(ids) - learnt
    assert one.labels[-learnt:] == ids[first:]  # nothing follows what is learnt
    return sum(float(said[place - 1, ids[place]]) for place in range(first, len(ids))), learnt


def test_batched_likelihoods_are_those_of_each_answer_alone(parts: LlavaParts) -> None:
    torch.manual_seed(0)
    size = (3, fakes.IMAGE_SIZE, fakes.IMAGE_SIZE)
    pixels = [torch.randn(1, *size), None, torch.randn(2, *size)]
    conversations = answered(parts)
    found = compute_log_likelihoods(parts, conversations, pixels)
    for some, views, likelihoods in zip(conversations, pixels, found, strict=True):
        assert len(likelihoods) == len(some)
        for one, (total, count) in zip(some, likelihoods, strict=True):
            expected, learnt = alone(parts, one, views)
            assert total == pytest.approx(expected, rel=1e-4)
            assert count == learnt


def test_what_answers_share_is_the_whole_prompt(parts: LlavaParts) -> None:
    for some in answered(parts):
        shared = shared_prompt(some)
        assert all(one.input_ids[: len(shared)] == shared for one in some)
        assert all(set(one.labels[: len(shared)]) == {-100} for one in some)
        assert min(one.labels[len(shared)] for one in some) != -100


def test_an_answer_of_no_finite_likelihood_is_named(tmp_path: Path) -> None:
    language_model, tower = fakes.make_language_model(tmp_path / "llama"), fakes.make_vision_tower(tmp_path / "tower")
    config = ModelConfig(model_name_or_path=str(language_model), vision_tower=str(tower), version="v1")
    parts = spoil(assemble(config, "pad", seed=3), "~")
    conversations = [
        [
            tokenize_conversation([Turn("human", "Which?"), Turn("gpt", answer)], parts.template, parts.tokenizer)
            for answer in answers
        ]
        for answers in (("cat", "dog"), ("cat", "a ~ b"))
    ]
    assert all(total < 0 for total, _ in compute_log_likelihoods(parts, conversations[:1], [None])[0])
    with pytest.raises(ModelError, match=r"logits are not finite \(answer 4 of 4, to question 2 of 2"):
        compute_log_likelihoods(parts, conversations, [None, None])

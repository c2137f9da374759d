"""Groups of sampled answers: their probabilities, their independence of the batch, and weights put in place."""

from pathlib import Path

import fakes
import numpy as np
import pytest
import torch

from llava_ray.chat.conversation import IMAGE_TOKEN, Turn
from llava_ray.chat.tokens import tokenize_prompt
from llava_ray.config.model import ModelConfig
from llava_ray.errors import ModelError
from llava_ray.generate.decoding import expand_prompt
from llava_ray.generate.group_sampling import GroupPrompts, sample_groups, score_groups
from llava_ray.model.assembly import LlavaParts, assemble
from llava_ray.objectives.grpo import Grpo
from llava_ray.objectives.objective import PackedRow, RolloutTerms

pytestmark = pytest.mark.slow

CPU, GROUP, LONGEST, TEMPERATURE = torch.device("cpu"), 3, 5, 0.7
QUESTIONS = (f"{IMAGE_TOKEN}\nWhat is it?", "Two and two?", f"{IMAGE_TOKEN}\nWhich of them all is the largest one?")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> LlavaParts:
    root: Path = tmp_path_factory.mktemp("models")
    language_model, tower = fakes.make_language_model(root / "llama"), fakes.make_vision_tower(root / "tower")
    made = assemble(ModelConfig(model_name_or_path=str(language_model), vision_tower=str(tower)), "pad", seed=3)
    made.llava.eval()
    return made


def asked(parts: LlavaParts, chosen: tuple[int, ...] = (0, 1, 2)) -> GroupPrompts:
    side = parts.image_spec.height
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(1, 3, side, side, generator=generator) for _ in QUESTIONS]
    prompts, pixels, sizes = [], [], []
    for number in chosen:
        has_image = IMAGE_TOKEN in QUESTIONS[number]
        prompts.append(tokenize_prompt([Turn("human", QUESTIONS[number])], parts.template, parts.tokenizer))
        pixels.append(views[number] if has_image else None)
        sizes.append([(side, side)] if has_image else [])
    return GroupPrompts(prompts, pixels, sizes)


def numbers(chosen: tuple[int, ...] = (0, 1, 2)) -> np.ndarray:
    return np.random.default_rng(4).random((3, GROUP, LONGEST))[list(chosen)]


def test_answers_do_not_depend_on_what_else_is_in_the_batch(parts: LlavaParts) -> None:
    together = sample_groups(parts, asked(parts), numbers(), [LONGEST] * 3, TEMPERATURE)
    for number in range(3):
        [alone] = sample_groups(parts, asked(parts, (number,)), numbers((number,)), [LONGEST], TEMPERATURE)
        assert [one.token_ids for one in alone] == [one.token_ids for one in together[number]]
        for one, other in zip(alone, together[number], strict=True):
            assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)
    assert len({tuple(one.token_ids) for one in together[0]}) > 1, "random numbers of their own"
    limited = sample_groups(parts, asked(parts), numbers(), [2, 5, 1], TEMPERATURE)
    assert [max(len(one.token_ids) for one in some) for some in limited] == [2, 5, 1]
    assert limited[0][0].token_ids == together[0][0].token_ids[:2]


def test_the_end_of_an_answer_is_a_token_that_is_learnt(parts: LlavaParts) -> None:
    end = parts.tokenizer.eos_token_id
    head = parts.llava.language_model.lm_head.weight
    kept = head.detach().clone()
    try:
        with torch.no_grad():
            head[end] = 40 * head.mean(0).sign()  # likely at some places
            groups = sample_groups(parts, asked(parts), numbers(), [LONGEST] * 3, TEMPERATURE)
    finally:
        with torch.no_grad():
            head.copy_(kept)
    answers = [one for some in groups for one in some]
    assert any(one.ended for one in answers)
    for one in answers:
        assert one.ended == (one.token_ids[-1] == end)
        assert end not in one.token_ids[:-1]


def test_probabilities_are_those_of_training_whatever_the_temperature(parts: LlavaParts) -> None:
    prompts = asked(parts)
    groups = sample_groups(parts, prompts, numbers(), [LONGEST] * 3, TEMPERATURE)
    scored = score_groups(parts, prompts, [[one.token_ids for one in some] for some in groups], TEMPERATURE)
    for number, some in enumerate(groups):
        for one, known in zip(some, scored[number], strict=True):
            assert known == pytest.approx(one.log_probs, abs=1e-5)
            prompt = expand_prompt(parts, prompts.prompts[number], prompts.image_sizes[number])
            ids = torch.tensor([[*prompt, *one.token_ids]])
            labels = torch.tensor([[*[-100] * len(prompt), *one.token_ids]])
            views = prompts.pixels[number]
            terms = RolloutTerms(
                *(torch.tensor(row) for row in ([1.0] * len(known), one.log_probs, [1.0] * len(known)))
            )
            row = PackedRow.on_device(
                ids,
                torch.arange(ids.shape[1])[None],
                labels,
                CPU,
                features=None if views is None else parts.tower.extract(views),
                image_sizes=prompts.image_sizes[number],
                rollouts=terms,
            )
            output = Grpo(temperature=TEMPERATURE).compute(parts.llava, row)
            assert output.losses.tolist() == pytest.approx([-1.0] * len(known), abs=1e-4), "a ratio of one"
            assert float(output.metrics["policy_gap"]) < 1e-4


def test_damaged_weights_are_named(parts: LlavaParts) -> None:
    head = parts.llava.language_model.lm_head.weight
    kept = head.detach().clone()
    try:
        with torch.no_grad():
            head[0, 0] = torch.nan
        with pytest.raises(ModelError, match="token 1 of answer 1 to prompt 1"):
            sample_groups(parts, asked(parts), numbers(), [LONGEST] * 3, TEMPERATURE)
    finally:
        with torch.no_grad():
            head.copy_(kept)

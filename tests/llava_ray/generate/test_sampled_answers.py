"""Sampled answers hang on prompt and seed alone, and noise on its step and seed."""

from pathlib import Path

import fakes
import pytest
import torch
from pictures import picture

from llava_ray.chat.conversation import Turn, with_markers
from llava_ray.chat.tokens import tokenize_prompt
from llava_ray.config.model import ModelConfig
from llava_ray.errors import DataError, ImageError, RecordError
from llava_ray.generate.answers import check_seeds
from llava_ray.generate.decoding import generate_batch
from llava_ray.generate.engine import Sampling
from llava_ray.generate.questions import ModelQuestion, decode_question_images, to_table
from llava_ray.generate.sampled_answers import add_diffusion_noise, sample_batch
from llava_ray.model.assembly import LlavaParts, assemble

SAMPLING = Sampling(max_tokens=8, temperature=1.0)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> LlavaParts:
    root = tmp_path_factory.mktemp("sampled")
    config = ModelConfig(
        model_name_or_path=str(fakes.make_language_model(root / "language_model")),
        vision_tower=str(fakes.make_vision_tower(root / "tower")),
    )
    return assemble(config, "pad")


def prompts_and_pixels(parts: LlavaParts) -> tuple[list[list[int]], list[torch.Tensor | None]]:
    spec = parts.image_spec
    pixels = [
        torch.rand(1, 3, spec.height, spec.width, generator=torch.Generator().manual_seed(n)) if n % 3 else None
        for n in range(5)
    ]
    texts = ["What?", "What is in the picture?", "Is it red?", "How many are there?", "Why is it so?"]
    turns = [[Turn("human", with_markers(text, int(p is not None)))] for text, p in zip(texts, pixels, strict=True)]
    return [tokenize_prompt(some, parts.template, parts.tokenizer) for some in turns], pixels


def test_answers_hang_on_prompt_and_seed_not_on_the_batch(parts: LlavaParts) -> None:
    prompts, pixels = prompts_and_pixels(parts)
    seeds = [[10 * n + m for m in range(4)] for n in range(5)]
    together = sample_batch(parts, prompts, pixels, seeds, SAMPLING)
    assert together == sample_batch(parts, prompts, pixels, seeds, SAMPLING)
    for index in range(5):
        for place, seed in enumerate(seeds[index]):
            alone = sample_batch(parts, [prompts[index]], [pixels[index]], [[seed]], SAMPLING)
            assert alone == [[together[index][place]]]
    assert len({tuple(ids) for some in together for ids, _ in some}) > 15
    other = sample_batch(parts, prompts, pixels, [[seed + 1000 for seed in some] for some in seeds], SAMPLING)
    assert other != together


def test_greedy_samples_are_the_greedy_answer_and_ends_are_told(parts: LlavaParts) -> None:
    prompts, pixels = prompts_and_pixels(parts)
    greedy = generate_batch(parts, prompts, pixels, max_new_tokens=8)
    found = sample_batch(parts, prompts, pixels, [[1, 2]] * 5, Sampling(max_tokens=8))
    assert [[ids for ids, _ in some] for some in found] == [[ids] * 2 for ids in greedy]
    for some in sample_batch(parts, prompts, pixels, [list(range(30))] * 5, Sampling(max_tokens=3, temperature=3.0)):
        for ids, ended in some:
            assert ended == (len(ids) < 3)


def test_narrow_nuclei_are_greedy_and_impossible_settings_refused(parts: LlavaParts) -> None:
    prompts, pixels = prompts_and_pixels(parts)
    narrow = sample_batch(parts, prompts, pixels, [[7]] * 5, Sampling(max_tokens=8, temperature=1.0, top_p=1e-6))
    assert [some[0][0] for some in narrow] == generate_batch(parts, prompts, pixels, max_new_tokens=8)
    with pytest.raises(RecordError, match="top_p"):
        sample_batch(parts, prompts, pixels, [[7]] * 5, Sampling(top_p=0))


def test_noise_follows_the_published_schedule() -> None:
    pixels = torch.linspace(-2, 2, 3 * 64 * 64).reshape(1, 3, 64, 64)
    for step in (1, 500, 1000):
        noised = add_diffusion_noise(pixels, step, 3)
        assert torch.equal(noised, add_diffusion_noise(pixels, step, 3))
        betas = torch.sigmoid(torch.linspace(-6, 6, 1000)) * (0.5e-2 - 1e-5) + 1e-5
        kept = torch.cumprod(1 - betas, 0)[step - 1]
        rest = noised - kept.sqrt() * pixels
        assert float(rest.std()) == pytest.approx(float((1 - kept).sqrt()), rel=0.03)
    assert not torch.equal(add_diffusion_noise(pixels, 500, 3), add_diffusion_noise(pixels, 500, 4))


def test_an_unreadable_image_is_its_questions_own_if_that_is_tolerated(parts: LlavaParts, tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(picture())
    (tmp_path / "bad.png").write_bytes(picture()[:60])
    asked = [ModelQuestion(name, "What?", str(tmp_path / f"{name}.png"), seeds=[1]) for name in ("good", "bad", "none")]
    table = decode_question_images(to_table(asked), parts.image_spec, tolerant=True)
    said = table["unreadable"].to_pylist()
    assert said[0] is None
    assert "bad.png" in said[1]
    assert "does not exist" in said[2]
    assert [bool(cell) for cell in table["pixels"].to_pylist()] == [True, False, False]
    with pytest.raises(ImageError, match=r"bad\.png"):
        decode_question_images(to_table(asked), parts.image_spec)


def test_seeds_are_of_all_questions_or_of_none() -> None:
    check_seeds([ModelQuestion("a", "x"), ModelQuestion("b", "x")])
    with pytest.raises(DataError, match="'a' has seeds and 'b' has none"):
        check_seeds([ModelQuestion("a", "x", seeds=[1]), ModelQuestion("b", "x")])
    with pytest.raises(DataError, match="'a' has seeds beside candidates"):
        check_seeds([ModelQuestion("a", "x", seeds=[1], candidates=["y"])])

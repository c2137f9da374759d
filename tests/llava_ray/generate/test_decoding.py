"""Batched decoding says what each prompt alone would have been answered."""

from dataclasses import dataclass, replace
from pathlib import Path

import fakes
import pytest
import torch

from llava_ray.chat.templates import find_template
from llava_ray.config.model import ModelConfig
from llava_ray.errors import ConfigError, ModelError, RecordError
from llava_ray.generate.decoding import Stops, answer_text, default_stops, expand_prompt, find_sizes, generate_batch
from llava_ray.generate.engine import GenerationRequest, Sampling
from llava_ray.generate.prompts import PromptMaker
from llava_ray.generate.vision_cache import VisionCache
from llava_ray.model.assembly import LlavaParts, assemble

pytestmark = pytest.mark.slow

# Random models rarely write an end token: let a sixth of the vocabulary end an answer.
STOPS = Stops(frozenset(range(250, 300)))


@dataclass(frozen=True)
class Prompts:
    ids: list[list[int]]
    pixels: list[torch.Tensor | None]


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    """Nine prompts of all lengths with no, one and two images."""
    generator = torch.Generator().manual_seed(0)
    ids, pixels = [], []
    for index in range(9):
        num_images = index % 3
        length = int(torch.randint(1, 12, (1,), generator=generator))
        words = torch.randint(5, 300, (length,), generator=generator).tolist()
        ids.append([1, *[-200] * num_images, *words])
        size = (num_images, 3, fakes.IMAGE_SIZE, fakes.IMAGE_SIZE)
        pixels.append(torch.randn(size, generator=generator) if num_images else None)
    return Prompts(ids, pixels)


def assembled(root: Path, kind: str = "llama", version: str = "v1") -> LlavaParts:
    language_model = fakes.make_language_model(root / kind, kind)
    tower = fakes.make_vision_tower(root / "tower")
    config = ModelConfig(model_name_or_path=str(language_model), vision_tower=str(tower), version=version)
    parts = assemble(config, "pad", seed=3)
    parts.llava.eval()
    return parts


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LlavaParts:
    return assembled(tmp_path_factory.mktemp("models"))


def one_by_one(parts: LlavaParts, prompts: Prompts, max_new_tokens: int) -> list[list[int]]:
    return [
        generate_batch(parts, [ids], [pixels], max_new_tokens=max_new_tokens, stops=STOPS)[0]
        for ids, pixels in zip(prompts.ids, prompts.pixels, strict=True)
    ]


@torch.no_grad()
def by_transformers(parts: LlavaParts, prompts: Prompts, max_new_tokens: int) -> list[list[int]]:
    answers = []
    for ids, pixels in zip(prompts.ids, prompts.pixels, strict=True):
        expanded = torch.tensor([expand_prompt(parts, ids, find_sizes(parts, pixels, None))])
        features = None if pixels is None else parts.tower(pixels)
        written = parts.llava.language_model.generate(
            inputs_embeds=parts.llava.embed(expanded, features),
            attention_mask=torch.ones_like(expanded),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(STOPS.ids),
            pad_token_id=0,
        )[0].tolist()
        answers.append(written[:-1] if written[-1] in STOPS.ids else written)
    return answers


@pytest.mark.parametrize("kind", fakes.LANGUAGE_MODELS)
def test_batch_equals_one_by_one_and_transformers(kind: str, prompts: Prompts, tmp_path: Path) -> None:
    parts = assembled(tmp_path, kind)
    batched = generate_batch(parts, prompts.ids, prompts.pixels, max_new_tokens=8, stops=STOPS)
    assert batched == one_by_one(parts, prompts, 8)
    assert batched == by_transformers(parts, prompts, 8)
    assert len({len(answer) for answer in batched}) > 1  # rows have left the batch at different times


def test_order_of_the_batch_changes_nothing(llama: LlavaParts, prompts: Prompts) -> None:
    forwards = generate_batch(llama, prompts.ids, prompts.pixels, max_new_tokens=8, stops=STOPS)
    backwards = generate_batch(llama, prompts.ids[::-1], prompts.pixels[::-1], max_new_tokens=8, stops=STOPS)
    assert backwards[::-1] == forwards


def test_images_are_looked_at(llama: LlavaParts, prompts: Prompts) -> None:
    chosen = Prompts([prompts.ids[1]] * 2, [prompts.pixels[1], -prompts.pixels[1]])
    first, second = generate_batch(llama, chosen.ids, chosen.pixels, max_new_tokens=12, stops=Stops(frozenset()))
    assert first != second


def test_expanded_prompts_are_taken_as_they_are(llama: LlavaParts, prompts: Prompts) -> None:
    expanded = [
        expand_prompt(llama, ids, find_sizes(llama, pixels, None))
        for ids, pixels in zip(prompts.ids, prompts.pixels, strict=True)
    ]
    assert [ids.count(-200) for ids in expanded] == [0, 16, 32] * 3
    same = generate_batch(llama, expanded, prompts.pixels, max_new_tokens=4, stops=STOPS)
    assert same == generate_batch(llama, prompts.ids, prompts.pixels, max_new_tokens=4, stops=STOPS)


def test_markers_without_their_images_are_refused(llama: LlavaParts, prompts: Prompts) -> None:
    with pytest.raises(RecordError, match="2 <image> markers but 1 images"):
        generate_batch(llama, [[1, -200, -200, 5]], [prompts.pixels[1]], max_new_tokens=1)


def test_max_new_tokens(llama: LlavaParts) -> None:
    answers = generate_batch(llama, [[1, 5], [1, 6, 7]], [None, None], max_new_tokens=3, stops=Stops(frozenset()))
    assert [len(answer) for answer in answers] == [3, 3]
    assert generate_batch(llama, [], [], max_new_tokens=3) == []


def test_sampling_follows_the_seed(llama: LlavaParts) -> None:
    def sampled(seed: int, temperature: float = 5.0) -> list[list[int]]:
        return generate_batch(
            llama, [[1, 5]], [None], max_new_tokens=8, temperature=temperature, stops=Stops(frozenset()), seed=seed
        )

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)
    assert sampled(1, 0.0) == sampled(2, 0.0)
    with pytest.raises(ConfigError, match=r"temperature is -1\.0"):
        sampled(1, -1.0)


def test_default_stops_are_declared_ones(llama: LlavaParts) -> None:
    assert default_stops(llama) == Stops(frozenset({fakes.EOS}))
    llama.llava.language_model.generation_config.eos_token_id = [fakes.EOS, 7]
    assert default_stops(llama).ids == {fakes.EOS, 7}
    llama.llava.language_model.generation_config.eos_token_id = None
    assert default_stops(llama).ids == {fakes.EOS}


def test_stop_text_of_several_tokens(llama: LlavaParts) -> None:
    """v0's ### is no token of its own; the answer ends where the text does."""
    parts = replace(llama, template=find_template("v0"))
    stops = default_stops(parts)
    assert stops == Stops(frozenset({fakes.EOS}), "###")
    free = generate_batch(parts, [[1, 5]], [None], max_new_tokens=8, stops=Stops(frozenset()))[0]
    text = parts.tokenizer.decode(free[3:5])
    ended = generate_batch(parts, [[1, 5]], [None], max_new_tokens=8, stops=Stops(frozenset(), text))[0]
    assert ended == free[:5]
    assert answer_text(parts, parts.tokenizer.encode(" a red circle ### Human", add_special_tokens=False)) == (
        "a red circle"
    )


def test_a_stop_token_spelt_out_in_an_answer_is_quoted(llama: LlavaParts) -> None:
    """Only a control token that the model writes as such ends an answer; a caller's stop text ends it both ways."""
    parts, end = replace(llama, template=find_template("v1")), "</s>"
    apart = [token for char in end for token in parts.tokenizer.encode(char, add_special_tokens=False)]
    quoted = parts.tokenizer.decode(apart)
    assert fakes.EOS not in apart
    assert answer_text(parts, [*apart, *apart]) == (quoted * 2).strip()
    asked = GenerationRequest("r", prompt="Hi", sampling=Sampling(stop=(end, "END")))
    stops, texts = PromptMaker(parts, VisionCache(0), 64).find_stops(asked)
    assert (parts.tokenizer.convert_tokens_to_ids(end) in stops.ids, texts) == (True, (end, "END"))


SIZES = [(64, 48), (96, 20), (24, 16), (64, 64), (40, 70)]


@pytest.fixture(scope="module")
def anyres(tmp_path_factory: pytest.TempPathFactory) -> LlavaParts:
    root = tmp_path_factory.mktemp("anyres")
    config = ModelConfig(
        model_name_or_path=str(fakes.make_language_model(root / "llama")),
        vision_tower=str(fakes.make_vision_tower(root / "tower")),
        mm_patch_merge_type="spatial_unpad",
    )
    parts = assemble(config, "anyres", seed=3)
    parts.llava.eval()
    return parts


def test_images_of_several_views_in_a_batch_equal_one_by_one(anyres: LlavaParts) -> None:
    generator = torch.Generator().manual_seed(0)
    ids, pixels, sizes = [], [], []
    for index in range(9):
        shown = [SIZES[(index + number) % len(SIZES)] for number in range(index % 3)]
        num_views = sum(anyres.image_tokens.num_views(*size) for size in shown)
        views = torch.randn(num_views, 3, fakes.IMAGE_SIZE, fakes.IMAGE_SIZE, generator=generator)
        ids.append([1, *[token for _ in shown for token in (-200, 10 + index)], 20 + index])
        pixels.append(views if shown else None)
        sizes.append(shown)
    batched = generate_batch(anyres, ids, pixels, image_sizes=sizes, max_new_tokens=8, stops=STOPS)
    alone = [
        generate_batch(anyres, [prompt], [views], image_sizes=[shown], max_new_tokens=8, stops=STOPS)[0]
        for prompt, views, shown in zip(ids, pixels, sizes, strict=True)
    ]
    assert batched == alone
    assert len({len(answer) for answer in batched}) > 1


def test_views_without_the_sizes_of_their_images_are_refused(anyres: LlavaParts) -> None:
    views = torch.zeros(5, 3, fakes.IMAGE_SIZE, fakes.IMAGE_SIZE)
    with pytest.raises(ModelError, match="5 views were given without image_sizes"):
        generate_batch(anyres, [[1, -200]], [views], max_new_tokens=1)
    with pytest.raises(ModelError, match=r"5 views were given, but images of \[\(96, 20\)\] pixels are cut into 4"):
        generate_batch(anyres, [[1, -200]], [views], image_sizes=[[(96, 20)]], max_new_tokens=1)
    with pytest.raises(RecordError, match="2 <image> markers but 1 images"):
        generate_batch(anyres, [[1, -200, -200]], [views], image_sizes=[[(64, 64)]], max_new_tokens=1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error_that_names_the_prompt(tmp_path: Path, temperature: float) -> None:
    parts = assembled(tmp_path)
    with torch.no_grad():
        parts.llava.language_model.get_input_embeddings().weight[7] = torch.nan
    asked = [[1, 20, 30], [1, 7, 9], [1, 40]]
    with pytest.raises(ModelError, match=r"logits are not finite \(token 1 of the answer to prompt 2 of 3"):
        generate_batch(parts, asked, [None] * 3, max_new_tokens=3, temperature=temperature)
    generate_batch(parts, [asked[0], asked[2]], [None] * 2, max_new_tokens=1, temperature=temperature)

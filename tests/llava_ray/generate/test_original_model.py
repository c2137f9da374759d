"""The original's weights in our parts give the original's losses and words."""

import json
from pathlib import Path

import torch

from llava_ray.chat.conversation import Turn, read_turns
from llava_ray.chat.tokens import expand_images, tokenize_conversation, tokenize_prompt
from llava_ray.generate.decoding import Stops, expand_prompt, find_sizes, generate_batch
from llava_ray.model.bundle import load_bundle, save_bundle
from llava_ray.model.losses import sample_losses

GOLDEN = Path(__file__).parents[2] / "golden"


def test_losses_of_one_packed_row_are_the_originals(golden_model) -> None:
    parts, cases = golden_model.parts, golden_model.expected["cases"]
    input_ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    pixels = [golden_model.pixels(case["image"]) for case in cases]
    for case, image in zip(cases, pixels, strict=True):
        tokens = tokenize_conversation(read_turns(case["conversations"]), parts.template, parts.tokenizer)
        counts = [] if image is None else [parts.image_tokens.num_features]
        ids, targets = expand_images(tokens.input_ids, tokens.labels, counts)
        input_ids, labels, positions = input_ids + ids, labels + targets, positions + list(range(len(ids)))
    with torch.no_grad():
        losses, counts = sample_losses(
            parts.llava,
            torch.tensor([input_ids]),
            torch.tensor([positions]),
            torch.tensor([labels]),
            parts.tower(torch.cat([image for image in pixels if image is not None])),
        )
    assert counts.tolist() == [case["supervised"] for case in cases]
    expected = torch.tensor([case["loss"] for case in cases])
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-4)


def test_greedy_words_in_one_batch_are_the_originals(golden_model) -> None:
    parts, generations = golden_model.parts, golden_model.expected["generations"]
    prompts = [
        tokenize_prompt([Turn("human", case["question"])], parts.template, parts.tokenizer) for case in generations
    ]
    pixels = [golden_model.pixels(case["image"]) for case in generations]
    lengths = [
        len(expand_prompt(parts, ids, find_sizes(parts, image, None)))
        for ids, image in zip(prompts, pixels, strict=True)
    ]
    assert lengths == [case["sequence_length"] for case in generations]
    answers = generate_batch(parts, prompts, pixels, max_new_tokens=12, stops=Stops(frozenset()))
    assert answers == [case["new_token_ids"] for case in generations]


def test_anyres_lengths_and_greedy_words_in_one_batch_are_the_originals(golden_anyres_model) -> None:
    parts, generations = golden_anyres_model.parts, golden_anyres_model.expected["generations"]
    prompts = [
        tokenize_prompt([Turn("human", case["question"])], parts.template, parts.tokenizer) for case in generations
    ]
    images = [golden_anyres_model.views(case["image"]) for case in generations]
    lengths = [len(expand_prompt(parts, ids, [size])) for ids, (_, size) in zip(prompts, images, strict=True)]
    assert lengths == [case["sequence_length"] for case in generations]
    assert [len(views) for views, _ in images] == [case["pixel_shape"][1] for case in generations]
    pixels, sizes = [views for views, _ in images], [[size] for _, size in images]
    answers = generate_batch(parts, prompts, pixels, image_sizes=sizes, max_new_tokens=12, stops=Stops(frozenset()))
    assert answers == [case["new_token_ids"] for case in generations]


def test_an_anyres_bundle_answers_the_same(golden_anyres_model, tmp_path: Path) -> None:
    save_bundle(tmp_path / "bundle", golden_anyres_model.parts)
    loaded = load_bundle(tmp_path / "bundle")
    assert (loaded.image_spec, loaded.image_tokens) == (
        golden_anyres_model.parts.image_spec,
        golden_anyres_model.parts.image_tokens,
    )
    for case in golden_anyres_model.expected["generations"][:2]:
        prompt = tokenize_prompt([Turn("human", case["question"])], loaded.template, loaded.tokenizer)
        views, size = golden_anyres_model.views(case["image"])
        answer = generate_batch(
            loaded, [prompt], [views], image_sizes=[[size]], max_new_tokens=12, stops=Stops(frozenset())
        )
        assert answer == [case["new_token_ids"]]


def test_a_bundle_of_it_splits_text_the_same_way(golden_model, tmp_path: Path) -> None:
    """The bundle's tokenizer.json must keep the merges in SentencePiece's order."""
    parts = golden_model.parts
    save_bundle(tmp_path / "bundle", parts)
    loaded = load_bundle(tmp_path / "bundle")
    cases = json.loads((GOLDEN / "tokens.json").read_text())
    turns = [read_turns(case["conversations"]) for case in cases if case["template"] == "v1"]
    turns.append(read_turns([{"from": "human", "value": "Two  spaces"}, {"from": "gpt", "value": " 一 \n\n  x"}]))
    for conversation in turns:
        expected = tokenize_conversation(conversation, parts.template, parts.tokenizer)
        assert tokenize_conversation(conversation, loaded.template, loaded.tokenizer) == expected
    assert loaded.tokenizer.pad_token == "<unk>"

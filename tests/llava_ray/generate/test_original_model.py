"""The original's checkpoints, loaded as they are, give the original's losses and words."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from losses import sample_losses
from originals import GOLDEN

from llava_ray.chat.conversation import Turn, read_turns
from llava_ray.chat.tokens import expand_images, tokenize_conversation, tokenize_prompt
from llava_ray.generate.decoding import Stops, expand_prompt, generate_batch
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.saving import save_bundle

pytestmark = pytest.mark.slow

FULL = pytest.mark.parametrize("golden_model", ["v15_mlp_pad"], indirect=True)
ANYRES = pytest.mark.parametrize("golden_model", ["v16_anyres"], indirect=True)
LORA = pytest.mark.parametrize("golden_model", ["lora", "lora, merged"], indirect=True)


@torch.no_grad()
def losses_of_one_row(golden_model, cases) -> torch.Tensor:
    """Pack all samples into one row; return each one's mean loss."""
    parts = golden_model.parts
    input_ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    pixels = [golden_model.pixels(case["image"]) for case in cases]
    for case, image in zip(cases, pixels, strict=True):
        tokens = tokenize_conversation(read_turns(case["conversations"]), parts.template, parts.tokenizer)
        counts = [] if image is None else [parts.image_tokens.num_features]
        ids, targets = expand_images(tokens.input_ids, tokens.labels, counts)
        input_ids, labels, positions = input_ids + ids, labels + targets, positions + list(range(len(ids)))
    shown = [image for image in pixels if image is not None]
    losses, counts = sample_losses(
        parts.llava,
        torch.tensor([input_ids]),
        torch.tensor([positions]),
        torch.tensor([labels]),
        parts.tower(torch.cat(shown)) if shown else None,
    )
    assert counts.tolist() == [case["supervised"] for case in cases]
    return losses


@FULL
def test_losses_of_one_packed_row_are_the_originals(golden_model) -> None:
    cases = golden_model.expected["cases"]
    expected = torch.tensor([case["loss"] for case in cases])
    torch.testing.assert_close(losses_of_one_row(golden_model, cases), expected, rtol=0, atol=1e-4)


@FULL
def test_greedy_words_in_one_batch_are_the_originals(golden_model) -> None:
    parts, generations = golden_model.parts, golden_model.expected["generations"]
    prompts = [
        tokenize_prompt([Turn("human", case["question"])], parts.template, parts.tokenizer) for case in generations
    ]
    pixels = [golden_model.pixels(case["image"]) for case in generations]
    sizes = [[] if case["image"] is None else [golden_model.views(case["image"])[1]] for case in generations]
    lengths = [len(expand_prompt(parts, ids, size)) for ids, size in zip(prompts, sizes, strict=True)]
    assert lengths == [case["sequence_length"] for case in generations]
    answers = generate_batch(parts, prompts, pixels, max_new_tokens=12, stops=Stops(frozenset()))
    assert answers == [case["new_token_ids"] for case in generations]


@ANYRES
def test_anyres_lengths_and_greedy_words_in_one_batch_are_the_originals(golden_model) -> None:
    parts, generations = golden_model.parts, golden_model.expected["generations"]
    prompts = [
        tokenize_prompt([Turn("human", case["question"])], parts.template, parts.tokenizer) for case in generations
    ]
    images = [golden_model.views(case["image"]) for case in generations]
    lengths = [len(expand_prompt(parts, ids, [size])) for ids, (_, size) in zip(prompts, images, strict=True)]
    assert lengths == [case["sequence_length"] for case in generations]
    assert [len(views) for views, _ in images] == [case["pixel_shape"][1] for case in generations]
    pixels, sizes = [views for views, _ in images], [[size] for _, size in images]
    answers = generate_batch(parts, prompts, pixels, image_sizes=sizes, max_new_tokens=12, stops=Stops(frozenset()))
    assert answers == [case["new_token_ids"] for case in generations]


@ANYRES
def test_an_anyres_bundle_answers_the_same(golden_model, tmp_path: Path) -> None:
    save_bundle(tmp_path / "bundle", golden_model.parts)
    loaded = load_pretrained_model(tmp_path / "bundle")
    assert (loaded.image_spec, loaded.image_tokens) == (golden_model.parts.image_spec, golden_model.parts.image_tokens)
    for case in golden_model.expected["generations"][:2]:
        prompt = tokenize_prompt([Turn("human", case["question"])], loaded.template, loaded.tokenizer)
        views, size = golden_model.views(case["image"])
        answer = generate_batch(
            loaded, [prompt], [views], image_sizes=[[size]], max_new_tokens=12, stops=Stops(frozenset())
        )
        assert answer == [case["new_token_ids"]]


@FULL
def test_a_bundle_of_it_splits_text_the_same_way(golden_model, tmp_path: Path) -> None:
    """The bundle's tokenizer.json must keep the merges in SentencePiece's order."""
    parts = golden_model.parts
    save_bundle(tmp_path / "bundle", parts)
    loaded = load_pretrained_model(tmp_path / "bundle")
    cases = json.loads((GOLDEN / "tokens.json").read_text())
    turns = [read_turns(case["conversations"]) for case in cases if case["template"] == "v1"]
    turns.append(read_turns([{"from": "human", "value": "Two  spaces"}, {"from": "gpt", "value": " 一 \n\n  x"}]))
    for conversation in turns:
        expected = tokenize_conversation(conversation, parts.template, parts.tokenizer)
        assert tokenize_conversation(conversation, loaded.template, loaded.tokenizer) == expected
    assert loaded.tokenizer.pad_token == "<unk>"


@LORA
def test_losses_of_text_with_an_adapter_are_the_originals(golden_model) -> None:
    cases = [case for case in golden_model.expected["cases"] if case["image"] is None]
    assert len(cases) > 2
    expected = torch.tensor([case["loss"] for case in cases])
    torch.testing.assert_close(losses_of_one_row(golden_model, cases), expected, rtol=0, atol=1e-4)


@LORA
def test_losses_with_an_adapter_are_those_of_plain_transformers_and_peft(golden_model) -> None:
    """All of a sample with an image but the splice, written down once more from the folder's files."""
    folder, parts = golden_model.folder, golden_model.parts
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    language_model = peft.PeftModel.from_pretrained(base, folder / "lora")
    tower = transformers.CLIPVisionModel.from_pretrained(folder / "tower")
    stored = torch.load(folder / "lora" / "non_lora_trainables.bin")
    weights = {name.rpartition("mm_projector.")[2]: tensor.float() for name, tensor in stored.items()}
    cases = [case for case in golden_model.expected["cases"] if case["image"] is not None]
    expected = []
    for case in cases:
        tokens = tokenize_conversation(read_turns(case["conversations"]), parts.template, parts.tokenizer)
        place = tokens.input_ids.index(-200)
        with torch.no_grad():
            features = tower(golden_model.pixels(case["image"]), output_hidden_states=True).hidden_states[-2][:, 1:]
            hidden = torch.nn.functional.gelu(features @ weights["0.weight"].T + weights["0.bias"])
            image = hidden @ weights["2.weight"].T + weights["2.bias"]
            ids = torch.tensor([[token if token != -200 else 0 for token in tokens.input_ids]])
            text = base.get_input_embeddings()(ids)
            embedded = torch.cat([text[:, :place], image, text[:, place + 1 :]], dim=1)
            labels = tokens.labels[:place] + [-100] * 16 + tokens.labels[place + 1 :]
            expected.append(language_model(inputs_embeds=embedded, labels=torch.tensor([labels])).loss)
    torch.testing.assert_close(losses_of_one_row(golden_model, cases), torch.stack(expected), rtol=0, atol=1e-5)

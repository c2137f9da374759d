"""<im_patch>, <im_start> and <im_end>: in the text, in the tables, in what is learnt and in what is kept."""

from pathlib import Path

import fakes
import pytest
import torch
from losses import token_losses

from llava_ray.chat.conversation import IMAGE_TOKEN_INDEX, Turn
from llava_ray.chat.tokens import tokenize_conversation, tokenize_prompt
from llava_ray.errors import ModelError
from llava_ray.generate.decoding import Stops, generate_batch
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.freezing import freeze
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.network.embeddings import extend_embeddings
from llava_ray.model.saving import save_bundle

pytestmark = pytest.mark.slow

TURNS = [Turn("human", "What <image> is it?"), Turn("gpt", "red")]
VOCABULARY = 300


def tables(parts: LlavaParts) -> list[torch.Tensor]:
    model = parts.llava.language_model
    return [model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()]


def start_end(folders, kind: str = "llama", **settings: object) -> LlavaParts:
    return folders.assemble(kind, mm_use_im_start_end=True, **settings)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("v1", "<im_start><image><im_end>\nWhat  is it?"),
        # The template's own tags stand outside, as in the original.
        ("v1_mmtag", "<Image><im_start><image><im_end></Image>\nWhat  is it?"),
        ("plain", "<im_start><image><im_end>red\n"),
    ],
)
def test_tokens_stand_around_each_image(version: str, expected: str, folders) -> None:
    parts = start_end(folders, version=version)
    tokenized = tokenize_conversation(TURNS, parts.template, parts.tokenizer)
    start, end = parts.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    place = tokenized.input_ids.index(IMAGE_TOKEN_INDEX)
    assert tokenized.input_ids[place - 1 : place + 2] == [start, IMAGE_TOKEN_INDEX, end]
    before = parts.tokenizer.decode(tokenized.input_ids[1:place])
    after = parts.tokenizer.decode(tokenized.input_ids[place + 1 :])
    assert expected in f"{before}<image>{after}"


@pytest.mark.parametrize(("start_end", "patch", "number"), [(True, False, 2), (False, True, 1), (True, True, 3)])
@pytest.mark.parametrize("kind", fakes.LANGUAGE_MODELS)
def test_new_rows_are_the_mean_of_the_old_ones(kind: str, start_end: bool, patch: bool, number: int, folders) -> None:
    plain = folders.assemble(kind)
    old, first = tables(plain), len(plain.tokenizer)  # transformers' Qwen2 adds a token of its own
    parts = folders.assemble(kind, mm_use_im_start_end=start_end, mm_use_im_patch_token=patch)
    assert len(parts.tokenizer) == parts.llava.language_model.config.vocab_size == first + number
    assert parts.tokenizer.convert_tokens_to_ids("<im_patch>" if patch else "<im_start>") == first
    for before, after in zip(old, tables(parts), strict=True):
        assert torch.equal(after[:VOCABULARY], before)
        torch.testing.assert_close(after[VOCABULARY:], before.mean(0).expand(len(after) - VOCABULARY, -1))


def test_a_table_with_room_keeps_its_size(tmp_path: Path, folders) -> None:
    fakes.make_language_model(tmp_path, vocab_size=VOCABULARY + 20)
    parts = start_end(folders, model_name_or_path=str(tmp_path))
    for table in tables(parts):
        assert len(table) == VOCABULARY + 20
        torch.testing.assert_close(table[VOCABULARY : VOCABULARY + 2], table[:VOCABULARY].mean(0).expand(2, -1))
        assert not torch.allclose(table[VOCABULARY + 2], table[VOCABULARY], atol=1e-2)


def align(parts: LlavaParts, samples) -> None:
    """Learn one step of alignment from a sample with an image between its two tokens."""
    freeze(parts.llava, parts.tower, parts.config, parts.new_token_ids)
    sample = samples(parts.image_tokens.num_features)[0]
    around = [torch.tensor([[token]]) for token in parts.new_token_ids]
    ids = torch.cat([sample.input_ids[:, :1], around[0], sample.input_ids[:, 1:], around[1]], 1)
    labels = torch.cat([sample.labels[:, :1], sample.labels[:, :1], sample.labels[:, 1:], sample.labels[:, :1]], 1)
    optimizer = torch.optim.AdamW([p for p in parts.llava.parameters() if p.requires_grad], lr=0.1, weight_decay=0.0)
    losses = token_losses(parts.llava, ids, torch.arange(ids.shape[1])[None], labels, parts.tower(sample.pixels))
    losses.sum().backward()
    optimizer.step()


def test_alignment_learns_the_input_embeddings_of_the_new_tokens_only(folders, samples) -> None:
    parts = start_end(folders, tune_mm_mlp_adapter=True)
    inputs, outputs = (table.clone() for table in tables(parts))
    align(parts, samples)
    after_inputs, after_outputs = tables(parts)
    assert torch.equal(after_inputs[:VOCABULARY], inputs[:VOCABULARY])
    assert torch.equal(after_outputs, outputs)
    assert (after_inputs[VOCABULARY] - inputs[VOCABULARY]).abs().min() > 0.01


def test_alignment_leaves_embeddings_that_the_head_shares(folders, samples) -> None:
    parts = start_end(folders, "llama_tied", tune_mm_mlp_adapter=True)
    (inputs, _) = (table.clone() for table in tables(parts))
    align(parts, samples)
    assert torch.equal(tables(parts)[0], inputs)


def test_a_bundle_that_names_its_language_model_keeps_their_embeddings(folders, samples, tmp_path: Path) -> None:
    parts = start_end(folders, tune_mm_mlp_adapter=True)
    align(parts, samples)
    save_bundle(tmp_path / "aligned", parts, include="projector")
    loaded = load_pretrained_model(tmp_path / "aligned")
    for before, after in zip(tables(parts), tables(loaded), strict=True):
        assert torch.equal(after, before)
    tuned = start_end(folders, pretrain_mm_mlp_adapter=str(tmp_path / "aligned"))
    assert torch.equal(tables(tuned)[0], tables(parts)[0])
    assert torch.equal(tuned.llava.projector[0].weight, parts.llava.projector[0].weight)


def test_a_whole_bundle_goes_on_with_its_own_rows(folders, tmp_path: Path) -> None:
    parts = start_end(folders)
    with torch.no_grad():
        parts.llava.language_model.get_input_embeddings().weight += 0.1 * torch.randn(VOCABULARY + 2, fakes.WIDTH)
    save_bundle(tmp_path / "bundle", parts)
    loaded = load_pretrained_model(tmp_path / "bundle")
    assert loaded.new_token_ids == ()
    assert torch.equal(tables(loaded)[0], tables(parts)[0])
    assert loaded.template == parts.template
    config = loaded.config.replaced({"mm_use_im_start_end": False})
    with pytest.raises(ModelError, match=r"mm_use_im_start_end is False, .* trained with True; set it so"):
        folders.assemble(**config.model_dump())


@pytest.mark.parametrize("num_rows", [2, VOCABULARY + 2])
def test_the_originals_adapter_brings_its_rows(num_rows: int, folders, tmp_path: Path) -> None:
    projector = folders.assemble().llava.projector.state_dict()
    rows = torch.randn(num_rows, fakes.WIDTH)
    weights = {f"model.mm_projector.{name}": tensor for name, tensor in projector.items()}
    torch.save(weights | {"model.embed_tokens.weight": rows}, tmp_path / "mm_projector.bin")
    parts = start_end(folders, pretrain_mm_mlp_adapter=str(tmp_path / "mm_projector.bin"))
    assert torch.equal(tables(parts)[0][VOCABULARY:], rows[-2:])
    # Without the tokens nothing of it is wanted.
    plain = folders.assemble(pretrain_mm_mlp_adapter=str(tmp_path / "mm_projector.bin"))
    assert len(tables(plain)[0]) == VOCABULARY


def test_rows_of_another_model_are_refused(folders) -> None:
    model = folders.assemble().llava.language_model
    with pytest.raises(ModelError, match=r"has \(2, 5\) embeddings, but 2 new tokens of width 32"):
        extend_embeddings(model, [300, 301], torch.zeros(2, 5))
    with pytest.raises(ModelError, match=r"has \(1, 32\) embeddings, but 2 new tokens"):
        extend_embeddings(model, [300, 301], torch.zeros(1, 32))


def test_generation_with_the_tokens(folders) -> None:
    parts = start_end(folders)
    prompt = tokenize_prompt([Turn("human", "<image>\nWhat?")], parts.template, parts.tokenizer)
    pixels = torch.randn(1, 3, fakes.IMAGE_SIZE, fakes.IMAGE_SIZE)
    (answer,) = generate_batch(parts, [prompt], [pixels], max_new_tokens=4, stops=Stops(frozenset()))
    assert len(answer) == 4

"""Packing, supervised positions and gradients of the composed model."""

import fakes
import pytest
import torch
from losses import sample_losses, token_losses

from llava_ray.chat.conversation import IMAGE_TOKEN_INDEX
from llava_ray.errors import ModelError

pytestmark = pytest.mark.slow


def both_ways(parts, samples, pack) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per-sample losses from one packed row, from separate rows, and the packed counts."""
    with torch.no_grad():
        packed, counts = sample_losses(parts.llava, *pack(parts, samples).inputs)
        separate = [sample_losses(parts.llava, *pack(parts, [sample]).inputs)[0] for sample in samples]
    return packed, torch.cat(separate), counts


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", fakes.LANGUAGE_MODELS)
def test_packed_equals_separate(kind: str, attention: str, folders, samples, pack) -> None:
    parts = folders.assemble(kind, attn_implementation=attention)
    packed, separate, counts = both_ways(parts, samples(parts.image_tokens.num_features), pack)
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-5, equal_nan=True)
    assert counts.tolist() == [4, 2, 5, 0, 2]
    assert torch.isnan(packed[3])


@pytest.mark.parametrize("tower", fakes.TOWERS)
def test_packed_equals_separate_with_every_tower(tower: str, folders, samples, pack) -> None:
    parts = folders.assemble(tower=tower, mm_vision_select_feature="cls_patch")
    packed, separate, _ = both_ways(parts, samples(parts.image_tokens.num_features), pack)
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-5, equal_nan=True)


def test_any_packing_gives_the_same_losses(folders, samples, pack) -> None:
    parts = folders.assemble()
    chosen = samples(parts.image_tokens.num_features)
    order = [4, 2, 0, 3, 1]
    with torch.no_grad():
        one, _ = sample_losses(parts.llava, *pack(parts, chosen).inputs)
        other, _ = sample_losses(parts.llava, *pack(parts, [chosen[index] for index in order]).inputs)
    torch.testing.assert_close(other, one[order], rtol=0, atol=1e-5, equal_nan=True)


def test_losses_are_those_of_the_language_model_alone(folders, samples, pack) -> None:
    parts = folders.assemble()
    sample = samples(parts.image_tokens.num_features)[1]
    with torch.no_grad():
        losses = token_losses(parts.llava, *pack(parts, [sample]).inputs)
        expected = parts.llava.language_model(input_ids=sample.input_ids, labels=sample.labels).loss
    torch.testing.assert_close(losses.mean(), expected)


def test_head_runs_on_supervised_positions_only(folders, samples, pack) -> None:
    parts = folders.assemble()
    seen = []
    parts.llava.language_model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    losses = token_losses(parts.llava, *pack(parts, samples(parts.image_tokens.num_features)).inputs)
    assert seen == [(1, 13, fakes.WIDTH)]
    assert losses.shape == (13,)


def test_features_stand_at_the_image_positions_in_order(folders, samples, pack) -> None:
    parts = folders.assemble()
    row = pack(parts, samples(parts.image_tokens.num_features))
    embedded = parts.llava.embed(row.input_ids, row.features)
    is_image = row.input_ids == IMAGE_TOKEN_INDEX
    torch.testing.assert_close(embedded[is_image], parts.llava.projector(row.features).flatten(0, 1))
    words = parts.llava.language_model.get_input_embeddings()(row.input_ids[~is_image])
    torch.testing.assert_close(embedded[~is_image], words)


def test_more_features_than_positions_are_refused(folders, samples, pack) -> None:
    parts = folders.assemble()
    row = pack(parts, samples(parts.image_tokens.num_features))
    with pytest.raises(ModelError, match="48 image positions in input_ids, but 32 image features"):
        parts.llava.embed(row.input_ids, row.features[:2])
    with pytest.raises(ModelError, match="48 image positions in input_ids, but 0 image features"):
        token_losses(parts.llava, row.input_ids, row.position_ids, row.labels)


@pytest.mark.parametrize("chosen", [[1], [3], [1, 3]], ids=["text", "nothing to learn", "both"])
def test_everything_has_a_gradient_without_images(chosen: list[int], folders, samples, pack) -> None:
    parts = folders.assemble()
    row = pack(parts, [samples(parts.image_tokens.num_features)[index] for index in chosen])
    losses = token_losses(parts.llava, *row.inputs)
    assert losses.shape == (2 if 1 in chosen else 0,)
    losses.sum().backward()
    for name, parameter in parts.llava.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith("projector") or 1 not in chosen:
            assert not parameter.grad.any(), name


def test_no_features_as_an_empty_tensor(folders, samples, pack) -> None:
    parts = folders.assemble()
    row = pack(parts, [samples(parts.image_tokens.num_features)[1]])
    empty = torch.zeros(0, parts.image_tokens.num_features, fakes.TOWER_WIDTH)
    torch.testing.assert_close(
        token_losses(parts.llava, row.input_ids, row.position_ids, row.labels, empty),
        token_losses(parts.llava, *row.inputs),
    )


def test_gradient_of_a_packed_row_is_the_sum_of_the_separate_ones(folders, samples, pack) -> None:
    parts = folders.assemble()
    chosen = samples(parts.image_tokens.num_features)[:3]
    token_losses(parts.llava, *pack(parts, chosen).inputs).sum().backward()
    packed = {name: p.grad.clone() for name, p in parts.llava.named_parameters()}
    parts.llava.zero_grad()
    for sample in chosen:
        token_losses(parts.llava, *pack(parts, [sample]).inputs).sum().backward()
    for name, parameter in parts.llava.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_bfloat16_losses_are_fp32(folders, samples, pack) -> None:
    exact, parts = folders.assemble(), folders.assemble()
    parts.tower.bfloat16()
    parts.llava.bfloat16()
    row = pack(parts, samples(parts.image_tokens.num_features))
    losses = token_losses(parts.llava, *row.inputs)
    assert losses.dtype == torch.float32
    expected = token_losses(exact.llava, *pack(exact, samples(parts.image_tokens.num_features)).inputs)
    torch.testing.assert_close(losses, expected, rtol=0.1, atol=0.3)
    losses.sum().backward()
    assert all(p.grad is not None for p in parts.llava.parameters())


def test_gradient_checkpointing_changes_nothing(folders, samples, pack) -> None:
    parts = folders.assemble()
    row = pack(parts, samples(parts.image_tokens.num_features))
    expected = token_losses(parts.llava, *row.inputs)
    expected.sum().backward()
    gradients = {name: p.grad.clone() for name, p in parts.llava.named_parameters()}
    parts.llava.zero_grad()
    parts.llava.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    parts.llava.train()
    losses = token_losses(parts.llava, *row.inputs)
    losses.sum().backward()
    torch.testing.assert_close(losses, expected)
    for name, parameter in parts.llava.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=name)

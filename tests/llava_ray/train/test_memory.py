"""The memory's arithmetic against the papers' numbers, numbers worked by hand and what torch really keeps."""

import dataclasses

import pytest
import torch
import transformers

from llava_ray.model.network import head_loss
from llava_ray.train.planning.memory import (
    GIB,
    GPU_MEMORY_GIB,
    HEAD_CHUNK,
    Blocks,
    ModelSizes,
    RunSettings,
    activation_bytes,
    buffer_bytes,
    bytes_per_quantized,
    estimate_memory,
    gradient_bytes,
    layer_bytes,
    logits_bytes,
    optimizer_bytes,
    step_bytes,
    vision_bytes,
    weight_bytes,
)

VICUNA = Blocks(32, 4096, 11008, 32, 4096, gated=True)
CLIP = Blocks(23, 1024, 4096, 16, 1024, gated=False)
SIZES = ModelSizes(
    language_model=6_738_415_616,
    language_linears=6_476_005_376,
    largest_layer=202_383_360,
    embeddings=131_072_000,
    projector=20_979_712,
    vision_tower=290_000_000,
    trainable=6_759_395_328,
    adapter=0,
    blocks=VICUNA,
    vocab_size=32000,
    tower_blocks=CLIP,
    mm_hidden_size=1024,
    tokens_per_view=577,
    image_side=336,
)
RUN = RunSettings(zero_stage=3, num_workers=8, row_length=2048)


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_zero_papers_own_example(stage: int, gigabytes: float) -> None:
    """Figure 1 of https://arxiv.org/abs/1910.02054: 7.5 B parameters, 64 workers, AdamW in mixed precision."""
    model = dataclasses.replace(
        SIZES, language_model=7_500_000_000, trainable=7_500_000_000, projector=0, vision_tower=0
    )
    run = RunSettings(stage, 64, 1)
    states = weight_bytes(model, run) + gradient_bytes(model, run) + optimizer_bytes(model, run)
    assert states / 1e9 == pytest.approx(gigabytes, rel=0.02)


def test_qlora_spends_an_eighth_of_a_bit_on_scales() -> None:
    """https://arxiv.org/abs/2305.14314, section 3: 0.5 bits a parameter, 0.127 with double quantisation."""
    double = RunSettings(2, 1, 1, bits=4)
    assert 8 * bytes_per_quantized(double) - 4 == pytest.approx(0.127, abs=5e-4)
    assert 8 * bytes_per_quantized(dataclasses.replace(double, double_quant=False)) - 4 == 0.5
    quantized = weight_bytes(SIZES, double)
    by_hand = 2 * (6_738_415_616 - 6_476_005_376 + 20_979_712 + 290_000_000) + 0.51587 * 6_476_005_376
    assert quantized == pytest.approx(by_hand, rel=1e-4)


def test_vicuna_7b_by_hand() -> None:
    assert weight_bytes(SIZES, RUN) == 2 * 6_759_395_328 / 8 + 2 * 290_000_000
    assert gradient_bytes(SIZES, RUN) == 2 * 6_759_395_328 / 8
    assert optimizer_bytes(SIZES, RUN) == 12 * 6_759_395_328 / 8
    # norms 2 x 8 h, attention 8 h + 4 x 32, MLP 8 f
    assert layer_bytes(VICUNA, RUN) == 16 * 4096 + 8 * 4096 + 128 + 8 * 11008
    # 32 inputs, one layer, its gradients, the projector and the embeddings
    position = 32 * 2 * 4096 + 186_496 + 2 * (2 * 11008 + 4 * 4096) + 2 * (1024 + 5 * 4096)
    assert activation_bytes(SIZES, RUN) == 2048 * position
    assert logits_bytes(SIZES, RUN) == 2 * 2 * 2048 * 32000 + 12 * 512 * 32000
    assert buffer_bytes(SIZES, RUN) == 2 * (500e6 + 50e6 + 131_072_000 + 2 * 202_383_360)
    assert step_bytes(SIZES, RUN) == 4 * 6_759_395_328 / 8
    # 4 views of 577 tokens
    assert vision_bytes(SIZES, RUN) == 4 * 3 * 336**2 * 6 + 4 * 577 * 2 * (6 * 1024 + 2 * 4096)
    # The optimiser's fp32 gradients need more than the activations that they take the place of.
    memory = estimate_memory(SIZES, RUN)
    assert memory.activations == step_bytes(SIZES, RUN) - logits_bytes(SIZES, RUN)
    assert memory.total / GIB == pytest.approx(19.8, abs=0.2)


def test_each_setting_moves_what_it_should() -> None:
    def changed(**changes) -> ModelSizes:
        return estimate_memory(SIZES, dataclasses.replace(RUN, **changes))

    usual = estimate_memory(SIZES, RUN)
    assert changed(gradient_checkpointing=False).activations > 3 * usual.activations
    assert changed(row_length=512).logits < 0.6 * usual.logits
    offloaded = changed(offload_optimizer=True)
    assert (offloaded.optimizer, offloaded.gradients) == (0, 0)
    assert offloaded.host == pytest.approx(16 * 6_759_395_328 / 8)
    assert changed(inline_tower=False).vision == 0
    assert usual.weights - changed(inline_tower=False).weights == 2 * 290_000_000
    assert changed(num_workers=16).optimizer == usual.optimizer / 2
    assert changed(bf16=False).weights == 2 * usual.weights
    eager = dataclasses.replace(RUN, eager_attention=True)
    assert layer_bytes(VICUNA, eager) - layer_bytes(VICUNA, RUN) == 6 * 32 * 2048  # scores of all earlier positions
    assert [changed(zero_stage=stage).weights for stage in (0, 1, 2)] == [2 * (6_759_395_328 + 290_000_000)] * 3
    assert changed(zero_stage=2).buffers == 2 * changed(zero_stage=1).buffers == 2e9


def test_what_the_optimiser_gradients_masks_and_the_head_add() -> None:
    own = 6_759_395_328 / 8

    def changed(**changes) -> RunSettings:
        return dataclasses.replace(RUN, **changes)

    assert step_bytes(SIZES, changed(fused_optimizer=False)) - step_bytes(SIZES, RUN) == 4 * own
    assert 4 * own / GIB == pytest.approx(3.15, abs=0.01)
    assert gradient_bytes(SIZES, changed(fp32_gradients=True)) - gradient_bytes(SIZES, RUN) == 2 * own
    assert gradient_bytes(SIZES, changed(fp32_gradients=True, zero_stage=0)) == 6 * 6_759_395_328
    fp32 = changed(fp32_gradients=True, bf16=False)
    assert gradient_bytes(SIZES, fp32) == gradient_bytes(SIZES, changed(bf16=False))
    # A mask of a row of 4,096 and its bf16 bias are 0.05 GiB, of 32,768 3 GiB.
    for row, gib in ((4096, 0.05), (8192, 0.2), (32768, 3.0)):
        masked = activation_bytes(SIZES, changed(row_length=row, masked_attention=True))
        assert (masked - activation_bytes(SIZES, changed(row_length=row))) / GIB == pytest.approx(gib, abs=0.015)
    # Without the logits of the row: 256 tokens of them, the gradients of 2,048 hidden states and the head's own.
    plain, stage_2 = dataclasses.replace(SIZES, plain_head=True), changed(zero_stage=2)
    assert HEAD_CHUNK == head_loss.CHUNK
    assert logits_bytes(plain, stage_2) == 12 * 256 * 32000 + 2 * 2048 * 4096 + (4 + 2) * 32000 * 4096
    in_fp32 = changed(zero_stage=2, bf16=False)
    assert logits_bytes(plain, in_fp32) == 16 * 256 * 32000 + 4 * 2048 * 4096 + 4 * 32000 * 4096
    aligned = dataclasses.replace(plain, trainable=SIZES.projector)
    assert logits_bytes(aligned, stage_2) == 12 * 256 * 32000 + 2 * 2048 * 4096
    assert logits_bytes(plain, RUN) == logits_bytes(SIZES, RUN)
    longer = changed(zero_stage=2, row_length=32768)
    assert logits_bytes(plain, longer) < 0.4 * logits_bytes(SIZES, longer)


def test_a_tower_that_learns_is_partitioned_and_keeps_its_activations() -> None:
    learning = dataclasses.replace(SIZES, tower_learns=True, trainable=SIZES.trainable + SIZES.vision_tower)
    assert weight_bytes(learning, RUN) == 2 * (6_759_395_328 + 290_000_000) / 8
    assert vision_bytes(learning, RUN) > 2 * vision_bytes(SIZES, RUN)


def test_views_and_scales_make_the_tower_see_more() -> None:
    pixels = 3 * 336**2 * (4 + 2)
    assert vision_bytes(SIZES, dataclasses.replace(RUN, anyres=True)) > 1.5 * vision_bytes(SIZES, RUN)
    s2 = dataclasses.replace(SIZES, image_side=3 * 336, passes_per_view=1 + 4 + 9)
    block = 577 * 2 * (6 * 1024 + 2 * 4096)
    assert vision_bytes(SIZES, RUN) == 4 * (pixels + block)
    assert vision_bytes(s2, RUN) == 4 * (9 * pixels + 14 * block)
    longer = dataclasses.replace(RUN, row_length=16 * 577)
    assert vision_bytes(s2, longer) == 16 * 9 * pixels + 64 * block  # the frozen tower takes so many squares at a time


def kept_bytes(num_layers: int, *, checkpointing: bool) -> int:
    """Bytes of activations that torch keeps for the backward pass of a Llama in bf16, each storage once."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = transformers.LlamaModel(config).to(torch.bfloat16).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    embeddings = torch.randn(1, 128, 256, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    del output
    return sum(storages.values())


def test_what_a_layer_keeps_is_what_torch_keeps() -> None:
    blocks = Blocks(1, 256, 704, 4, 256, gated=True)
    measured = (kept_bytes(5, checkpointing=False) - kept_bytes(2, checkpointing=False)) / 3
    estimated = 128 * layer_bytes(blocks, RUN)
    assert estimated == pytest.approx(measured, rel=0.02)


def test_the_smallest_known_gpus_are_smaller_than_their_names() -> None:
    assert GPU_MEMORY_GIB["A100-80G"] < 80
    assert GPU_MEMORY_GIB["A100"] == GPU_MEMORY_GIB["A100-40G"]

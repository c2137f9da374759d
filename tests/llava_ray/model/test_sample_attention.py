"""Attention by sample: equal to separate samples, refused where it would be wrong, gone outside training."""

import json
from itertools import pairwise

import fakes
import pytest
import torch
import transformers
from losses import cross_entropy_of
from torch.nn.attention import varlen

from llava_ray.config.lora import LoraConfig
from llava_ray.config.model import ModelConfig
from llava_ray.errors import ConfigError, ModelError
from llava_ray.generate.decoding import generate_batch
from llava_ray.model.lora.adapters import add_adapter
from llava_ray.model.network import sample_attention
from llava_ray.model.network.attention_switch import SampleAttention
from llava_ray.model.network.sample_attention import SampleBorders, attend_samples, fits_kernel
from llava_ray.model.saving import save_bundle
from llava_ray.objectives.cross_entropy import CrossEntropy
from llava_ray.objectives.objective import PackedRow

LENGTHS = (11, 7, 30, 1, 9)
CPU = torch.device("cpu")


def text_samples(lengths=LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 299, (length,), generator=generator) for length in lengths]


def losses_and_gradients(llava, samples) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of a row of text samples; every token but the first of each is supervised."""
    ids = torch.cat(samples)[None]
    positions = torch.cat([torch.arange(len(sample)) for sample in samples])[None]
    llava.zero_grad()
    output = CrossEntropy().compute(llava, PackedRow.on_device(ids, positions, ids.clone(), CPU))
    output.loss_sum.backward()
    return output.losses.detach(), {
        name: parameter.grad.clone() for name, parameter in llava.named_parameters() if parameter.grad is not None
    }


def assert_equal(found, expected, relative: float = 1e-6) -> None:
    """Compare losses and gradients relative to their norm; a gradient of zero has to be one."""
    assert (found[0] - expected[0]).norm() <= relative * expected[0].norm()
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= relative * gradient.norm(), name


def separately(llava, samples) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    runs = [losses_and_gradients(llava, [sample]) for sample in samples]
    names = runs[0][1]
    return torch.cat([losses for losses, _ in runs]), {name: sum(run[1][name] for run in runs) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("kind", fakes.LANGUAGE_MODELS)
def test_rows_have_the_losses_and_gradients_of_separate_samples(kind: str, folders) -> None:
    llava = folders.assemble(kind).llava
    expected = separately(llava, text_samples())
    llava.attend_by_sample()
    assert_equal(losses_and_gradients(llava, text_samples()), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_checkpointing_and_adapters_change_nothing(kind: str, folders) -> None:
    llava = folders.assemble(kind).llava
    add_adapter(llava.language_model, LoraConfig(lora_enable=True, lora_r=4, lora_dropout=0.0), seed=1)
    torch.manual_seed(2)
    for name, parameter in llava.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    expected = separately(llava, text_samples())
    llava.attend_by_sample()
    llava.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    llava.train()
    assert_equal(losses_and_gradients(llava, text_samples()), expected)


@pytest.mark.slow
def test_a_nan_stays_in_its_sample(folders) -> None:
    llava = folders.assemble().llava
    llava.attend_by_sample()
    expected, _ = losses_and_gradients(llava, text_samples())
    with torch.no_grad():
        llava.language_model.get_input_embeddings().weight[299] = torch.nan
    samples = text_samples()
    samples[1][3] = 299
    found, _ = losses_and_gradients(llava, samples)
    first = LENGTHS[0] - 1
    second = first + LENGTHS[1] - 1
    # The head of this model is its own, so only the sample that holds the token is not finite.
    assert torch.equal(found[:first], expected[:first])
    assert torch.equal(found[second:], expected[second:])
    assert found[first:second].isnan().any()


@pytest.mark.slow
def test_outside_training_rows_the_former_attention_is_back(folders, tmp_path) -> None:
    parts = folders.assemble()
    prompts = [[1, 20, 21, 22], [1, 23]]
    expected = generate_batch(parts, prompts, [None, None], max_new_tokens=5)
    parts.llava.attend_by_sample()
    with parts.llava.own_attention():
        assert generate_batch(parts, prompts, [None, None], max_new_tokens=5) == expected
    assert parts.llava.language_model.config._attn_implementation == sample_attention.SAMPLE_ATTENTION
    save_bundle(tmp_path / "bundle", parts)
    written = "".join(file.read_text() for file in (tmp_path / "bundle").rglob("*.json"))
    assert sample_attention.SAMPLE_ATTENTION not in written
    assert "_attn_implementation" not in json.loads((tmp_path / "bundle/language_model/config.json").read_text())


@pytest.mark.slow
def test_padding_masks_and_missing_borders_are_refused(folders) -> None:
    parts = folders.assemble()
    parts.llava.attend_by_sample()
    with pytest.raises(ModelError, match="a padding mask was given to a language model that attends by sample"):
        generate_batch(parts, [[1, 20, 21, 22], [1, 23]], [None, None], max_new_tokens=2)
    ids, mask = torch.tensor([[1, 20, 21], [0, 1, 20]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    with pytest.raises(ModelError, match="a padding mask was given"):
        parts.llava.language_model.generate(ids, attention_mask=mask, max_new_tokens=2)
    ids = ids[:1]
    with pytest.raises(ModelError, match="without the borders of its samples"):
        parts.llava.language_model.generate(ids, max_new_tokens=2)
    with pytest.raises(ModelError, match="1 x 3 tokens without the borders of its samples"):
        parts.llava.language_model(input_ids=ids)
    with pytest.raises(ModelError, match="without the borders"):
        cross_entropy_of(parts.llava, ids, torch.arange(3)[None], ids)


@pytest.mark.parametrize(
    ("lengths", "rows", "message"),
    [
        ((3, 4), 1, r"1 row\(s\) of 8 tokens with 8 keys, but borders of 2 samples of 7 tokens"),
        ((5, 4), 1, "2 samples of 9 tokens"),
        ((), 1, "0 samples of 0 tokens"),
        ((4, 4), 2, r"2 row\(s\) of 8 tokens"),
    ],
)
def test_borders_of_another_row_are_refused(lengths, rows, message) -> None:
    query = torch.randn(rows, 2, 8, 4)
    with pytest.raises(ModelError, match=message):
        attend_samples(None, query, query, query, None, borders=SampleBorders.of(lengths, CPU))


def test_masks_and_other_kinds_of_attention_are_refused() -> None:
    query, borders = torch.randn(1, 2, 8, 4), SampleBorders.of((3, 5), CPU)
    with pytest.raises(ModelError, match=r"got a mask of shape \(1, 1, 8, 8\)"):
        attend_samples(None, query, query, query, torch.ones(1, 1, 8, 8), borders=borders)
    with pytest.raises(ModelError, match="does not know s_aux of NoneType"):
        attend_samples(None, query, query, query, None, borders=borders, s_aux=torch.ones(2))
    both_ways = torch.nn.Identity()
    both_ways.is_causal = False
    with pytest.raises(ModelError, match="does not know attention to later tokens of Identity"):
        attend_samples(both_ways, query, query, query, None, borders=borders)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "settings", [{}, {"sliding_window": 3}, {"softcap": 2.0}, {"sliding_window": 3, "softcap": 2.0}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_sample_is_attended_to_as_the_formula_says(key_heads, settings, dtype) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 12, 8).to(dtype) for heads in (4, key_heads, key_heads))
    found, _ = attend_samples(None, query, key, value, None, borders=SampleBorders.of((5, 1, 6), CPU), **settings)
    sample = torch.tensor([0] * 5 + [1] + [2] * 6)
    place = torch.arange(12)
    ahead = place - place[:, None]
    seen = (sample == sample[:, None]) & (ahead <= 0) & (ahead > -settings.get("sliding_window", 99))
    key, value = (tensor.float().repeat_interleave(4 // key_heads, 1) for tensor in (key, value))
    scores = query.float() @ key.transpose(2, 3) * 8**-0.5
    if "softcap" in settings:
        scores = torch.tanh(scores / 2.0) * 2.0
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value
    bound = 2e-6 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.float(), expected.transpose(1, 2), rtol=0, atol=bound)


@pytest.mark.parametrize("window", [None, 3, 99])
def test_the_kernel_of_gpus_is_asked_for_the_same(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(query, key, value, ends, key_ends, longest, longest_key, *, scale, window_size, enable_gqa):
        """What its documentation says, sample by sample; queries (t, h, d)."""
        assert ends is key_ends
        assert ends.dtype == torch.int32
        assert longest == longest_key == int(ends.diff().max())
        assert enable_gqa == (query.shape[1] != key.shape[1])
        left, right = window_size
        outputs = []
        for start, end in pairwise(ends.tolist()):
            some = [part[start:end].transpose(0, 1) for part in (query, key, value)]
            some[1:] = [part.repeat_interleave(len(some[0]) // len(part), 0) for part in some[1:]]
            ahead = torch.arange(end - start) - torch.arange(end - start)[:, None]
            hidden = (ahead > right) | ((ahead < -left) if left >= 0 else False)
            scores = (some[0] @ some[1].transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
            outputs.append((scores.softmax(-1) @ some[2]).transpose(0, 1))
        return torch.cat(outputs)

    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    borders = SampleBorders.of((5, 1, 6), CPU)
    expected, _ = attend_samples(None, query, key, value, None, borders=borders, sliding_window=window)
    monkeypatch.setattr(sample_attention, "fits_kernel", lambda *given: True)
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    found, _ = attend_samples(None, query, key, value, None, borders=borders, sliding_window=window)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_the_kernel_of_gpus_is_not_asked_for_on_the_cpu() -> None:
    query = torch.randn(1, 2, 8, 64).bfloat16()
    assert not fits_kernel(query, query, 0.0, None)


def tiny(kind: str, **settings):
    """A model of a type that the tests of packing do not cover."""
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(kind, **sizes | heads | {"initializer_range": 0.2} | settings)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["granite", "olmo2", "starcoder2"])
def test_other_types_are_tried_before_training(kind: str) -> None:
    model = tiny(kind)
    SampleAttention(model)
    assert model.config._attn_implementation == sample_attention.SAMPLE_ATTENTION


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}, "does not know s_aux"),
        ("llama", {}, "2 of its layers attend within a window, and 0 of them say so"),
    ],
)
def test_a_type_that_cannot_be_done_is_named_with_the_remedy(kind, settings, reason) -> None:
    model = tiny(kind, **settings)
    if kind == "llama":  # which passes no window on: stands for a type that limits attention by its mask alone
        model.config.model_type, model.config.layer_types = "windowed", ["sliding_attention"] * 2
    before = model.config._attn_implementation
    with pytest.raises(
        ModelError, match=rf"cannot be computed .*{reason}.*attn_implementation = .masked_sdpa"
    ) as raised:
        SampleAttention(model)
    assert f"type {model.config.model_type!r}" in str(raised.value)
    assert model.config._attn_implementation == before


def test_former_names_are_refused_with_what_to_set() -> None:
    for name in ("flash_attention_2", "flex_attention"):
        with pytest.raises(
            ConfigError, match=r'attn_implementation.*no longer supported; set attn_implementation = "sdpa"'
        ):
            ModelConfig.parsed({"model_name_or_path": "a", "attn_implementation": name})


def test_a_row_on_its_way_to_the_device_has_all_that_needs_counting() -> None:
    ids = torch.tensor([[1, -200, -200, 7, 8, 1, 9, 1]])
    labels = torch.tensor([[-100, -100, -100, 7, 8, 1, 9, 1]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0]])
    row = PackedRow.on_device(ids, positions, labels, CPU)
    assert row.borders is not None and row.borders.lengths == (5, 2, 1)
    assert row.borders.ends.tolist() == [0, 5, 7, 8]
    assert row.image_positions is not None and row.image_positions.tolist() == [1, 2]
    for found, expected in zip(row.find_supervised(), PackedRow(ids, positions, labels).find_supervised(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.slow
def test_filler_of_a_row_changes_nothing(folders) -> None:
    llava = folders.assemble().llava
    llava.attend_by_sample()
    ids = torch.cat(text_samples())[None]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    found = []
    for multiple in (1, 64):
        row = PackedRow.on_device(ids, positions, ids.clone(), CPU, multiple=multiple)
        llava.zero_grad()
        output = CrossEntropy().compute(llava, row)
        output.loss_sum.backward()
        found.append((output.losses.detach(), {name: p.grad.clone() for name, p in llava.named_parameters()}))
    assert row.input_ids.shape == (1, 64)
    assert row.borders is not None
    assert row.borders.lengths == (*LENGTHS, 64 - sum(LENGTHS))
    assert_equal(found[1], found[0])


@pytest.mark.slow
def test_steps_have_the_losses_of_the_whole_row_under_a_mask(folders) -> None:
    """A run that was started with the mask goes on without it."""
    steps = [
        text_samples(lengths) for lengths in ((5, 9, 3), (12, 4), (7, 7, 7), (20,), (3, 30), (6, 2, 9), (8, 8), (15,))
    ]
    curves = []
    for by_sample in (False, True):
        llava = folders.assemble("mistral").llava
        if by_sample:
            llava.attend_by_sample()
        optimizer = torch.optim.AdamW(llava.parameters(), lr=1e-3)
        curve = []
        for samples in steps:
            curve.append(float(losses_and_gradients(llava, samples)[0].mean()))
            optimizer.step()
        curves.append(curve)
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
    assert curves[0][0] != curves[0][-1]

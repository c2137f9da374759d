"""The head and its cross-entropy together: losses and gradients of the plain formula, without all logits."""

import fakes
import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from llava_ray.model.network import head_loss
from llava_ray.model.network.head_loss import CHUNK, compute_head_losses, find_plain_head
from llava_ray.objectives.cross_entropy import CrossEntropy
from llava_ray.objectives.objective import PackedRow

WIDTH, VOCABULARY = 16, 37


def make_head(dtype: torch.dtype, *, bias: bool = False) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(WIDTH, VOCABULARY, bias=bias).to(dtype)


def make_states(num_tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(1, num_tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
    return states, torch.randint(VOCABULARY, (num_tokens,), generator=generator)


def plain_losses(head, states, targets, softcap) -> torch.Tensor:
    logits = head(states)[0].float()
    return cross_entropy(
        logits if softcap is None else torch.tanh(logits / softcap) * softcap, targets, reduction="none"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("even", [True, False], ids=["sum", "weighted"])
@pytest.mark.parametrize("num_tokens", [1, CHUNK, 2 * CHUNK + 3])
def test_losses_and_gradients_are_those_of_the_plain_formula(num_tokens, even, softcap, dtype) -> None:
    head, (states, targets) = make_head(dtype, bias=softcap is None), make_states(num_tokens, dtype)
    weights = torch.ones(()) / 7 if even else torch.linspace(0.5, 2, num_tokens)
    found = compute_head_losses(head, states, targets, softcap)
    assert found.dtype == torch.float32
    ((found.sum() * weights) if even else (found * weights).sum()).backward()
    gradients = {name: p.grad for name, p in [("states", states), *head.named_parameters()]}
    exact = make_head(dtype, bias=softcap is None).float()
    same = states.detach().float().requires_grad_()
    expected = plain_losses(exact, same, targets, softcap)
    ((expected.sum() * weights) if even else (expected * weights).sum()).backward()
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    assert (found - expected).norm() <= bound * expected.norm()
    for name, parameter in [("states", same), *exact.named_parameters()]:
        assert gradients[name] is not None
        assert (gradients[name].float() - parameter.grad).norm() <= bound * parameter.grad.norm(), name


def test_nothing_to_predict_has_a_gradient_of_zero() -> None:
    head, (states, targets) = make_head(torch.float32), make_states(0, torch.float32)
    losses = compute_head_losses(head, states, targets)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


def test_a_frozen_head_and_no_gradients_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    head, (states, targets) = make_head(torch.float32).requires_grad_(False), make_states(5, torch.float32)
    losses = compute_head_losses(head, states, targets)
    losses.sum().backward()
    assert head.weight.grad is None
    assert states.grad is not None
    monkeypatch.setattr(torch, "mm", None)  # no gradient is computed
    with torch.inference_mode():
        assert torch.equal(compute_head_losses(head, states.detach(), targets), losses)


def test_never_more_logits_than_a_chunk_and_the_heads_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    head, (states, targets) = make_head(torch.float32), make_states(3 * CHUNK, torch.float32)
    sizes, seen, linear = [], [], head_loss.linear
    monkeypatch.setattr(head_loss, "linear", lambda *given: sizes.append(len(given[0])) or linear(*given))
    head.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    compute_head_losses(head, states, targets)
    assert sizes == [CHUNK] * 3
    assert seen == [(1, 3 * CHUNK, WIDTH)]
    assert "forward" not in vars(head)


@pytest.mark.slow
@pytest.mark.parametrize("kind", fakes.LANGUAGE_MODELS)
def test_a_model_has_the_same_losses_with_and_without_its_logits(kind: str, folders) -> None:
    changes = {"mm_use_im_start_end": True} if kind == "qwen2" else {}  # a vocabulary with new rows
    llava = folders.assemble(kind, **changes).llava
    head = find_plain_head(llava.language_model)
    assert head is not None
    ids = torch.arange(5, 45)[None]
    row = PackedRow.on_device(ids, torch.arange(40)[None], ids, torch.device("cpu"))
    output = CrossEntropy().compute(llava, row)
    output.loss_sum.backward()
    gradients = {name: p.grad.clone() for name, p in llava.named_parameters() if p.grad is not None}
    llava.zero_grad()
    logits = llava(row.input_ids, row.position_ids, row.find_supervised()[0])
    expected = cross_entropy(logits, row.find_supervised()[1], reduction="none")
    expected.sum().backward()
    assert (output.losses - expected).norm() <= 1e-6 * expected.norm()
    for name, parameter in llava.named_parameters():
        assert (gradients[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name


@pytest.mark.slow
def test_other_heads_compute_their_own_logits(folders) -> None:
    model = folders.assemble().llava.language_model
    assert find_plain_head(model) is model.lm_head
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert find_plain_head(model) is None
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.GraniteConfig(vocab_size=300, num_key_value_heads=2, **sizes)
    assert find_plain_head(transformers.GraniteForCausalLM(config)) is None  # it divides its logits

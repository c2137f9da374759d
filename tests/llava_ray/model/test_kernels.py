"""Liger's kernels: when they are used, for which parts of a model, and on a GPU the same losses and gradients."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from fakes import make_language_model
from transformers import AutoConfig, AutoModelForCausalLM

from llava_ray.errors import ConfigError
from llava_ray.model.network import kernels
from llava_ray.model.network.kernels import choose_kernels, use_kernels
from llava_ray.model.network.packing import PROVEN

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def make_config(kind: str, **changes: Any) -> Any:
    return AutoConfig.for_model(kind, **changes)


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, bool]]:
    """What transformers was asked to replace, with Liger installed."""
    asked: list[dict[str, bool]] = []
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())
    stand_in = ModuleType("transformers.integrations.liger")
    stand_in.apply_liger_kernel = lambda model, chosen: asked.append(chosen)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers.integrations.liger", stand_in)
    return asked


def make_model(kind: str) -> Any:
    """Return a language model of which only the config matters."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(make_config(kind, num_hidden_layers=1))


@pytest.mark.parametrize("kind", sorted(PROVEN))
def test_a_proven_model_on_a_gpu_uses_its_kernels(kind: str, applied: list[dict[str, bool]]) -> None:
    gated = "geglu" if kind.startswith("gemma") else "swiglu"
    assert use_kernels(make_model(kind), "auto", GPU) == ("rms_norm", "rope", gated)
    [chosen] = applied
    assert chosen[gated]
    assert not chosen["cross_entropy"]
    assert not chosen["fused_linear_cross_entropy"]


def test_a_cpu_a_missing_package_and_an_unknown_type_use_none(
    applied: list[dict[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(kind: str, device: torch.device) -> str:
        assert use_kernels(make_model(kind), "auto", device) == use_kernels(make_model(kind), False, device) == ()
        with pytest.raises(
            ConfigError, match=r'^train.use_liger_kernel = true, but .*, or set "auto" or false$'
        ) as error:
            use_kernels(make_model(kind), True, device)
        return str(error.value)

    assert "set cluster.use_gpu = true" in refused("llama", CPU)
    assert "'opt' are not tested" in refused("opt", GPU)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'llava_ray[gpu]'" in refused("llama", GPU)
    assert not applied


def test_what_a_kernel_would_compute_otherwise_stays() -> None:
    assert not choose_kernels(make_config("llama", hidden_act="gelu"))["swiglu"]
    assert choose_kernels(make_config("mistral", hidden_act="silu"))["swiglu"]
    assert not choose_kernels(make_config("gemma2", hidden_activation="gelu"))["geglu"]
    assert choose_kernels(make_config("gemma2"))["geglu"]
    halved = make_config("phi3", partial_rotary_factor=0.5)
    assert not choose_kernels(halved)["rope"]
    assert choose_kernels(make_config("phi3"))["rope"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here")
@pytest.mark.parametrize("kind", sorted(PROVEN))
def test_losses_and_gradients_are_those_without_the_kernels(kind: str, tmp_path: Any) -> None:
    pytest.importorskip("liger_kernel", reason="needs liger-kernel (extra gpu)")
    folder = str(make_language_model(tmp_path / kind, kind))
    ids = torch.randint(5, 60, (1, 96), device=GPU)
    positions = torch.cat([torch.arange(40), torch.arange(56)])[None].to(GPU)
    # Modules are replaced for the whole process: the plain model is built and run first.
    found = []
    for wanted in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(GPU).train()
        assert bool(use_kernels(model, wanted, GPU)) == wanted
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        loss.backward()
        found.append((loss.item(), [p.grad for p in model.parameters() if p.grad is not None]))
    (loss, gradients), (same_loss, same_gradients) = found
    assert same_loss == pytest.approx(loss, rel=1e-5)
    for one, other in zip(gradients, same_gradients, strict=True):
        assert (one - other).norm() <= 1e-4 * one.norm() + 1e-7

"""What a checkpoint holds of the model: what learns, and nothing of what stays."""

from pathlib import Path
from typing import Any

import fakes
import pytest
from torch import nn

from llava_ray.config.lora import LoraConfig
from llava_ray.config.model import ModelConfig
from llava_ray.model.adaptation import adapt
from llava_ray.model.assembly import LlavaParts, assemble
from llava_ray.model.freezing import freeze
from llava_ray.train.checkpoints import load_trainable, slim_states


def make_parts(folder: Path, kind: str, lora: LoraConfig, **switches: Any) -> LlavaParts:
    base, tower = fakes.make_language_model(folder / kind, kind), fakes.make_vision_tower(folder / "tower")
    config = ModelConfig(model_name_or_path=str(base), vision_tower=str(tower), **switches)
    parts = assemble(config, "pad", quantization=lora.quantization)
    adapt(parts, lora, seed=0)
    freeze(parts.llava, parts.tower, config)
    return parts


def saved_names(module: nn.Module) -> set[str]:
    """Return the names that DeepSpeed saves with ``exclude_frozen_parameters``."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return set(module.state_dict()) - frozen


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_nothing_of_an_adapters_base(kind: str, bits: int, tmp_path: Path) -> None:
    if bits < 16:
        pytest.importorskip("bitsandbytes")
    parts = make_parts(tmp_path, kind, LoraConfig.parsed({"lora_enable": True, "lora_r": 4, "bits": bits}))
    learning = {name for name, parameter in parts.llava.named_parameters() if parameter.requires_grad}
    assert (saved_names(parts.llava) == learning) == (kind == "llama" and bits == 16)
    slim_states(parts.llava)
    assert saved_names(parts.llava) == learning
    load_trainable({name: parts.llava.state_dict()[name] for name in learning}, parts.llava)


def test_a_head_that_learns_with_the_embeddings_stays(tmp_path: Path) -> None:
    parts = make_parts(tmp_path, "llama_tied", LoraConfig())
    before = saved_names(parts.llava)
    slim_states(parts.llava)
    assert saved_names(parts.llava) == before
    assert "language_model.lm_head.weight" in before

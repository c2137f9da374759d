"""The lora section: LLaVA's names and defaults, bare flags, and combinations that would do nothing or fail late."""

from pathlib import Path
from typing import Any

import pytest

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.lora import LoraConfig, Quantization
from llava_ray.config.recipes import load_recipe
from llava_ray.errors import ConfigError

BASE = {"model": {"model_name_or_path": "lm"}, "data": {"data_path": "x"}}
QLORA = {"lora.lora_enable": True, "lora.bits": 4}


def test_names_and_defaults_are_llavas() -> None:
    expected = {
        "lora_enable": False,
        "lora_r": 64,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "lora_bias": "none",
        "bits": 16,
        "double_quant": True,
        "quant_type": "nf4",
    }
    found = LoraConfig().model_dump()
    assert {key: found[key] for key in expected} == expected


def test_llavas_flags_are_taken_bare() -> None:
    flags = ["--model_name_or_path", "lm", "--data_path", "x", "--lora_enable", "True", "--lora_r", "128"]
    flags += ["--lora_alpha", "256", "--bits", "4", "--mm_projector_lr", "2e-5", "--use_dora", "True"]
    config = load_recipe(FinetuneConfig, [*flags, "--lora_target_modules", "q_proj", "v_proj"])
    assert (config.lora.lora_r, config.lora.lora_alpha, config.lora.use_dora) == (128, 256, True)
    assert config.lora.quantization == Quantization(bits=4)
    assert config.lora.lora_target_modules == ("q_proj", "v_proj")


def test_targets_stand_in_a_recipe_as_a_list(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('[lora]\nlora_enable = true\nlora_target_modules = ["q_proj", "projector.0"]\n')
    config = load_recipe(FinetuneConfig, [str(path), "--model_name_or_path", "lm", "--data_path", "x"])
    assert config.lora.lora_target_modules == ("q_proj", "projector.0")


def test_quantisation_follows_the_bits() -> None:
    lora = LoraConfig(lora_enable=True, quant_type="fp4", double_quant=False)
    assert lora.quantization is None
    assert lora.replaced({"bits": 8}).quantization == Quantization(bits=8)
    assert lora.replaced({"bits": 4}).quantization == Quantization(bits=4, quant_type="fp4", double_quant=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.lora_enable": True, "model.tune_mm_mlp_adapter": True}, "lora_enable with model.tune_mm_mlp_adapter"),
        ({"lora.lora_enable": True, "model.freeze_backbone": True}, "lora_enable with model.freeze_backbone"),
        ({"lora.bits": 4}, r"lora.bits = 4: quantised weights cannot learn; set lora.lora_enable = true"),
        (QLORA | {"train.zero_stage": 3}, r"ZeRO 3 cannot partition quantised weights; set train.zero_stage = 2"),
        ({"lora.bits": 5}, r"'lora.bits' = 5"),
        ({"lora.use_dora": True}, "use_dora has no effect without lora_enable"),
        ({"lora.lora_target_modules": ("q_proj",)}, "lora_target_modules has no effect without lora_enable"),
        ({"lora.lora_enable": True, "lora.lora_target_modules": ()}, "an empty list leaves nothing to train"),
        ({"lora.lora_dropout": 1.0}, r"'lora.lora_dropout' = 1.0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FinetuneConfig.parsed(BASE).replaced(changes)


def test_alignment_over_a_quantised_model_is_allowed() -> None:
    config = FinetuneConfig.parsed(BASE).replaced({"lora.bits": 4, "model.tune_mm_mlp_adapter": True})
    assert config.lora.quantization == Quantization(bits=4)


def test_llavas_unused_flag_says_what_to_use() -> None:
    with pytest.raises(ConfigError, match=r"start from the adapter.s bundle: --model\.model_name_or_path"):
        load_recipe(FinetuneConfig, ["--model_name_or_path", "m", "--data_path", "x", "--lora_weight_path", "y"])

import pytest

from llava_ray.config.lora import LoraConfig
from llava_ray.model.adaptation import adapt
from llava_ray.model.freezing import freeze

EVERYTHING = {"projector", "language_model.model.embed_tokens", "language_model.model.layers", "language_model.lm_head"}


def learning(parts) -> set[str]:
    """Which of the parts that can be told apart hold a parameter that learns."""
    names = {name for name, p in parts.llava.named_parameters() if p.requires_grad}
    return {part for part in EVERYTHING if any(name.startswith(part) for name in names)}


@pytest.mark.parametrize(
    ("switches", "frozen"),
    [
        ({}, set()),
        ({"tune_mm_mlp_adapter": True}, EVERYTHING - {"projector"}),
        # The original left the head training here.
        ({"freeze_backbone": True}, EVERYTHING - {"projector"}),
        ({"freeze_mm_mlp_adapter": True}, {"projector"}),
        ({"freeze_embeddings": True}, {"language_model.model.embed_tokens"}),
        (
            {"freeze_embeddings": True, "freeze_mm_mlp_adapter": True},
            {"language_model.model.embed_tokens", "projector"},
        ),
        ({"freeze_embeddings": True, "tune_mm_mlp_adapter": True}, EVERYTHING - {"projector"}),
    ],
)
def test_switches(switches: dict[str, bool], frozen: set[str], folders) -> None:
    parts = folders.assemble(**switches)
    freeze(parts.llava, parts.tower, parts.config)
    assert learning(parts) == EVERYTHING - frozen


def test_frozen_embeddings_take_a_tied_head_with_them(folders) -> None:
    parts = folders.assemble("llama_tied", freeze_embeddings=True)
    freeze(parts.llava, parts.tower, parts.config)
    assert not parts.llava.language_model.lm_head.weight.requires_grad
    assert "language_model.model.layers" in learning(parts)


def test_report_counts_what_learns(folders) -> None:
    parts = folders.assemble(tune_mm_mlp_adapter=True)
    parts.llava.requires_grad_(True)
    report = {row.part: row for row in freeze(parts.llava, parts.tower, parts.config)}
    num_projector = 48 * 32 + 32 + 32 * 32 + 32
    assert (report["projector"].num_trainable, report["projector"].num_total) == (num_projector, num_projector)
    assert report["language_model"].num_trainable == 0 < report["language_model"].num_total
    assert report["vision_tower"].num_trainable == 0 < report["vision_tower"].num_total


def test_switching_back_thaws(folders) -> None:
    parts = folders.assemble()
    freeze(parts.llava, parts.tower, parts.config.replaced({"tune_mm_mlp_adapter": True}))
    freeze(parts.llava, parts.tower, parts.config)
    assert learning(parts) == EVERYTHING


@pytest.mark.parametrize("switches", [{}, {"freeze_mm_mlp_adapter": True}, {"freeze_embeddings": True}])
def test_under_an_adapter_nothing_of_the_language_model_learns(switches: dict[str, bool], folders) -> None:
    parts = folders.assemble(**switches)
    adapt(parts, LoraConfig(lora_enable=True, lora_r=4), seed=0)
    for _ in range(2):
        report = {row.part: row for row in freeze(parts.llava, parts.tower, parts.config)}
        assert report["language_model"].num_trainable == 0 < report["language_model"].num_total
        assert report["adapter"].num_trainable == report["adapter"].num_total == 4_096
        assert (report["projector"].num_trainable > 0) == ("freeze_mm_mlp_adapter" not in switches)
        assert report["vision_tower"].num_trainable == 0


def test_the_report_says_it_in_words(folders) -> None:
    parts = folders.assemble(tune_mm_mlp_adapter=True)
    words = "; ".join(map(str, freeze(parts.llava, parts.tower, parts.config)))
    assert words.startswith("projector 2,624 of 2,624; language_model 0 of ")

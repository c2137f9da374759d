"""Useful operations against torch's own counter, on tiny models whose attention it can see."""

from collections.abc import Callable

import peft
import pytest
import torch
import transformers
from fakes import IMAGE_SIZE, LANGUAGE_MODELS, TOWERS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llava_ray.chat.conversation import IMAGE_TOKEN_INDEX
from llava_ray.model.network.llava import Llava
from llava_ray.model.network.tower import VisionTower
from llava_ray.train.flops import StepWork, UsefulFlops, count_pairs

WIDTH, TOWER_WIDTH, VOCAB = 64, 96, 320
SAMPLES = (70, 33, 57)
NUM_SUPERVISED = 40
bmm = torch.ops.aten.bmm


def make_language_model(kind: str) -> transformers.PreTrainedModel:
    config_class, model_class, extra = LANGUAGE_MODELS[kind]
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_implementation": "eager",
        **extra,
    }
    settings.pop("no_rope_layers", None)
    return getattr(transformers, model_class)(getattr(transformers, config_class)(**settings))


def make_tower(kind: str, **settings: object) -> VisionTower:
    config_class, model_class, extra = TOWERS[kind]
    config = getattr(transformers, config_class)(
        **{"hidden_size": TOWER_WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 8, **extra}
    )
    config._attn_implementation = "eager"
    return VisionTower(getattr(transformers, model_class)(config), -2, "patch", **settings)


def make_llava(kind: str, tower: VisionTower) -> Llava:
    torch.manual_seed(0)
    projector = nn.Sequential(nn.Linear(tower.hidden_size, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    return Llava(projector, make_language_model(kind), tower.hidden_size).train()


def everything(llava: Llava, tower: VisionTower) -> None:
    tower.freeze()


def with_tower(llava: Llava, tower: VisionTower) -> None:
    llava.adopt_tower(tower.unfreeze())


def projector_only(llava: Llava, tower: VisionTower) -> None:
    tower.freeze()
    llava.language_model.requires_grad_(False)


def lora(llava: Llava, tower: VisionTower, targets: tuple[str, ...] = (), *, projector: bool = True) -> None:
    tower.freeze()
    llava.projector.requires_grad_(projector)
    names = {name.rpartition(".")[2] for name, m in llava.language_model.named_modules() if isinstance(m, nn.Linear)}
    chosen = list(targets) or sorted(names - {"lm_head"})
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=chosen), llava.language_model)


def lora_alone(llava: Llava, tower: VisionTower) -> None:
    lora(llava, tower, projector=False)


def lora_of_mlp(llava: Llava, tower: VisionTower) -> None:
    lora(llava, tower, ("down_proj",), projector=False)


def without_embeddings(llava: Llava, tower: VisionTower) -> None:
    tower.freeze()
    llava.projector.requires_grad_(False)
    llava.language_model.get_input_embeddings().requires_grad_(False)


def late_layer(llava: Llava, tower: VisionTower) -> None:
    projector_only(llava, tower)
    llava.projector.requires_grad_(False)
    llava.language_model.model.layers[2].mlp.requires_grad_(True)


def run_counted(llava: Llava, tower: VisionTower, num_views: int, *, pixels: bool) -> FlopCounterMode:
    """Count one row's forward and backward pass, attention over the whole row."""
    ids = torch.randint(1, VOCAB, (1, sum(SAMPLES)))
    views = torch.randn(num_views, 3, IMAGE_SIZE, IMAGE_SIZE)
    if num_views:
        ids[0, 1 : 1 + 16 * num_views] = IMAGE_TOKEN_INDEX
    positions = torch.cat([torch.arange(length) for length in SAMPLES])[None]
    predicting = torch.arange(sum(SAMPLES) - NUM_SUPERVISED, sum(SAMPLES))
    with FlopCounterMode(display=False) as counter:
        images = {"pixels": views} if pixels else {"features": tower.extract(views) if num_views else None}
        logits = llava(ids, positions, predicting, **images)
        logits.float().logsumexp(-1).sum().backward()
    return counter


def compare(llava: Llava, tower: VisionTower, num_views: int = 3, *, pixels: bool = False) -> None:
    """Compare matrices and attention with the counter's, each to 1 %."""
    useful = UsefulFlops.measure(llava, tower, IMAGE_SIZE)
    counter = run_counted(llava, tower, num_views, pixels=pixels)
    by_kind = counter.get_flop_counts()["Global"]
    work = StepWork(SAMPLES, NUM_SUPERVISED, 16 * num_views, num_views)
    attention = sum(by_kind.values()) - sum(flops for kind, flops in by_kind.items() if kind != bmm)
    whole_row = StepWork((), NUM_SUPERVISED, 16 * num_views, num_views)
    tokens_alone = useful.count(whole_row) + useful.token * sum(SAMPLES)
    # The counter sees the square of the whole row; half of each sample's own is what is needed.
    square = sum(flops * sum(SAMPLES) ** 2 for flops, _ in useful.pairs)
    assert tokens_alone + square == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert attention == pytest.approx(square + view_attention(tower, useful, llava, num_views), rel=0.01)
    halves = sum(flops * count_pairs(length, window) for flops, window in useful.pairs for length in SAMPLES)
    assert useful.count(work) == pytest.approx(tokens_alone + halves)


def view_attention(tower: VisionTower, useful: UsefulFlops, llava: Llava, num_views: int) -> float:
    """The squares of the tower, which attends to all patches."""
    positions = 16 + tower.num_prefix_tokens
    passes = 3 if any(p.requires_grad for p in tower.parameters()) else 1
    return num_views * tower.passes_per_view * passes * 3 * 4 * TOWER_WIDTH * positions**2


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_full_tuning_of_every_kind_counts_as_torch_does(kind: str) -> None:
    tower = make_tower("clip")
    llava = make_llava(kind, tower)
    everything(llava, tower)
    compare(llava, tower)


@pytest.mark.parametrize(
    "freeze", [projector_only, lora, lora_alone, lora_of_mlp, without_embeddings, late_layer], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma2"])
def test_the_backward_pass_counts_where_it_is_needed(freeze: Callable[[Llava, VisionTower], None], kind: str) -> None:
    tower = make_tower("clip")
    llava = make_llava(kind, tower)
    freeze(llava, tower)
    compare(llava, tower)


@pytest.mark.parametrize("kind", TOWERS)
def test_towers_count_to_the_selected_layer_frozen_or_trained(kind: str) -> None:
    for freeze in (everything, with_tower):
        tower = make_tower(kind)
        llava = make_llava("llama", tower)
        freeze(llava, tower)
        compare(llava, tower, 6, pixels=freeze is with_tower)


def test_checkpointing_needs_no_more_and_a_text_row_no_tower() -> None:
    tower = make_tower("clip")
    llava = make_llava("llama", tower)
    everything(llava, tower)
    before = UsefulFlops.measure(llava, tower, IMAGE_SIZE)
    compare(llava, tower, 0)
    llava.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    assert UsefulFlops.measure(llava, tower, IMAGE_SIZE) == before
    done = run_counted(llava, tower, 0, pixels=False).get_total_flops()
    assert done > 1.2 * before.count(StepWork((sum(SAMPLES),), NUM_SUPERVISED))


def test_windows_and_halves() -> None:
    assert count_pairs(10, None) == 50
    assert count_pairs(10, 20) == 50
    assert count_pairs(10, 4) == 4 * 10 - 8
    tower = make_tower("clip")
    llava = make_llava("gemma2", tower)
    assert [window for _, window in UsefulFlops.measure(llava, tower, IMAGE_SIZE).pairs] == [6, None, 6]


def test_a_7b_model_needs_six_operations_for_each_parameter_and_token() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=11008))
        sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        config = transformers.CLIPVisionConfig(**sizes, image_size=336, patch_size=14)
        tower = VisionTower(transformers.CLIPVisionModel(config), -2, "patch")
        llava = Llava(nn.Linear(1024, 4096), model, 1024)
    tower.freeze()
    useful = UsefulFlops.measure(llava, tower, 336)
    assert useful.token == 6 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert useful.supervised == 6 * 4096 * 32000
    assert useful.view == 23 * (2 * 577 * 12 * 1024**2 + 4 * 1024 * 577**2) + 2 * 576 * (3 * 14**2) * 1024
    llava.requires_grad_(False)
    llava.projector.requires_grad_(True)
    aligned = UsefulFlops.measure(llava, tower, 336)
    assert aligned.token == useful.token * 4 / 6
    assert aligned.feature == 4 * 1024 * 4096

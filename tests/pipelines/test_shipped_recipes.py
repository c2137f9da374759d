"""Every shipped recipe loads; the big ones take two steps with tiny models of their classes, the small ones run."""

from pathlib import Path

import pytest
from fakes import make_language_model, make_vision_tower
from samples import write_mixed_samples, write_preferences, write_samples

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.recipes import load_recipe
from llava_ray.config.sweep_recipes import load_sweep
from llava_ray.data.preparation import prepare_data
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.lora.adapters import has_adapter
from llava_ray.model.network.quantization import find_quantization
from llava_ray.quickstart import easy_vqa
from llava_ray.quickstart.easy_vqa_records import (
    WordsCurriculum,
    write_conversations,
    write_open_questions,
    write_words,
)
from llava_ray.quickstart.registry_weights import make_language_model as make_smollm2
from llava_ray.quickstart.registry_weights import make_vision_tower as make_dinov2
from llava_ray.runtime import connected
from llava_ray.train.finished_run import FinishedRun
from llava_ray.train.trainer import finetune

ROOT = Path(__file__).parents[2]
OTHERS = ("evaluate", "review", "preferences", "improve", "sweep")  # stages whose recipes are not runs
RECIPES = sorted(path for path in (ROOT / "pipelines/recipes").glob("*/*.toml") if path.parent.name not in OTHERS)
SWEEPS = sorted((ROOT / "pipelines/recipes/sweep").glob("*.toml"))
BIG_LATER = [path for path in RECIPES if path.name.startswith("llava") and ("grpo" in path.stem or "dpo" in path.stem)]
BIG = [path for path in RECIPES if path.name.startswith("llava") and path not in BIG_LATER]
# Between them and the quickstart's, these have all that the others have (ZeRO 2 and 3, a projector alone, a tower that
# learns, tiles, an adapter, four bits); the others' runs are left to `make verify`.
SHORT = ("finetune/llava_v1_6_vicuna_7b", "finetune/llava_v1_5_7b_qlora")


def name(path: Path) -> str:
    """Return stage and recipe."""
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_it_loads(recipe):
    config = load_recipe(FinetuneConfig, [str(recipe)])
    assert config.train.model_max_length <= config.train.row_length


@pytest.mark.parametrize("recipe", SWEEPS, ids=name)
def test_a_sweep_loads_and_its_features_are_shared(recipe):
    config, space = load_sweep([str(recipe)])
    assert config.data.vision_features == "cached"
    assert config.sweep.scheduler == {"llava_v1_5_7b": "asha", "quickstart": "halving"}[recipe.stem]
    assert len(space.dimensions) >= 2


@pytest.mark.parametrize("recipe", BIG, ids=name)
def test_the_published_hyper_parameters_are_kept(recipe):
    config = load_recipe(FinetuneConfig, [str(recipe)])
    pretrain, lora = recipe.parent.name == "pretrain", config.lora.lora_enable
    assert lora is recipe.stem.endswith("lora")
    assert config.train.learning_rate == (1e-3 if pretrain else 2e-4 if lora else 2e-5)
    assert config.train.global_batch_size == (256 if pretrain else 128)
    assert config.train.zero_stage == (2 if pretrain or lora else 3)  # 3 gathers frozen weights in every pass
    assert config.train.tokens_per_micro_batch == "auto"
    assert config.model.version == ("plain" if pretrain else "v1")
    assert config.model.tune_mm_mlp_adapter is pretrain
    next_one = "v1_6" in recipe.stem
    assert config.data.image_aspect_ratio == ("square" if pretrain else "anyres" if next_one else "pad")
    train, model = config.train, config.model
    assert (train.num_train_epochs, train.warmup_ratio, train.weight_decay) == (1, 0.03, 0.0)
    assert (train.lr_scheduler_type, train.model_max_length, train.bf16) == ("cosine", 4096 if next_one else 2048, True)
    assert (model.unfreeze_mm_vision_tower, train.mm_vision_tower_lr) == ((True, 2e-6) if next_one else (False, None))
    assert model.mm_patch_merge_type == ("spatial_unpad" if next_one else "flat")
    assert (model.mm_projector_type, model.mm_vision_select_layer) == ("mlp2x_gelu", -2)
    if lora:
        assert (config.lora.lora_r, config.lora.lora_alpha, config.lora.lora_dropout) == (128, 256, 0.05)
        assert train.mm_projector_lr == 2e-5
        assert config.lora.bits == (4 if recipe.stem.endswith("qlora") else 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models of the big recipes' classes, and data for both stages."""
    folder = tmp_path_factory.mktemp("recipes")
    make_language_model(folder / "llama", "llama", max_position_embeddings=4096)  # as many as Vicuna 1.5
    make_vision_tower(folder / "clip", "clip")
    write_samples(folder, 64)
    write_mixed_samples(folder / "mixed", 64)
    write_conversations(folder, seed=0)
    return folder


def run(config: FinetuneConfig) -> FinishedRun:
    """Prepare and tune."""
    with connected(config.cluster) as resources:
        return finetune(config, prepare_data(config.data), resources)


@pytest.mark.ray
@pytest.mark.parametrize(
    "recipe",
    [pytest.param(path, marks=() if name(path) in SHORT else pytest.mark.verify) for path in BIG],
    ids=map(name, BIG),
)
def test_a_big_recipe_is_planned_and_takes_two_steps(recipe, folder, ray_cluster):
    data, images = folder / "data.json", folder / "images"
    if recipe.parent.name == "pretrain":
        data, images = folder / "conversations.json", easy_vqa.image_folder("train")
    elif "v1_6" in recipe.stem:  # several images or none
        data, images = folder / "mixed/data.json", folder / "mixed/images"
    changes = {
        "model.model_name_or_path": str(folder / "llama"),
        "model.vision_tower": str(folder / "clip"),
        "model.pretrain_mm_mlp_adapter": None,
        "data.data_path": str(data),
        "data.image_folder": str(images),
        "data.cache_dir": str(folder / "cache"),
        "data.max_samples": 64,
        "train.global_batch_size": 32,
        "train.max_steps": 2,
        "run.storage_path": str(folder / "runs"),
        "tracking.log_model": False,
        "cluster.num_workers": 2,
        "cluster.use_gpu": False,
    }
    config = load_recipe(FinetuneConfig, [str(recipe)]).replaced(changes)
    finished = run(config)
    assert len(finished.read_losses()) == 2
    parts = load_pretrained_model(finished.folder.bundle)
    assert has_adapter(parts.llava.language_model) == config.lora.lora_enable
    assert find_quantization(parts.llava.language_model) == config.lora.quantization


@pytest.mark.ray
@pytest.mark.verify
@pytest.mark.parametrize("recipe", BIG_LATER, ids=name)
def test_a_big_recipe_of_rewards_or_preferences_is_planned_and_takes_two_steps(recipe, folder, ray_cluster):
    over_pairs = "dpo" in recipe.stem
    changes = {
        "model.model_name_or_path": str(folder / "llama"),
        "model.vision_tower": str(folder / "clip"),
        "data.data_path": str(write_preferences(folder, 16) if over_pairs else folder / "data.json"),
        "data.image_folder": str(folder / "images"),
        "data.cache_dir": str(folder / "cache"),
        "train.global_batch_size": 8,
        "train.max_steps": 2,
        **({} if over_pairs else {"grpo.max_new_tokens": 6}),
        "run.storage_path": str(folder / "runs"),
        "tracking.log_model": False,
        "cluster.num_workers": 2,
        "cluster.use_gpu": False,
    }
    config = load_recipe(FinetuneConfig, [str(recipe)]).replaced(changes)
    finished = run(config)
    assert len(finished.read_losses()) == 2
    assert has_adapter(load_pretrained_model(finished.folder.bundle).llava.language_model) == config.lora.lora_enable


@pytest.mark.ray
def test_the_quickstart_recipes_run_on_64_samples_of_the_real_data(folder, ray_cluster):
    cache = ROOT / "runs/cache/quickstart"  # downloaded and converted once, for the quickstart too
    common = {
        "data.image_folder": str(easy_vqa.image_folder("train")),
        "data.cache_dir": str(folder / "cache"),
        "data.max_samples": 64,
        "train.max_steps": 2,
        "run.storage_path": str(folder / "runs"),
        "tracking.log_model": False,
    }
    words, align, tune = (
        load_recipe(FinetuneConfig, [str(ROOT / f"pipelines/recipes/quickstart/{stage}.toml")])
        for stage in ("words", "align", "tune")
    )
    scenes = {"data.data_path": str(write_words(folder, WordsCurriculum(24, 8, 16, 32), seed=0))}
    parts = {
        "model.vision_tower": str(make_dinov2(cache).path),
        "model.model_name_or_path": str(make_smollm2(cache).path),
    }
    spoken = run(words.replaced(common | scenes | parts))
    questions = {
        "data.data_path": str(write_conversations(folder, seed=0)),
        "model.model_name_or_path": spoken.folder.bundle,
    }
    open_questions = questions | {"data.data_path": str(write_open_questions(folder, seed=0))}
    aligned = run(align.replaced(common | open_questions))
    files = {path.name for path in Path(aligned.folder.bundle).iterdir()}
    assert "projector.safetensors" in files
    assert "language_model" not in files
    tuned = run(tune.replaced(common | questions | {"model.pretrain_mm_mlp_adapter": aligned.folder.bundle}))
    assert len(tuned.read_losses()) == 2
    assert (Path(tuned.folder.bundle) / "language_model").is_dir()
    parts = load_pretrained_model(tuned.folder.bundle)
    assert parts.manifest.version == tune.model.version

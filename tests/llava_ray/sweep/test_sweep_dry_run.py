"""A dry run of a sweep says how many trials and steps it is, what the largest needs and how long it takes."""

from pathlib import Path

import pytest
from samples import small_run, write_recipe, write_samples

from llava_ray.config.model import MODEL_PATHS
from llava_ray.config.space import Space, SweepConfig
from llava_ray.config.sweep_recipes import load_sweep
from llava_ray.data.first_look import measure_first_samples
from llava_ray.errors import ConfigError
from llava_ray.sweep.dry_run import count_all_steps, describe_sweep, find_largest_trial
from pipelines.sweep import main

ROOT = Path(__file__).parents[3]
SPACE = """
[sweep]
method = "grid"
scheduler = "halving"
reduction_factor = 2.0
include_default = false
num_seeds = 2
[space]
"train.learning_rate" = { choice = [1e-2, 1e-3, 1e-4, 1e-5] }
"model.mm_projector_type" = { choice = ["linear", "mlp2x_gelu"] }
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    held_out = write_samples(folder / "held_out", 8, seed=5)
    base = {"held_out.path": str(held_out), "held_out.num_answers": 2, "train.save_steps": 4}
    path = write_recipe(folder, small_run(folder, num_samples=64).replaced(base | {"train.global_batch_size": 4}))
    path.write_text(path.read_text() + SPACE)
    return path


def described(path: Path, *flags: str) -> tuple[SweepConfig, Space]:
    return load_sweep([str(path), *flags])


def test_trials_steps_memory_and_time_are_told_and_nothing_is_made(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(recipe.parent.rglob("*"))
    assert main([str(recipe), "--dry-run"]) is None
    text = capsys.readouterr().out
    assert "Trials  16 (grid: 8 settings x 2 seeds)" in text
    # 16 trials to step 4, 8 on to 8, 4 to the end at 16.
    assert "Steps   16 of a whole run, 128 in all in 3 rounds, to step 4, 8, 16" in text
    assert "Largest trial: " in text
    assert "mm_projector_type mlp2x_gelu" in text
    assert "Time    about " in text
    assert sorted(recipe.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("scheduler", "fewest", "most"), [("none", 256, 256), ("asha", 15 * 4 + 16, 256), ("median", 15 * 4 + 16, 256)]
)
def test_steps_of_schedulers_that_decide_as_they_go(recipe: Path, scheduler: str, fewest: int, most: int) -> None:
    config, _ = described(recipe, "--sweep.scheduler", scheduler)
    assert count_all_steps(config, 8, 16) == (fewest, most)


def test_the_largest_trial_is_of_the_largest_part(recipe: Path) -> None:
    settings, card, memory = find_largest_trial(*described(recipe))
    assert settings["model.mm_projector_type"] == "mlp2x_gelu"
    assert memory.total > 0
    projector = card.part("projector")
    assert projector is not None
    assert projector.num_trainable > 0


def test_samples_are_looked_at_for_their_length(recipe: Path) -> None:
    config, _ = described(recipe)
    looked_at = measure_first_samples(config.data.data_path)
    assert len(looked_at) == 64
    assert all(characters > 0 for characters, _ in looked_at)
    assert {images for _, images in looked_at} <= {0, 1}
    assert measure_first_samples("s3://bucket/data.json") == []


def test_what_does_not_fit_or_is_not_there_is_refused(recipe: Path) -> None:
    config, space = described(recipe)
    with pytest.raises(ConfigError, match=r"mlp2x_gelu.* needs .* GiB on each worker's GPU, the GPU has 0.5 GiB"):
        list(describe_sweep(config, space, 0.5))
    for key in MODEL_PATHS:
        with pytest.raises(ConfigError, match=rf"{key} = '/no/such/model': nothing is there"):
            main([str(recipe), "--dry-run", f"--{key}", "/no/such/model"])


def test_the_shipped_recipes_say_what_they_are_or_what_to_run_first() -> None:
    config, space = described(ROOT / "pipelines/recipes/sweep/llava_v1_5_7b.toml")
    text = "\n".join(describe_sweep(config, space, 80))
    assert "Warning: blip_laion_cc_sbu_558k.json does not exist yet (data.data_path)" in text
    assert "Trials  24 (optuna: 24 settings)" in text
    assert "Steps   390 of a whole run, 1,080 to 9,360 in all (ASHA ends trials early)" in text
    config, _ = described(ROOT / "pipelines/recipes/sweep/quickstart.toml")
    if not Path(config.model.model_name_or_path).exists():
        with pytest.raises(ConfigError, match=r"run llava-ray quickstart sweep first, which makes it"):
            main([str(ROOT / "pipelines/recipes/sweep/quickstart.toml"), "--dry-run"])

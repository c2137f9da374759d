"""A dry run says what a run would be, starts nothing, and refuses what cannot fit with what would."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from samples import small_run, write_recipe

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.recipes import load_recipe
from llava_ray.errors import ConfigError
from llava_ray.train.planning.dry_run import describe_run
from llava_ray.train.planning.fitting import suggest_memory_fixes
from llava_ray.train.planning.memory import GIB
from llava_ray.train.planning.sizing import estimate_run
from pipelines.command import split_dry_run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
RUNS = ("pretrain", "finetune")
BIG = sorted(path for stage in RUNS for path in (ROOT / "pipelines/recipes" / stage).glob("llava*.toml"))


def recipe(name: str, *flags: str) -> FinetuneConfig:
    return load_recipe(FinetuneConfig, [str(ROOT / f"pipelines/recipes/{name}.toml"), *flags])


def load_with_parts(path: Path) -> FinetuneConfig:
    """Load a recipe; one that starts from another recipe's model gets the parts of which that is made."""
    config = load_recipe(FinetuneConfig, [str(path)])
    if config.model.model_name_or_path != "runs/llava_v1_5_7b/model":
        return config
    parts = recipe("finetune/llava_v1_5_7b").model
    return config.replaced({f"model.{key}": getattr(parts, key) for key in ("model_name_or_path", "vision_tower")})


@pytest.mark.parametrize("path", BIG, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_shipped_recipes_are_described_offline(path: Path) -> None:
    text = "\n".join(describe_run(load_with_parts(path), 80))
    size = "13,015,864,320" if "13b" in path.stem else "6,738,415,616"
    assert re.search(rf"language_model +{size}", text)
    learning = "303,507,456       290,909,184" if "v1_6" in path.stem else "303,507,456                 0"
    assert f"{learning}  clip_vision_model" in text
    assert "Steps known when the data have been prepared" in text
    assert "optimiser state" in text


def test_what_cannot_fit_is_refused_with_what_would() -> None:
    config = recipe("finetune/llava_v1_5_13b", "--cluster.accelerator_type", "A10G")
    with pytest.raises(
        ConfigError, match=r"needs 3\d\.\d GiB on each worker's GPU, A10G has 22.1 GiB. It would fit"
    ) as error:
        list(describe_run(config))
    assert "--train.offload_optimizer True" in str(error.value)
    assert "--cluster.num_workers 16 " in str(error.value)


@pytest.mark.parametrize(
    ("name", "flags", "gib", "way"),
    [
        ("pretrain/llava_v1_5_13b", [], 22, "--train.zero_stage 3"),
        (
            "finetune/llava_v1_5_7b",
            ["--train.gradient_checkpointing", "False"],
            24,
            "--train.gradient_checkpointing True",
        ),
        (
            "finetune/llava_v1_5_7b",
            ["--train.tokens_per_micro_batch", "32768"],
            30,
            "--train.tokens_per_micro_batch",
        ),
        ("finetune/llava_v1_5_7b", ["--cluster.num_workers", "1"], 22, "--train.offload_optimizer True"),
    ],
)
def test_each_way_out_is_found_and_really_fits(name, flags, gib, way) -> None:
    config = recipe(name, *flags)
    assert estimate_run(config).total > gib * GIB
    ways = suggest_memory_fixes(config, gib * GIB)
    assert any(said.startswith(way) for said, _ in ways)
    for said, needed in ways:  # as flags: they can be pasted
        assert estimate_run(recipe(name, *flags, *said.split())).total == needed <= gib * GIB


def test_several_changes_are_joined_where_one_is_not_enough() -> None:
    flags = ["--cluster.num_workers", "1", "--train.zero_stage", "0", "--train.gradient_checkpointing", "False"]
    config = recipe("finetune/llava_v1_5_7b", *flags)
    [(said, needed)] = suggest_memory_fixes(config, 20 * GIB)
    assert said.startswith("--train.gradient_checkpointing True --train.offload_optimizer True")
    assert needed <= 20 * GIB


def test_nothing_helps_a_gpu_that_is_far_too_small() -> None:
    config = recipe("finetune/llava_v1_5_13b")
    with pytest.raises(ConfigError, match="No known setting makes it fit"):
        list(describe_run(config, 1))


def test_a_gpu_that_is_not_known_is_not_compared() -> None:
    text = "\n".join(describe_run(recipe("finetune/llava_v1_5_7b", "--cluster.accelerator_type", "XPU-9000")))
    assert "Not compared: the memory of XPU-9000 is not known here. Set cluster.accelerator_type to one of T4" in text


def test_steps_are_counted_where_that_is_no_work(tmp_path: Path) -> None:
    config = small_run(tmp_path, num_samples=60)
    text = "\n".join(describe_run(config))
    assert f"Data  {tmp_path / 'data.json'}, 60 samples" in text
    assert "Steps 8 of 8 samples" in text  # the last step holds four
    fewer = config.replaced({"data.max_samples": 10, "train.num_train_epochs": 3})
    assert "Steps 6 of 8 samples" in "\n".join(describe_run(fewer))
    assert "Steps 2 of 8" in "\n".join(describe_run(fewer.replaced({"train.max_steps": 2})))
    away = config.replaced({"data.data_path": "s3://bucket/data.json", "train.max_steps": 5})
    assert "Steps at most 5 of 8 samples" in "\n".join(describe_run(away))


def test_estimates_are_what_the_sum_says() -> None:
    config = recipe("finetune/llava_v1_5_7b")
    memory = estimate_run(config)
    parts = [value for name, value in dataclasses.asdict(memory).items() if name != "host"]
    assert memory.total == sum(parts)
    assert f"{memory.total / GIB:.2f} GiB" in "\n".join(describe_run(config))


def test_as_a_command_it_starts_nothing(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, small_run(tmp_path, num_samples=4))
    command = [sys.executable, str(ROOT / "pipelines/finetune.py"), str(path), "--dry-run", "--gpu_memory_gib"]
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}  # whoever connects fails
    ran = subprocess.run([*command, "1"], capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert ran.returncode == 1
    assert "Memory of each worker (2): ZeRO 2, a row of 512 tokens, fp32" in ran.stdout
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "cache").exists()
    assert "ConfigError: the run needs" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_what_fits_is_said_and_nothing_returned(tmp_path: Path, capsys) -> None:
    from pipelines.finetune import main

    path = write_recipe(tmp_path, small_run(tmp_path, num_samples=4))
    assert main([str(path), "--dry-run", "--gpu_memory_gib", "8"]) is None
    assert "the GPU                     8.00 GiB" in capsys.readouterr().out


def test_the_memory_alone_says_nothing() -> None:
    from pipelines.finetune import main

    with pytest.raises(ConfigError, match="--gpu_memory_gib says into what --dry-run has to fit"):
        main([str(BIG[0]), "--gpu_memory_gib", "80"])


def test_adapters_are_counted_and_offered() -> None:
    with_adapter = recipe("finetune/llava_v1_5_7b", "--lora.lora_enable", "True", "--lora.lora_r", "128")
    text = "\n".join(describe_run(with_adapter, 24))
    assert re.search(r"adapter +319,815,680 +319,815,680  LoRA, r 128", text)  # as the original's LoRA of that rank
    assert re.search(r"language_model +6,738,415,616 +0", text)
    said = [
        said
        for said, _ in suggest_memory_fixes(recipe("finetune/llava_v1_5_7b", "--cluster.num_workers", "1"), 24 * GIB)
    ]
    assert "--lora.lora_enable True" in said
    assert "--lora.lora_enable True --lora.bits 4 --train.zero_stage 2" in said


@pytest.mark.parametrize("path", BIG, ids=lambda path: f"{path.parent.name}/{path.stem}")
@pytest.mark.parametrize("cluster", ["a100", "h100", "gcp_a100", "kuberay/rayjob_finetune"])
def test_a_cluster_file_brings_room_and_memory(path: Path, cluster: str) -> None:
    file = str(ROOT / "clusters" / f"{cluster}.yaml")
    text = "\n".join(describe_run(load_with_parts(path), cluster_file=file))
    assert text.startswith(f"Fits  {file} (pools: decode, train, vision)")
    assert re.search(r"H100 +79.10 GiB" if cluster == "h100" else r"A100-80G +79.20 GiB", text)


def test_a_cluster_file_without_room_is_refused_before_anything_else() -> None:
    file = str(ROOT / "clusters/laptop.yaml")
    with pytest.raises(ConfigError, match=r"fit \S+laptop.yaml. 8 workers x 1 CPU \+ 1 GPU: there is room for 0"):
        list(describe_run(recipe("finetune/llava_v1_5_7b"), cluster_file=file))


def test_a_cluster_file_belongs_to_a_dry_run() -> None:
    flags = ["--dry-run", "--cluster_file", "clusters/a100.yaml", "--train.bf16", "True"]
    asked, others = split_dry_run(["RECIPE", *flags])
    assert (asked.dry_run, asked.cluster_file) == (True, "clusters/a100.yaml")
    assert others == ["RECIPE", "--train.bf16", "True"]
    with pytest.raises(ConfigError, match="--cluster_file says into what --dry-run has to fit"):
        split_dry_run(["RECIPE", "--cluster_file", "clusters/a100.yaml"])

"""A dry run of an evaluation says how much is asked and what it takes, and starts nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import fakes
import pytest
from benchmark_files import write_benchmark

from llava_ray.config.model import ModelConfig
from llava_ray.errors import ConfigError, DataError, ModelError
from llava_ray.model.assembly import assemble
from llava_ray.model.saving import save_bundle
from pipelines.evaluate import main

Describe = Callable[..., str]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("described")
    config = ModelConfig(
        model_name_or_path=str(fakes.make_language_model(root / "language_model")),
        vision_tower=str(fakes.make_vision_tower(root / "tower")),
        mm_vision_select_layer=-1,  # not the default: a dry run takes what the bundle states
    )
    save_bundle(root / "bundle", assemble(config, "pad"))
    return root / "bundle"


@pytest.fixture
def describe(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Describe:
    for name in ("pope", "science_qa", "llava_bench"):
        write_benchmark(name, tmp_path / name)

    def said(names: list[str], *more: str) -> str:
        place = ["--run.storage_path", str(tmp_path / "runs"), "--run.name", "e", "--evaluate.batch_size", "8"]
        asked = [f"{name}={tmp_path / name}" for name in names]
        flags = ["--evaluate.model_path", str(bundle), *place, *more, "--evaluate.benchmarks", *asked]
        capsys.readouterr()
        assert main(["run", "--dry-run", *flags]) == []
        return capsys.readouterr().out

    return said


def test_questions_batches_memory_and_time_are_told_and_nothing_is_made(describe: Describe, tmp_path: Path) -> None:
    text = describe(["pope", "science_qa", "llava_bench"])
    assert "pope            12 of 9,000 questions; at most 128 new tokens each" in text
    assert "science_qa      4 of 4,241 questions; at most 1,024 new tokens each" in text
    assert "needs a judge's reviews to be scored" in text
    # Two limits, two streams: 12 questions with 128 tokens, 4 and 3 with 1,024, eight at once.
    assert "19 questions to ask, batches: 3 of up to 8" in text
    assert "no published figure stands beside the score" in text
    assert "fp32 on the CPU" in text
    assert "weights" in text
    assert "Time      about " in text
    assert not (tmp_path / "runs").exists()


def test_what_is_answered_already_is_not_asked_again(describe: Describe, tmp_path: Path) -> None:
    folder = tmp_path / "runs/e/pope"
    folder.mkdir(parents=True)
    rows = [{"question_id": f"random/{number}", "text": "Yes"} for number in (1, 2)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"question_id": "ran')
    assert "12 of 9,000 questions, 2 of them answered already" in describe(["pope"])
    assert "12 of 9,000 questions;" in describe(["pope"], "--run.restart", "True")
    assert "5 of 9,000 questions" in describe(["pope"], "--evaluate.max_questions", "5")


def test_images_that_are_not_there_are_counted(describe: Describe, tmp_path: Path) -> None:
    image = next((tmp_path / "pope/val2014").iterdir())
    image.unlink()
    assert f"images are not there, the first: {image}" in describe(["pope"])


def test_options_are_ranked_in_a_stream_of_their_own(describe: Describe) -> None:
    assert "4 with options to rank by their letter" in describe(["science_qa"], "--evaluate.ranking", "letter")


def test_what_cannot_be_is_refused(describe: Describe, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*gqa"):
        describe(["gqa"])
    with pytest.raises(DataError, match=r"score.reviews: there is no file no.jsonl"):
        describe(["llava_bench"], "--score.reviews", "llava_bench=no.jsonl")
    with pytest.raises(ModelError, match="'no/such' is no folder here"):
        describe(["pope"], "--evaluate.model_path", "no/such")
    with pytest.raises(ConfigError, match=r"the model needs about .* GiB on a GPU, the GPU has 0.1 GiB"):
        describe(["pope"], "--gpu_memory_gib", "0.1")


def test_a_known_gpu_tells_the_time(describe: Describe) -> None:
    vicuna = ("lmsys/vicuna-7b-v1.5", "--evaluate.vision_tower", "openai/clip-vit-large-patch14-336")
    text = describe(["pope"], "--cluster.accelerator_type", "H200", "--evaluate.model_path", *vicuna)
    assert "7,062,902,784 parameters" in text
    assert "weights                        13.16 GiB" in text
    assert "35% of the peak of H200" in text
    text = describe(["pope"], "--cluster.use_gpu", "True", "--evaluate.model_path", *vicuna)
    assert "Time      not known: which GPU answers is not known here" in text

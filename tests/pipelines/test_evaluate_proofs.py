"""Long proofs of evaluation: killed workers and drivers, and batches that answer as each question alone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fakes
import psutil
import pytest
import torch
from benchmark_files import encoded
from PIL import Image

from llava_ray.chat.conversation import IMAGE_TOKEN, Turn
from llava_ray.chat.tokens import tokenize_prompt
from llava_ray.config.model import ModelConfig
from llava_ray.generate.decoding import generate_batch
from llava_ray.images.geometry import crop_views
from llava_ray.images.processing import normalize_pixels
from llava_ray.model.assembly import LlavaParts, assemble
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.saving import save_bundle
from llava_ray.quickstart import easy_vqa
from pipelines.evaluate import main

pytestmark = pytest.mark.verify

NUM_QUESTIONS = 300
NUM_KILLED = 120  # of the run that is disturbed
CLOSE = 1e-3  # logits
ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "runs/quickstart"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("proofs")
    config = ModelConfig(
        model_name_or_path=str(fakes.make_language_model(root / "language_model")),
        vision_tower=str(fakes.make_vision_tower(root / "tower")),
    )
    save_bundle(root / "bundle", assemble(config, "pad"))
    return root / "bundle"


def write_questions(folder: Path) -> Path:
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(encoded(number))
    rows = [
        {"id": f"q{i}", "image": f"{i % 4}.png", "question": f"What is {i * 7919 % 1000}{'?' * (i % 5)}", "answer": "x"}
        for i in range(NUM_KILLED)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def start(bundle: Path, data: Path, store: Path) -> subprocess.Popen[str]:
    flags = [
        "--evaluate.model_path",
        bundle,
        "--evaluate.benchmarks",
        f"custom={data}",
        "--evaluate.max_new_tokens",
        "8",
    ]
    flags += ["--evaluate.batch_size", "4", "--actors.num_actors", "2", "--actors.cpus_per_actor", "0.5"]
    flags += ["--run.storage_path", store, "--run.name", "e"]
    return subprocess.Popen(
        [sys.executable, "pipelines/evaluate.py", "run", *map(str, flags)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(happened: Callable[[], bool], driver: subprocess.Popen[str]) -> None:
    while not happened():  # the test's own timeout ends a wait in vain
        assert driver.poll() is None, driver.stdout and driver.stdout.read()
        time.sleep(0.02)


def actors_of(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if "AnswerActor" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:  # gone meanwhile
            continue
    return found


def num_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.timeout(1800)
def test_killed_worker_and_killed_driver_leave_the_file_of_an_undisturbed_run(bundle: Path, tmp_path: Path) -> None:
    data = write_questions(tmp_path / "data")
    calm = start(bundle, data, tmp_path / "calm")
    said, _ = calm.communicate(timeout=600)
    assert calm.returncode == 0, said

    file = tmp_path / "wild" / "e" / "custom" / "answers.jsonl"
    driver = start(bundle, data, tmp_path / "wild")
    wait_for(lambda: num_lines(file) >= 20, driver)
    victims = actors_of(driver)
    assert victims
    victims[0].send_signal(signal.SIGKILL)
    at_kill = num_lines(file)
    wait_for(lambda: num_lines(file) >= at_kill + 20, driver)
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    psutil.wait_procs(family, timeout=60)
    kept = num_lines(file)
    assert 40 <= kept < NUM_KILLED
    before = file.read_bytes()[: file.read_bytes().rfind(b"\n") + 1].splitlines()

    again = start(bundle, data, tmp_path / "wild")
    said, _ = again.communicate(timeout=600)
    assert again.returncode == 0, said
    assert file.read_bytes() == (tmp_path / "calm" / "e" / "custom" / "answers.jsonl").read_bytes()
    rows = file.read_bytes().splitlines()
    assert len(rows) == len({json.loads(row)["question_id"] for row in rows}) == NUM_KILLED
    assert set(before) <= set(rows)


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.skipif(not QUICKSTART.exists(), reason="make quickstart first")
def test_the_quickstarts_model_scores_to_the_question_what_the_quickstart_said(tmp_path: Path) -> None:
    """A benchmark asks each question alone, as a conversation does its first."""
    first = json.loads((QUICKSTART / "report.json").read_text())["by_position"]["first"]
    asked = [questions[0] for questions in easy_vqa.test_conversations(first["num_questions"], seed=0)]
    data = easy_vqa.write_benchmark(tmp_path / "easy_vqa", asked)
    flags = ["--evaluate.model_path", QUICKSTART / "model", "--evaluate.benchmarks", f"custom={data}"]
    place = ["--run.storage_path", tmp_path / "runs", "--run.name", "easy-vqa", "--evaluate.batch_size", "50"]
    found = main(["run", *map(str, [*flags, *place])])
    assert isinstance(found, list)
    [summary] = found
    print(f"evaluate.py {summary['score']}, quickstart's first questions {100 * first['model']}")
    assert summary["num_scored"] == len(asked)
    assert summary["score"] == pytest.approx(100 * first["model"], abs=1e-9)
    kept = max(QUICKSTART.glob("tune-*/answers.json"), key=lambda file: file.stat().st_mtime)
    for kind, count in easy_vqa.score_shape_answers(json.loads(kept.read_text()), asked).by_kind.items():
        assert summary["categories"][kind]["score"] == pytest.approx(100 * count.accuracy, abs=1e-4)


def test_batches_answer_as_each_question_alone(bundle: Path) -> None:
    parts = load_pretrained_model(bundle)
    torch.manual_seed(0)
    asked = [f"{IMAGE_TOKEN}\nWhat is {i * 7919 % 1000}{'?' * (i % 9)}" for i in range(NUM_QUESTIONS)]
    prompts = [tokenize_prompt([Turn("human", text)], parts.template, parts.tokenizer) for text in asked]
    spec = parts.image_spec
    colours = [
        normalize_pixels(crop_views(Image.new("RGB", (40, 30), (i * 40, 90, 255 - i * 40)), spec), spec)
        for i in range(6)
    ]
    pixels = [colours[i % 6] for i in range(NUM_QUESTIONS)]
    batched: list[list[int]] = []
    for first in range(0, NUM_QUESTIONS, 16):
        some = slice(first, first + 16)
        batched += generate_batch(parts, prompts[some], pixels[some], max_new_tokens=8)
    differing = []
    for number, answer in enumerate(batched):
        alone = generate_batch(parts, [prompts[number]], [pixels[number]], max_new_tokens=8)[0]
        if answer != alone:
            differing.append(gap(parts, prompts[number], pixels[number], alone, answer))
    print(f"{len(differing)} of {NUM_QUESTIONS} answers differ, at gaps of {differing}")
    assert all(one < CLOSE for one in differing)
    assert len({tuple(answer) for answer in batched}) > NUM_QUESTIONS // 20


def gap(parts: LlavaParts, prompt: list[int], pixels: torch.Tensor, alone: list[int], batched: list[int]) -> float:
    """The distance between the two best logits where two answers part."""
    same = next(n for n, pair in enumerate(zip(alone, batched, strict=False)) if pair[0] != pair[1])
    features = parts.tower.extract(pixels)
    ids = [*prompt, *alone[:same]]
    from llava_ray.generate.decoding import expand_prompt, find_sizes

    full = expand_prompt(parts, ids, find_sizes(parts, pixels, None))
    embeddings = parts.llava.embed(torch.tensor([full]), features, [(1, 1)])
    logits = parts.llava.language_model(inputs_embeds=embeddings, use_cache=False).logits[0, -1]
    best = logits.topk(2).values
    return float(best[0] - best[1])

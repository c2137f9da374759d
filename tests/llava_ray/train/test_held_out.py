"""Cached features and held-out samples inside real runs."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes import make_tokenizer
from samples import small_run, write_samples

from llava_ray.chat.conversation import Turn
from llava_ray.chat.templates import find_template
from llava_ray.chat.tokenizer import load_tokenizer
from llava_ray.chat.tokens import tokenize_prompt
from llava_ray.config.finetune import FinetuneConfig
from llava_ray.data.preparation import prepare_data
from llava_ray.runtime import connected
from llava_ray.train.finished_run import FinishedRun
from llava_ray.train.held_out import make_question, same
from llava_ray.train.trainer import finetune


def run(config: FinetuneConfig) -> FinishedRun:
    with connected(config.cluster) as resources:
        return finetune(config, prepare_data(config.data), resources, show_progress=False)


def judged(finished: FinishedRun) -> dict[int, tuple[float, float]]:
    rows = [json.loads(line) for line in Path(finished.folder.path, "metrics.jsonl").read_text().splitlines()]
    return {row["step"] + 1: (row["held_out_loss"], row["held_out_accuracy"]) for row in rows if "held_out_loss" in row}


def test_an_answer_counts_if_it_is_the_records_own_but_for_case_and_a_period():
    assert same(" Red.", "red")
    assert not same("reddish", "red")


def test_a_question_has_the_system_and_all_before_the_first_answer_that_is_learnt(tmp_path):
    tokenizer, template = load_tokenizer(make_tokenizer(tmp_path)), find_template("v1")
    settings, parts = SimpleNamespace(features=None, image_spec=SimpleNamespace(width=8, height=8)), SimpleNamespace()
    parts.tokenizer, parts.template = tokenizer, template
    turns = [Turn("human", "a"), Turn("gpt", "bad", supervised=False), Turn("human", "b"), Turn("gpt", "good")]

    def asked(*turns):
        record = {"id": "r", "turns": [turn.to_row() for turn in turns], "widths": [], "heights": [], "images": []}
        return make_question(settings, parts, (0, 0), record)

    plain = asked(*turns[2:])
    assert (plain.prompt, plain.answer) == (tokenize_prompt(turns[2:3], template, tokenizer), "good")
    later = asked(Turn("system", "Be brief."), *turns)
    assert later.prompt == tokenize_prompt(turns[:3], template.with_system("Be brief."), tokenizer)
    assert (later.answer, later.images, later.sizes) == ("good", None, [])


@pytest.mark.ray
@pytest.mark.verify
@pytest.mark.timeout(900)
def test_held_out_samples_are_looked_at_whenever_a_run_saves_and_change_nothing(tmp_path, ray_cluster):
    held_out = write_samples(tmp_path / "held_out", 24, seed=5)
    asked = {
        "held_out.path": str(held_out),
        "held_out.images": str(tmp_path / "held_out/images"),
        "held_out.num_answers": 6,
        "held_out.max_new_tokens": 3,
    }
    plain = run(small_run(tmp_path, **{"run.name": "plain"}))
    inline = run(small_run(tmp_path, **asked, **{"run.name": "inline"}))
    cached = run(small_run(tmp_path, **asked, **{"run.name": "cached", "data.vision_features": "cached"}))
    alone = run(small_run(tmp_path, **asked, **{"run.name": "alone", "cluster.num_workers": 1}))
    assert inline.read_losses() == pytest.approx(plain.read_losses(), rel=1e-6)
    assert cached.read_losses() == pytest.approx(plain.read_losses(), rel=1e-5)
    looks = judged(inline)
    assert list(looks) == [3, 6, 8]
    for other in (cached, alone):
        for step, (loss, accuracy) in judged(other).items():
            assert loss == pytest.approx(looks[step][0], rel=1e-4)
            assert accuracy == pytest.approx(looks[step][1], abs=1e-6)
    assert not judged(plain)

"""Preferences from a tiny model's answers and a scripted judge: each call paid once, the same file whatever happens."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fakes
import pytest
from pictures import picture
from review_files import write_lines
from scripted_judge import Remote, score_of, scripted_judge

from llava_ray.config.preferences import PreferencesConfig
from llava_ray.config.sections import ModelConfig
from llava_ray.errors import ConfigError, DataError, JudgeError
from llava_ray.model.assembly import assemble
from llava_ray.model.saving import save_bundle
from pipelines.preferences import PreferencesMade, make_preferences

ROOT = Path(__file__).resolve().parents[2]
PRICE = {"input_dollars": 1.0, "output_dollars": 2.0}
NUM = 6

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
Make = Callable[..., PreferencesMade]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("preferring")
    config = ModelConfig(
        model_name_or_path=str(fakes.make_language_model(root / "language_model")),
        vision_tower=str(fakes.make_vision_tower(root / "tower")),
    )
    save_bundle(root / "bundle", assemble(config, "pad"))
    return root / "bundle"


@pytest.fixture(scope="module")
def judge() -> Iterator[Remote]:
    with scripted_judge() as remote:
        yield remote


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Records of one turn and of two, with an image or without."""
    folder = tmp_path / "data"
    folder.mkdir()
    records = []
    for number in range(NUM):
        (folder / f"{number}.png").write_bytes(picture(colour=["red", "green", "blue"][number % 3], width=40 + number))
        turns = [("human", "<image>\nWhat is it?"), ("gpt", "a red dog"), ("human", "And its colour?"), ("gpt", "a blue cat")]
        turns = turns[:2] if number % 2 else turns
        listed = [{"from": role, "value": text} for role, text in turns]
        records.append({"id": f"r{number}", "image": f"{number}.png", "conversations": listed})
    records.append({"id": "text", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "a fox"}]})
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def settings(bundle: Path, data: Path, output: Path, judge: Remote | None = None, **more: Any) -> dict[str, Any]:
    section = {
        "models": [str(bundle)],
        "data_path": str(data / "data.json"),
        "num_samples": 3,
        "max_new_tokens": 6,
        "cut_off": "keep",
        "output": str(output),
        "batch_size": 2,
    }
    sections: dict[str, Any] = {"preferences": section, "actors": {"num_actors": 1, "cpus_per_actor": 0.5}}
    if judge is not None:
        sections["judge"] = {"model": "scripted", "base_url": judge.base_url, **PRICE}
    for key, value in more.items():
        place, _, name = key.partition("__")
        sections.setdefault(place, {})[name] = value
    return sections


@pytest.fixture
def make(bundle: Path, data: Path, judge: Remote, tmp_path: Path) -> Make:
    judge.play()

    def run(output: str = "out", *, judged: bool = True, **more: Any) -> PreferencesMade:
        given = settings(bundle, data, tmp_path / output, judge if judged else None, **more)
        return make_preferences(PreferencesConfig.parsed(given))

    return run


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_judged_pairs_become_preferences_and_nothing_is_paid_twice(make: Make, judge: Remote, tmp_path: Path) -> None:
    made = make()
    assert made.complete
    assert made.num_pairs == len(rows(made.path)) > 3
    counts = made.summary["counts"]
    assert counts["sampled_answers"] == 3 * (NUM + 1)
    assert counts["decided_pairs"] + counts.get("tied_pairs", 0) == counts["possible_pairs"] - counts.get("equal_pairs", 0)
    assert made.summary["order"]["first_wins"] == 0.5
    assert made.dollars is not None
    assert made.dollars > 0
    for row in rows(made.path):
        assert row.keys() == {"id", "images", "prompt", "chosen", "rejected", "provenance"}
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert score_of(chosen) > score_of(rejected)
        assert row["prompt"][-1]["role"] == "user"
        assert "".join(turn["content"] for turn in row["prompt"]).count("<image>") == len(row["images"])
        assert all(Path(image).is_file() for image in row["images"])
        found = row["provenance"]
        assert found["question"] == row["id"].partition("#")[0]
        assert {one["first"] for one in found["calls"]} == {found["chosen"]["label"], found["rejected"]["label"]}
        assert all(one["key"] and one["scores"] for one in found["calls"])
        assert found["chosen"]["seed"] != found["rejected"]["seed"]
        assert found["chosen"]["fingerprint"] == next(iter(made.summary["models"].values()))
    talk = next(row for row in rows(made.path) if row["id"].startswith("r0#"))
    assert [turn["role"] for turn in talk["prompt"]] == ["user", "assistant", "user"]
    assert (made.path.parent / "report.html").stat().st_size > 1000
    paid = judge.stats()["paid"]
    assert set(paid.values()) == {1}

    # Again: nothing is asked. Elsewhere, with another batch size: the same answers and the same file.
    before = made.path.read_bytes()
    assert make().path.read_bytes() == before
    assert judge.stats()["paid"] == paid
    other = make("other", preferences__batch_size=5)
    assert other.path.read_bytes() == before.replace(b'"key"', b'"key"')
    assert other.mlflow_run_id
    balanced = make(preferences__balance_lengths=True)
    lengths = balanced.summary["lengths"]
    assert lengths["chosen_longer"] == lengths["rejected_longer"]


def test_what_no_judge_decides_is_counted_and_never_learnt_from(make: Make, judge: Remote) -> None:
    judge.play(likes_first=9)
    with pytest.raises(DataError, match=r"no preference is left .*inconsistent pairs.*no pair has a winner in both"):
        make()
    judge.play(content="5 5\nEqually good.")
    with pytest.raises(DataError, match="tied pairs"):
        make("tied")
    judge.play(faults={"500": 0.4}, seed=2)
    made = make("faults", judge__max_attempts=1)
    counts = made.summary["counts"]
    assert counts["failed_pairs"] > 0
    assert made.num_pairs == counts["decided_pairs"] > 0
    decided = {row["id"] for row in rows(made.path)}
    # The same command asks the failed ones again, and only those.
    judge.play()
    again = make("faults", judge__max_attempts=1)
    assert "failed_pairs" not in again.summary["counts"]
    assert decided < {row["id"] for row in rows(again.path)}


def test_a_budget_that_is_used_up_keeps_what_there_is(make: Make, judge: Remote, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="below the price of one call"):
        make("poor", budget__dollars=1e-6)
    shutil.move(tmp_path / "poor/answers", tmp_path / "answers")
    (tmp_path / "half").mkdir()
    shutil.move(tmp_path / "answers", tmp_path / "half/answers")
    made = make("half", budget__dollars=0.02, judge__max_tokens=256, limits__max_concurrency=2)
    assert not made.complete
    assert made.summary["counts"]["open_pairs"] > 0
    assert "budget" in made.summary["partial_because"]
    sent = judge.stats()["paid"]
    whole = make("half", judge__max_tokens=256)
    assert whole.complete
    assert whole.num_pairs > made.num_pairs
    assert set(judge.stats()["paid"].values()) == {1}
    assert sent.keys() < judge.stats()["paid"].keys()


def test_rules_and_perturbations_need_no_judge(make: Make, data: Path) -> None:
    truth = make("truth", judged=False, preferences__rule="answer", preferences__chosen="truth")
    assert {row["chosen"][0]["content"] for row in rows(truth.path)} == {"a red dog", "a blue cat", "a fox"}
    assert all(row["provenance"]["chosen"] == {"kind": "truth", "label": "truth"} for row in rows(truth.path))
    with pytest.raises(DataError, match="no question has a right and a wrong answer"):
        make("truth", judged=False, preferences__rule="answer")
    assert not truth.path.exists(), "an older file must not be learnt from"

    noised = make("truth", judged=False, preferences__rule="noised_image", preferences__noise_steps=1000)
    assert noised.num_pairs > 0
    assert noised.summary["counts"]["questions_without_other_image"] == 1
    assert {row["provenance"]["rejected"]["noise_steps"] for row in rows(noised.path)} == {1000}
    swapped = make("truth", judged=False, preferences__rule="swapped_image")
    assert {row["provenance"]["rejected"]["kind"] for row in rows(swapped.path)} == {"swapped_image"}

    words = make("words", judged=False, preferences__rule="replaced_words", preferences__chosen="truth")
    said = {(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows(words.path)}
    assert all(one != other and one.split()[0] == other.split()[0] for one, other in said)
    first = words.path.read_bytes()
    assert make("words", judged=False, preferences__rule="replaced_words", preferences__chosen="truth").path.read_bytes() == first


def test_bad_images_and_bad_judges_are_named(make: Make, data: Path, judge: Remote) -> None:
    whole = (data / "1.png").read_bytes()
    (data / "1.png").write_bytes(whole[:60])
    with pytest.raises(DataError, match=r"1 of 7 questions cannot be asked .*question 'r1': .*1\.png"):
        make("bad")
    made = make("bad", preferences__max_rejected=0.2)
    assert made.summary["rejected"] == {"image_unreadable": 1}
    assert not any(row["id"].startswith("r1#") for row in rows(made.path))
    (data / "1.png").write_bytes(whole)
    assert make("bad").summary["asked"] == NUM + 1
    (data / "2.png").unlink()
    with pytest.raises(DataError, match=r"question 'r2': image .*2\.png' does not exist"):
        make("bad")
    with pytest.raises(JudgeError, match=r"no pair was judged: .*in a row"):
        make(
            "down",
            preferences__max_rejected=0.2,
            judge__base_url="http://127.0.0.1:9/v1",
            judge__max_attempts=1,
            limits__give_up_after=3,
        )


def test_equal_answers_are_told_with_the_remedy(make: Make) -> None:
    with pytest.raises(DataError, match=r"all 21 pairs of answers to 7 questions are equal: raise preferences\.temp"):
        make("equal", preferences__top_p=1e-6)

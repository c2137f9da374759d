"""The decisions of the loop, without a model: when it stops, what it keeps, what the report says."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from preference_data import write_colours
from scripted_judge import ScriptedJudge

from evals.answers import Answer
from evals.benchmarks.custom import Custom
from evals.comparison import StoredResult, write_result
from evals.files import as_lines
from evals.scoring import score_answers
from llava_ray.config.improve import ImproveConfig
from llava_ray.config.recipes import load_settings
from llava_ray.errors import BudgetError, ConfigError, DataError, DivergedError, NoPairsError
from pipelines.improve_loop import ImprovedRounds, measure_gain, run_rounds
from pipelines.improve_overlap import AskedQuestions, check_apart
from pipelines.improve_results import summarize_rounds, write_improvement
from pipelines.improve_settings import claim_loop, find_slice, preference_settings, tuning_settings
from pipelines.improve_stages import HeldOutResult, RoundPreferences
from pipelines.preference_questions import read_prompts_to_answer

NUM = 200


def loop_config(output: Path, **more: Any) -> ImproveConfig:
    sections: dict[str, Any] = {
        "improve": {"benchmark": f"custom={output}/held_out", "output": str(output), "rounds": 3},
        "model": {"model_name_or_path": "start", "version": "chat_template"},
        "preferences": {"data_path": "data.json"},
        "judge": {"model": "m"},
    }
    for key, value in more.items():
        place, _, name = key.partition("__")
        sections.setdefault(place, {})[name] = value
    return ImproveConfig.parsed(sections)


@dataclass
class FakeStages:
    """Stages whose model of each round answers a given number of held-out questions right."""

    config: ImproveConfig
    right: Sequence[int]
    """By round; 0 is the start."""
    fault: Callable[[int, str], None] = lambda number, stage: None
    ran: list[str] = field(default_factory=list)

    def evaluate(self, number: int, model: str) -> HeldOutResult:
        self.begin(number, "evaluate")
        root = Path(self.config.improve.output)
        questions = Custom().read(root / "held_out")
        folder = root / f"round-{number}/evaluate/custom"
        # Which questions are right differs from round to round, as it does for real models.
        shifted = [questions[(place + 7 * number) % NUM].id for place in range(self.right[number])]
        texts = {one.id: one.truths[0] if one.id in shifted else "something else" for one in questions}
        result = score_answers(
            Custom(), questions, [Answer(name, text, "", {}) for name, text in texts.items()], "robust"
        )
        write_result(folder, result)
        rows = [{"question_id": name, "text": text} for name, text in texts.items()]
        (folder / "answers.jsonl").write_bytes(as_lines(rows))
        return HeldOutResult(model, f"hash-{number}", folder, {"mlflow_run_id": "run", "seconds": 1.0})

    def prefer(self, number: int, start: HeldOutResult) -> RoundPreferences:
        self.begin(number, f"preferences of {start.model}")
        summary = {
            "rule": "judge",
            "recipe": "0",
            "asked": 10,
            "questions_with_pairs": 5,
            "written": 7,
            "counts": {"equal_pairs": 2},
            "dollars": 0.25,
            "lengths": {},
            "partial_because": "",
        }
        return RoundPreferences(Path("preferences.jsonl"), summary, {"hash": "h", "mlflow_run_id": "r", "seconds": 2.0})

    def tune(self, number: int, start: HeldOutResult, preferences: RoundPreferences) -> Mapping[str, Any]:
        self.begin(number, "tune")
        note = {"bundle": f"model-{number}", "bundle_hash": "b", "data_hash": "d", "mlflow_run_id": "t", "seconds": 3.0}
        return note | {"num_steps": 5}

    def begin(self, number: int, stage: str) -> None:
        self.ran.append(f"{number} {stage}")
        self.fault(number, stage)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    write_colours(tmp_path / "held_out", NUM)
    return tmp_path


def run(
    output: Path, right: Sequence[int], fault: Any = None, **more: Any
) -> tuple[ImprovedRounds, FakeStages, Any, str]:
    stages = FakeStages(loop_config(output, **more), right, *([fault] if fault else []))
    found, failed = ImprovedRounds(), ""
    try:
        run_rounds(stages, found)  # type: ignore[arg-type]
    except DivergedError as error:
        failed = f"{stages.ran[-1]}: {error}"
    summary = summarize_rounds(stages.config, AskedQuestions(10, 0), found, failed)
    write_improvement(stages.config, summary, found, Custom().read(output / "held_out"))
    return found, stages, summary, (output / "report.html").read_text()


def test_each_round_starts_from_the_last_better_model(output: Path) -> None:
    found, stages, summary, page = run(output, [100, 150, 190, 191])
    starts = [one.partition(" of ")[2] for one in stages.ran if "preferences" in one]
    assert starts == ["start", "model-1", "model-2"]
    assert [one.accepted for one in found.rounds] == [True, True, False]
    assert (summary["best"]["round"], summary["best"]["model"]) == (2, "model-2")
    assert summary["gain"]["difference"] == 45.0
    assert summary["dollars"] == 0.75
    assert summary["stopped_because"].startswith("round 3 gained nothing significant (95.00 → 95.50, +0.50 points")
    assert "the gain of +0.50 points is not significant (95 % interval" in page
    assert "Round 1: a significant gain of 25.00 points." in page
    assert page.count("held-out answers that became better") == 1
    assert json.loads((output / "summary.json").read_text()) == summary


@pytest.mark.parametrize(
    ("right", "more", "said", "best"),
    [
        ([100, 101], {}, "round 1 gained nothing significant", 0),
        ([100, 100], {}, "round 1 gained nothing significant", 0),
        ([150, 100], {}, "round 1 is significantly worse", 0),
        ([100, 150], {"improve__rounds": 1}, "all 1 rounds are done", 1),
        ([100, 150], {"improve__min_gain": 30.0}, "round 1 gained 25.00 points, below improve.min_gain = 30", 1),
        ([100, 112], {"improve__significance": 0.5, "improve__rounds": 1}, "all 1 rounds are done", 1),
    ],
)
def test_it_says_why_it_stops(output: Path, right: list[int], more: dict[str, Any], said: str, best: int) -> None:
    found, _, summary, page = run(output, right, **more)
    assert found.stopped.startswith(said)
    assert said in page
    assert summary["best"]["round"] == best
    assert summary["complete"]
    assert ("the first model stays" in page) == (best == 0)
    assert ("its model is not kept" in page or "the round&#39;s model is not kept" in page) == (best == 0)


def test_a_budget_that_ends_between_rounds_is_partial_and_no_pairs_are_an_end(output: Path) -> None:
    def broke(number: int, stage: str) -> None:
        if number == 2:
            raise BudgetError("the next call does not fit")

    found, _, summary, page = run(output, [100, 150], broke)
    assert (found.partial, summary["complete"]) == ("the next call does not fit", False)
    assert "Partial: the next call does not fit" in page
    assert summary["best"]["round"] == 1

    def nothing(number: int, stage: str) -> None:
        if stage.startswith("preferences") and number == 2:
            raise NoPairsError("all answers are equal")

    found, _, summary, _ = run(output, [100, 150], nothing)
    assert summary["complete"]
    assert found.stopped == "round 2 brought no preferences: all answers are equal"
    for error in (BudgetError, NoPairsError):  # in the first round there is nothing yet

        def at_once(number: int, stage: str, error: type[Exception] = error) -> None:
            if number == 1:
                raise error("at once")

        with pytest.raises(error, match="at once"):
            run(output, [100, 150], at_once)


def test_a_tuning_that_diverges_keeps_what_is_finished(output: Path) -> None:
    def diverges(number: int, stage: str) -> None:
        if (number, stage) == (2, "tune"):
            raise DivergedError("the loss of step 3 is nan")

    _, _, summary, page = run(output, [100, 150], diverges)
    assert not summary["complete"]
    assert (summary["best"]["round"], summary["failed"]) == (1, "2 tune: the loss of step 3 is nan")
    assert "Failed: 2 tune: the loss of step 3 is nan." in page


def test_the_level_is_that_of_the_interval(output: Path) -> None:
    stages = FakeStages(loop_config(output), [100, 112])
    old, new = (stages.evaluate(number, "m").read() for number in (0, 1))
    at = {level: measure_gain(new, old, level) for level in (0.01, 0.05, 0.5)}
    widths = [one["confidence_interval"][1] - one["confidence_interval"][0] for one in at.values()]
    assert widths == sorted(widths, reverse=True)
    assert len({one["p_value"] for one in at.values()}) == 1
    for level, one in at.items():
        assert one["significant"] == (one["p_value"] < level)
    same = measure_gain(old, old, 0.05)
    assert (same["significant"], same["p_value"], same["difference"]) == (False, 1.0, 0.0)


@pytest.mark.parametrize(("right", "p_value", "kept"), [(102, 0.5, False), (105, 0.0625, False), (106, 0.03125, True)])
def test_a_gain_of_few_answers_is_judged_by_the_exact_test(
    output: Path, right: int, p_value: float, kept: bool
) -> None:
    stages = FakeStages(loop_config(output), [100, right])
    old, new = stages.evaluate(0, "m").read(), stages.evaluate(1, "m").read()
    texts = {row.id: row.score for row in old.rows}
    wrong = [row.id for row in old.rows if not row.score][: right - 100]
    rows = [replace(row, score=1.0 if row.id in wrong else texts[row.id]) for row in new.rows]
    gain = measure_gain(StoredResult(new.summary, rows), old, 0.05)
    assert (gain["better"], gain["worse"]) == (right - 100, 0)
    assert (gain["p_value"], gain["significant"]) == (pytest.approx(p_value, rel=1e-2), kept)


def test_held_out_questions_that_were_changed_are_no_gain(output: Path) -> None:
    stages = FakeStages(loop_config(output), [100, 150])
    old, new = stages.evaluate(0, "m").read(), stages.evaluate(1, "m").read()
    other = StoredResult({**new.summary, "provenance": {"data_hash": "another"}}, new.rows)
    with pytest.raises(DataError, match=r"held-out questions were changed .*\(data_hash differ\)"):
        measure_gain(other, old, 0.05)


def test_rounds_ask_the_next_questions_with_their_own_seed(tmp_path: Path) -> None:
    assert [find_slice(4, 10, number) for number in range(1, 6)] == [0, 4, 8, 0, 4]
    assert [find_slice(4, 4, number) for number in (1, 2)] == [0, 0]
    assert find_slice(None, 10, 3) == 0
    config = loop_config(tmp_path, preferences__max_questions=4, preferences__models=["other"], preferences__seed=5)
    made = preference_settings(config, 2, 10, "model-1", {"parent_run_id": "p", "tracking_uri": "sqlite:///x"})
    section = made.preferences
    assert (section.skip_questions, section.max_questions, section.seed) == (4, 4, 6)
    assert (section.models, section.version) == (("model-1", "other"), "chat_template")
    assert (section.output, section.ledger) == (f"{tmp_path}/round-2/preferences", f"{tmp_path}/ledger.jsonl")
    tuned = tuning_settings(config, 2, "model-1", {"parent_run_id": "p"})
    assert tuned.data.data_path == f"{tmp_path}/round-2/preferences/preferences.jsonl"
    assert (tuned.data.kind, tuned.train.objective, tuned.train.seed) == ("preferences", "dpo", 43)
    assert (tuned.run.storage_path, tuned.run.name) == (f"{tmp_path}/round-2", "tune")
    assert tuned.tracking.parent_run_id == "p"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"data__data_path": "x.json"}, r"data\.data_path is set by each round"),
        ({"run__name": "x"}, r"run\.name is set by each round"),
        ({"preferences__output": "x"}, r"preferences\.output is set by each round"),
        ({"model__pretrain_mm_mlp_adapter": "x"}, "start from a whole LLaVA"),
        ({"train__objective": "cross_entropy"}, "objective"),
        ({"data__kind": "instruction"}, "data.kind"),
        ({"improve__benchmark": "pope"}, "expected NAME=FOLDER"),
        ({"preferences__num_samples": 1}, "num_samples = 1 with 1 model"),
        ({"preferences__temperature": 0.0}, "temperature = 0"),
        ({"judge__model": ""}, r"needs judge\.model"),
        ({"preferences__data_path": None}, r"give preferences\.benchmark or preferences\.data_path"),
        ({"preferences__rule": "benchmark"}, r"needs preferences\.benchmark"),
    ],
)
def test_settings_that_contradict_the_rounds_are_refused(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        preference_settings(loop_config(tmp_path, **more), 1, 10, "m", {})


def test_a_folder_goes_on_with_the_same_settings_alone(tmp_path: Path) -> None:
    claim_loop(loop_config(tmp_path), tmp_path)
    claim_loop(loop_config(tmp_path, improve__rounds=9, budget__dollars=1.0, judge__timeout_s=9.0), tmp_path)
    with pytest.raises(ConfigError, match=r"other settings \(preference\.beta: 0\.1 -> 0\.5\)"):
        claim_loop(loop_config(tmp_path, preference__beta=0.5), tmp_path)
    (tmp_path / "resolved.json").write_text("{")
    with pytest.raises(ConfigError, match=r"resolved\.json holds no settings"):
        claim_loop(loop_config(tmp_path), tmp_path)


def test_held_out_questions_are_not_asked(tmp_path: Path) -> None:
    held_out, asked = write_colours(tmp_path / "held_out", 3), write_colours(tmp_path / "asked", 6)
    config = loop_config(tmp_path, preferences__data_path=None, preferences__benchmark=f"custom={asked}")
    source = read_prompts_to_answer(config.preferences.replaced({"models": ["m"]}))
    questions = Custom().read(held_out)
    with pytest.raises(DataError, match=r"6 of the 6 questions asked .*\('c0' is held out as 'c0'; .*; …\)"):
        check_apart(config, source, questions)  # other files with the same contents
    other = [row | {"question": "Which other colour?"} for row in map(json.loads, (asked / "questions.jsonl").open())]
    (asked / "questions.jsonl").write_bytes(as_lines(other))
    source = read_prompts_to_answer(config.preferences.replaced({"models": ["m"]}))
    assert check_apart(config, source, questions) == AskedQuestions(6, 0)
    rows = [row | {"image": f"{held_out}/{row['image']}"} for row in other[:3]]
    (asked / "questions.jsonl").write_bytes(as_lines(rows))
    source = read_prompts_to_answer(config.preferences.replaced({"models": ["m"]}))
    assert check_apart(config, source, questions).shared_images == 3
    same = loop_config(tmp_path, preferences__data_path=None, preferences__benchmark=f"custom={tmp_path}/x/../held_out")
    (tmp_path / "x").mkdir()
    with pytest.raises(ConfigError, match="name the same folder"):
        check_apart(same, source, questions)


def test_the_shipped_recipes_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = load_settings(ImproveConfig, ["quickstart"])
    assert (small.train.objective, small.preference.rpo_alpha, small.improve.rounds) == ("dpo", 0.0, 1)
    assert small.preferences.rule == "benchmark"
    start = ["--model.model_name_or_path", "m", "--preferences.data_path", "d.json"]
    large = load_settings(ImproveConfig, ["improve/faithfulness", *start])
    assert (large.preferences.rule, large.improve.rounds, large.budget.dollars) == ("judge", 3, 100.0)
    assert tuning_settings(large, 1, "m", {}).lora.lora_enable


def test_a_judge_that_is_right_by_chance_has_no_favourite_answer() -> None:
    judge = ScriptedJudge({"reliability": 0.8})
    parts = [f"[Assistant {n}]\n{{}}\n\n[End of Assistant {n}]\n\n" for n in (1, 2)]
    shown = f"{parts[0]}{parts[1]}Reference answer: red\n"
    wins = dict.fromkeys((("red", "blue"), ("blue", "red"), ("blue", "green")), 0)
    for number in range(1000):
        for pair in wins:
            text = shown.format(*pair)
            wins[pair] += judge.verdict(text, {"number": number, "text": text}).startswith("9 2")
    assert [round(num / 1000, 1) for num in wins.values()] == [0.8, 0.2, 0.5]

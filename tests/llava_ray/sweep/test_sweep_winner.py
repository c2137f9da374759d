"""What a sweep leaves behind, made of invented trials: the best's model and recipe, the page, the folder."""

import json
import shutil
from pathlib import Path

import fakes
import pytest

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.recipes import load_recipe
from llava_ray.config.space import Space, SweepConfig
from llava_ray.errors import ConfigError
from llava_ray.model.formats.manifest import read_manifest, write_manifest
from llava_ray.report.rendering import render_report
from llava_ray.sweep.folder import open_sweep
from llava_ray.sweep.page import build_sweep_page
from llava_ray.sweep.results import summarize_trials
from llava_ray.sweep.trial import build_trial_config, parse_trial_arguments, read_evaluations
from llava_ray.sweep.trial_events import Screen
from llava_ray.sweep.trials import Evaluation, Trial
from llava_ray.sweep.winner import export_best_model

SPACE = Space.parsed({"dimensions": {"train.learning_rate": {"choice": [1e-3, 1e-2]}}})


def config_of(folder: Path, **changes: object) -> SweepConfig:
    config = SweepConfig.parsed(
        {
            "model": {"model_name_or_path": "m"},
            "data": {"data_path": "d"},
            "held_out": {"path": "h"},
            "run": {"name": "s", "storage_path": str(folder)},
            "sweep": {"method": "grid"},
        }
    )
    return config.replaced(changes)


TRIALS = [
    Trial(
        "a",
        1,
        {"train.learning_rate": 2e-5},
        42,
        "finished",
        "",
        1,
        9.0,
        [Evaluation(4, 0.9, 0.3), Evaluation(8, 0.8, 0.5)],
    ),
    Trial(
        "b",
        2,
        {"train.learning_rate": 1e-3},
        42,
        "finished",
        "",
        1,
        8.0,
        [Evaluation(4, 0.5, 0.6), Evaluation(8, 0.2, 0.9)],
    ),
    Trial("c", 3, {"train.learning_rate": 1e-2}, 42, "stopped", "", 2, 4.0, [Evaluation(4, 2.0, 0.0)]),
]


def test_the_best_is_exported_as_a_bundle_and_a_recipe_that_gives_the_same_run(tmp_path):
    folder = tmp_path / "s"
    (folder / "trials/b/model").mkdir(parents=True)
    base = tmp_path / "parts/language_model"
    manifest = fakes.make_manifest(base)
    write_manifest(folder / "trials/b/model", manifest, folder / "trials/b/model")
    (folder / "best/model").mkdir(parents=True)
    (folder / "best/model/old.txt").write_text("of an earlier start")
    config = config_of(tmp_path)
    common = config.replaced({"run.storage_path": str(folder / "trials"), "tracking.parent_run_id": "p"})
    results = summarize_trials(config, SPACE, TRIALS, 8)
    export_best_model(config, common.base, results.ranking[0], str(folder))
    assert [path.name for path in (folder / "best/model").iterdir()] == ["llava.json"]
    assert read_manifest(folder / "best/model").language_model.base == str(base)
    assert str(tmp_path) not in (folder / "best/model/llava.json").read_text()
    recipe = folder / "best.toml"
    assert "Trial 2 of the sweep s: learning_rate 0.001, seed 42" in recipe.read_text()
    again = load_recipe(FinetuneConfig, [str(recipe)])
    assert again.train.learning_rate == 1e-3
    assert again.run.storage_path == str(tmp_path)
    assert again.run.name not in (None, "s", "b")
    assert again.tracking.parent_run_id is None


def test_the_report_has_everything_that_was_found(tmp_path):
    results = summarize_trials(config_of(tmp_path), SPACE, TRIALS, 8)
    report = json.loads(json.dumps(results.to_dict()))
    assert report["best"]["id"] == "b"
    assert report["beats_default"] is True
    assert report["states"] == {"finished": 2, "stopped": 1}
    assert report["steps_saved"] == pytest.approx(4 / 24, abs=1e-4)
    page = render_report(build_sweep_page("s", results, 21.0))
    assert "beats the recipe&#39;s own settings" in page
    assert "learning_rate" in page
    nothing = summarize_trials(config_of(tmp_path), SPACE, TRIALS[2:], 8)
    assert nothing.to_dict()["best"] is None
    assert "No trial finished." in render_report(build_sweep_page("s", nothing, 21.0))


def test_a_trial_is_the_recipe_with_its_settings_seed_and_name(tmp_path):
    base = config_of(tmp_path).base
    config = build_trial_config(base, {"trial": {"settings": {"train.learning_rate": 1e-3}, "seed": 7}}, "t1")
    assert (config.train.learning_rate, config.train.seed, config.run.name) == (1e-3, 7, "t1")
    assert parse_trial_arguments({"train.learning_rate": 1e-3, "__trial_index__": 2}, 42) == (
        {"train.learning_rate": 1e-3},
        44,
    )


def test_looks_are_read_from_the_runs_own_metrics(tmp_path):
    config = build_trial_config(config_of(tmp_path).base, {}, "t1")
    assert read_evaluations(config, 8) == []
    rows = [{"step": 3, "loss": 1.0, "held_out_loss": 0.5, "held_out_accuracy": 0.25}, {"step": 4, "loss": 1.0}]
    rows += [{"step": 7, "loss": 0.5, "held_out_loss": 0.4}]
    (tmp_path / "t1").mkdir()
    (tmp_path / "t1/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_evaluations(config, 8) == [Evaluation(4, 0.5, 0.25), Evaluation(8, 0.4)]
    assert read_evaluations(config, 4) == [Evaluation(4, 0.5, 0.25)]


def test_a_sweeps_name_belongs_to_its_settings(tmp_path):
    open_sweep(config_of(tmp_path, **{"train.weight_decay": 0.5}), SPACE)  # no trial has started: nothing is lost
    folder = open_sweep(config_of(tmp_path), SPACE)
    Path(folder, "trials.json").write_text("[]")
    assert open_sweep(config_of(tmp_path, **{"sweep.max_concurrent_trials": 3}), SPACE) == folder
    with pytest.raises(ConfigError, match=r"train\.weight_decay: 0\.0 -> 0\.1"):
        open_sweep(config_of(tmp_path, **{"train.weight_decay": 0.1}), SPACE)
    with pytest.raises(ConfigError, match=r"judged_by\.num_answers"):
        open_sweep(config_of(tmp_path, **{"held_out.num_answers": 7}), SPACE)
    other = Space.parsed({"dimensions": {"train.learning_rate": {"choice": [1e-3]}}})
    with pytest.raises(ConfigError, match=r"space\.train\.learning_rate\.choice"):
        open_sweep(config_of(tmp_path), other)
    Path(folder, "trials.json").write_text("[]")
    open_sweep(config_of(tmp_path, **{"run.restart": True}), other)
    assert not Path(folder, "trials.json").exists()
    assert len(list(tmp_path.glob("s.replaced-*"))) == 1


def test_a_sweep_goes_on_in_a_copied_project(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "work/second"
    first.mkdir()

    def there(project: Path, **changes: object) -> SweepConfig:
        monkeypatch.chdir(project)
        paths = {"data.data_path": str(project / "d.json"), "data.image_folder": str(project / "images")}
        return config_of(project, **paths | changes)

    Path(open_sweep(there(first), SPACE), "trials.json").write_text("[]")
    shutil.copytree(first, second)
    assert open_sweep(there(second), SPACE) == str(second / "s")
    with pytest.raises(ConfigError, match=r"\(data.image_folder: '.*images' -> '.*other'\)"):
        open_sweep(there(second, **{"data.image_folder": "other"}), SPACE)


def test_a_terminal_shows_the_table_over_the_last_one_and_a_file_a_line_an_event(monkeypatch, capsys):
    screen = Screen()
    screen.show(TRIALS[1], TRIALS, 8)
    said = capsys.readouterr().out
    assert said == "trial 2 (learning_rate 0.001): 8/8, held-out loss 0.2000, done\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    screen.show(TRIALS[1], TRIALS, 8)
    screen.show(TRIALS[2], TRIALS, 8)
    drawn = capsys.readouterr().out
    assert drawn.count("stopped early") == 2
    assert "\x1b[4A" in drawn

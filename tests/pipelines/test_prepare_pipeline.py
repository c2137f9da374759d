"""pipelines/prepare.py, called as a function: its report, and a recipe made for finetune.py."""

from pathlib import Path

import pytest
from samples import write_samples

from llava_ray.errors import ConfigError
from pipelines.prepare import main

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

RECIPE = """
[model]
model_name_or_path = "anything"
[data]
data_path = "{folder}/data.json"
image_folder = "{folder}/images"
cache_dir = "{folder}/cache"
[train]
learning_rate = 1e-3
"""


def test_report_says_what_and_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_samples(tmp_path, 20)
    (tmp_path / "images" / "0003.jpg").write_text("no image")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(folder=tmp_path))
    prepared = main([str(recipe), "--data.max_rejected", "0.1"])
    report = capsys.readouterr().out
    for line in ["Prepared\n", "samples", "19\n", "1  (5.00%)", "image_unreadable", prepared.path, "rejected.jsonl"]:
        assert line in report
    main(["--data.data_path", prepared.path, "--data.max_rejected", "0.1"])
    assert "Prepared before" in capsys.readouterr().out


def test_unknown_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="image_foldr"):
        main(["--data.data_path", str(tmp_path), "--data.image_foldr", "x"])

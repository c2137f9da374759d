"""export.py as a command."""

import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import fakes
import pytest
from published import make_original, read
from safetensors.torch import load_file, save_file
from samples import write_samples

from llava_ray.errors import ConfigError, ModelError
from llava_ray.model.formats.hub.siglip_form import FeatureDifference, approximate, draw_images
from llava_ray.model.formats.manifest import read_manifest
from llava_ray.model.formats.model_opening import open_model
from pipelines.approximation import Loss, check_difference, measure_loss, read_samples
from pipelines.export import SUBCOMMANDS, main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    fakes.make_language_model(folder / "base")
    fakes.make_vision_tower(folder / "tower")
    make_original(folder / "original", folder / "base", folder / "tower")
    return folder


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    main(
        [
            "bundle",
            str(folder / "original"),
            str(folder / "bundle"),
            "--version",
            "v1",
            "--vision_tower",
            str(folder / "tower"),
        ]
    )
    return folder / "bundle"


def test_layouts_one_after_another(bundle: Path, tmp_path: Path, capsys) -> None:
    main(["hub", str(bundle), str(tmp_path / "hub"), "--vocabulary", "padded"])
    told = capsys.readouterr().out
    assert f"Written to {tmp_path / 'hub'}" in told
    assert "the vocabulary has 320 rows, 300 of them the language model's; <image> is 300" in told
    main(["original", str(tmp_path / "hub"), str(tmp_path / "original")])
    assert read(tmp_path / "original/config.json")["model_type"] == "llava_llama"
    main(["projector", str(tmp_path / "original"), str(tmp_path / "projector")])
    assert sorted(path.name for path in (tmp_path / "projector").iterdir()) == ["config.json", "mm_projector.bin"]
    main(["bundle", str(tmp_path / "original"), str(tmp_path / "bundle"), "--version", "plain"])
    assert read_manifest(tmp_path / "bundle").version == "plain"


def test_deltas(folder: Path, bundle: Path, tmp_path: Path, capsys) -> None:
    main(["make-delta", str(bundle), str(folder / "base"), str(tmp_path / "delta")])
    main(["make-delta", str(bundle), str(tmp_path / "again"), "--model_base", str(folder / "base")])
    assert read(tmp_path / "again/delta.json") == read(tmp_path / "delta/delta.json")
    with pytest.raises(ConfigError, match=rf"takes the model before its base, make-delta {bundle} {folder}/base "):
        main(["make-delta", str(folder / "base"), str(bundle), str(tmp_path / "delta")])
    with pytest.raises(ConfigError, match="make-delta takes MODEL OUTPUT --model_base BASE, or MODEL BASE OUTPUT"):
        main(["make-delta", str(bundle), str(tmp_path / "delta")])
    main(["apply-delta", str(folder / "base"), str(tmp_path / "delta"), str(tmp_path / "result")])
    assert "every tensor is bit for bit that of the model from which the delta was made" in capsys.readouterr().out
    assert read(tmp_path / "result/llava.json") == read(bundle / "llava.json")


def test_a_dinov2_needs_a_word(folder: Path, tmp_path: Path, capsys) -> None:
    from llava_ray.config.model import ModelConfig
    from llava_ray.model.assembly import assemble
    from llava_ray.model.saving import save_bundle

    tower = fakes.make_vision_tower(tmp_path / "dinov2", "dinov2")
    config = ModelConfig(model_name_or_path=str(folder / "base"), vision_tower=str(tower))
    save_bundle(tmp_path / "bundle", assemble(config, "pad"))
    with pytest.raises(ModelError, match="vision tower: vLLM takes CLIP and SigLIP"):
        main(["hub", str(tmp_path / "bundle"), str(tmp_path / "hub")])
    ask = ["hub", str(tmp_path / "bundle"), str(tmp_path / "hub"), "--approximate"]
    main([*ask, "--accept_difference", "1"])
    assert "patch features on 8 images: cosine to DINOv2's" in capsys.readouterr().out
    main(["hub", str(tmp_path / "bundle"), str(tmp_path / "exact"), "--transformers_only"])
    kinds = [read(tmp_path / name / "config.json")["vision_config"]["model_type"] for name in ("hub", "exact")]
    assert kinds == ["siglip_vision_model", "dinov2"]


def test_an_approximation_that_is_far_off_is_refused_with_its_cost(folder: Path, tmp_path: Path, capsys) -> None:
    from llava_ray.config.model import ModelConfig
    from llava_ray.model.assembly import assemble
    from llava_ray.model.saving import save_bundle

    tower = fakes.make_vision_tower(tmp_path / "dinov2", "dinov2", seed=4)
    weights = load_file(tower / "model.safetensors")
    # Patches that live by what the class token tells them, which a SigLIP lacks.
    scales = {"layer_scale1.lambda1": 30.0, "cls_token": 1e4, "query.weight": 8.0, "key.weight": 8.0}
    weights = {
        name: tensor * next((scale for end, scale in scales.items() if name.endswith(end)), 1.0)
        for name, tensor in weights.items()
    }
    save_file(weights, tower / "model.safetensors", metadata={"format": "pt"})
    config = ModelConfig(model_name_or_path=str(folder / "base"), vision_tower=str(tower))
    save_bundle(tmp_path / "bundle", assemble(config, "square"))
    write_samples(tmp_path, 6)
    ask = ["hub", str(tmp_path / "bundle"), str(tmp_path / "hub"), "--approximate"]
    samples = ["--samples", str(tmp_path / "data.json"), "--image_folder", str(tmp_path / "images")]
    with pytest.raises(
        ConfigError, match=r"--transformers_only writes .* accept .*: --accept_difference 0\.\d\d$"
    ) as error:
        main([*ask, *samples, "--max_samples", "5"])
    assert not (tmp_path / "hub").exists()
    said = capsys.readouterr().out
    assert re.search(
        r"answers on 5 samples: 0.0% right with the model's own tower, 0.0% with .* \(\+0.0 points\)", said
    )
    main([*ask, *str(error.value).rpartition("accept_difference)")[2].split()[-2:]])  # as it is proposed
    with pytest.raises(ConfigError, match="belong to --approximate"):
        main(["hub", str(tmp_path / "bundle"), str(tmp_path / "other"), "--accept_difference", "1"])
    with pytest.raises(ConfigError, match="--accept_difference 42: expected one minus a cosine"):
        main([*ask, "--accept_difference", "42"])


@pytest.mark.parametrize(
    ("cosine", "accepted", "is_written"),
    [(0.96, None, True), (0.95, None, True), (0.94, None, False), (0.42, 0.5, False), (0.42, 0.58, True)],
)
def test_what_an_approximation_may_cost(cosine: float, accepted: float | None, is_written: bool) -> None:
    difference = FeatureDifference(8, cosine, cosine, 0.3)
    with nullcontext() if is_written else pytest.raises(ConfigError, match="is not this model's any more"):
        check_difference(difference, accepted)


def test_right_answers_are_counted_with_both_towers(folder: Path, tmp_path: Path, monkeypatch) -> None:
    from llava_ray.config.model import ModelConfig
    from llava_ray.model.assembly import assemble
    from llava_ray.model.saving import save_bundle

    tower = fakes.make_vision_tower(tmp_path / "dinov2", "dinov2", seed=4)
    config = ModelConfig(model_name_or_path=str(folder / "base"), vision_tower=str(tower))
    parts = assemble(config, "square")
    save_bundle(tmp_path / "bundle", parts)
    write_samples(tmp_path, 4)
    near, _ = approximate(open_model(tmp_path / "bundle"), draw_images())
    records = list(read_samples(str(tmp_path / "data.json"), str(tmp_path / "images"), 9))
    answers = [record.turns[1].value for record in records]
    written = iter([answers, [answers[0].upper() + ".", "", "other", answers[3]]])
    monkeypatch.setattr("llava_ray.generate.decoding.generate_batch", lambda *_, **__: [[0]] * 4)
    this: list[str] = []

    def answer_text(*_: object) -> str:
        if not this:
            this.extend(next(written))
        return this.pop(0)

    monkeypatch.setattr("llava_ray.generate.decoding.answer_text", answer_text)
    assert measure_loss(parts, near, records) == Loss(4, 4, 2)


@pytest.mark.slow
def test_a_fault_is_one_line(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "pipelines/export.py"), "hub", str(folder / "base"), str(tmp_path / "hub")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr
    assert f"ModelError: {folder / 'base'} is a plain language model, without" in ran.stderr
    assert not (tmp_path / "hub").exists()


@pytest.mark.slow
def test_help_is_there_without_torch() -> None:
    script = (
        "import sys, contextlib\n"
        "from pipelines.export import main\n"
        f"for name in {json.dumps(list(SUBCOMMANDS))}:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main([name, '--help'])\n"
        "assert not {'torch', 'transformers', 'ray'} & set(sys.modules)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert "MODEL" in ran.stdout

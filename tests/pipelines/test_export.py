"""export.py as a command."""

import json
import subprocess
import sys
from pathlib import Path

import fakes
import pytest
from published import make_original, read

from llava_ray.errors import ModelError
from llava_ray.model.manifest import read_manifest
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
    main(["make-delta", str(folder / "base"), str(bundle), str(tmp_path / "delta")])
    main(["apply-delta", str(folder / "base"), str(tmp_path / "delta"), str(tmp_path / "result")])
    assert "every tensor is, bit for bit" in capsys.readouterr().out
    assert read(tmp_path / "result/llava.json") == read(bundle / "llava.json")


def test_a_dinov2_needs_a_word(folder: Path, tmp_path: Path, capsys) -> None:
    from llava_ray.config.sections import ModelConfig
    from llava_ray.model.bundle import assemble, save_bundle

    tower = fakes.make_vision_tower(tmp_path / "dinov2", "dinov2")
    config = ModelConfig(model_name_or_path=str(folder / "base"), vision_tower=str(tower))
    save_bundle(tmp_path / "bundle", assemble(config, "pad"))
    with pytest.raises(ModelError, match="vision tower: vLLM takes CLIP and SigLIP"):
        main(["hub", str(tmp_path / "bundle"), str(tmp_path / "hub")])
    main(["hub", str(tmp_path / "bundle"), str(tmp_path / "hub"), "--approximate"])
    assert "patch features on 8 images: cosine to DINOv2's" in capsys.readouterr().out
    main(["hub", str(tmp_path / "bundle"), str(tmp_path / "exact"), "--transformers_only"])
    kinds = [read(tmp_path / name / "config.json")["vision_config"]["model_type"] for name in ("hub", "exact")]
    assert kinds == ["siglip_vision_model", "dinov2"]


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

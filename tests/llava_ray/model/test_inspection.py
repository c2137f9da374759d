"""What ``inspect`` tells of a folder, and how fast."""

import json
import subprocess
import sys
import time
from pathlib import Path

import originals
import pytest

from llava_ray.errors import ModelError
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.formats.inspection import InspectedPart, inspect, render_inspection
from llava_ray.model.saving import save_bundle

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def parts(folders) -> LlavaParts:
    return folders.assemble()


def named(inspection, name: str) -> InspectedPart:
    [part] = [part for part in inspection.parts if part.name == name]
    return part


def test_a_whole_original(parts, tmp_path: Path) -> None:
    folder = originals.write_original(tmp_path / "model", parts, ending="bin", num_shards=2, with_tower=True)
    found = inspect(folder)
    language_model, tower = parts.llava.language_model, parts.tower
    assert (found.kind, found.template) == ("original LLaVA", None)
    assert found.settings["image_aspect_ratio"] == "pad"
    assert named(found, "language_model") == InspectedPart(
        "language_model",
        "llama",
        None,
        len(language_model.state_dict()),
        sum(p.numel() for p in language_model.parameters()),
        4 * sum(p.numel() for p in language_model.parameters()),
        ("float32",),
    )
    assert named(found, "vision_tower").num_parameters == sum(t.numel() for t in tower.full_state_dict().values())
    assert named(found, "projector").num_tensors == 4
    assert found.missing == ("its conversation template is not known: give it as --version.",)


def test_a_lora_folder(parts, tmp_path: Path) -> None:
    found = inspect(originals.write_lora(tmp_path / "lora", parts))
    assert [part.name for part in found.parts] == ["vision_tower", "projector", "adapter"]
    assert named(found, "vision_tower").named == "openai/clip-vit-large-patch14-336"
    assert named(found, "adapter").num_tensors == 8
    assert found.missing[0] == "its base is not named: give it as --model_base."


def test_v16(tmp_path: Path) -> None:
    found = inspect(originals.copy_golden("v16_anyres", tmp_path / "v16"))
    assert named(found, "image_newline").num_parameters == 32
    assert found.template == "v1"
    assert found.missing == ()
    assert "  nothing is missing" in render_inspection(found)


@pytest.mark.parametrize("include", ["all", "projector"])
def test_a_bundle(include, parts, tmp_path: Path) -> None:
    save_bundle(tmp_path / "bundle", parts, include=include)
    found = inspect(tmp_path / "bundle")
    assert (found.kind, found.template, found.missing) == ("llava_ray bundle", "v1", ())
    base = None if include == "all" else parts.manifest.language_model.base
    assert named(found, "language_model").named == base
    assert bool(named(found, "language_model").num_tensors) == (include == "all")


def test_what_is_missing_is_told_not_raised(parts, tmp_path: Path) -> None:
    folder = originals.write_original(tmp_path / "model", parts, num_shards=3)
    (folder / "model-00003-of-00003.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    found = inspect(folder)
    assert len(found.missing) == 3
    assert found.missing[0].startswith("shard model-00003-of-00003.safetensors is not there")
    assert render_inspection(found).count("  missing: ") == 3


def test_what_is_damaged_is_raised(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a known kind of model folder"):
        inspect(tmp_path)


def test_the_text_and_the_json_tell_the_same(parts, folders, tmp_path: Path) -> None:
    found = inspect(originals.write_hub(tmp_path / "hub", parts))
    told = json.loads(found.to_json())
    assert told["kind"] == "llava-hf"
    assert [part["name"] for part in told["parts"]] == ["language_model", "vision_tower", "projector"]
    text = render_inspection(found)
    assert "kind" in text
    assert "projector       2,624 parameters in 4 tensors, 0.01 MiB, float32" in text
    assert inspect(folders.tower()).missing == ()


@pytest.mark.slow
def test_a_folder_of_7b_takes_less_than_two_seconds(tmp_path: Path) -> None:
    """Python's own start included; the files hold headers only."""
    folder = originals.write_7b(tmp_path / "7b")
    code = (
        "import sys; from pathlib import Path;"
        "from llava_ray.model.formats.inspection import inspect, render_inspection;"
        "print(render_inspection(inspect(Path(sys.argv[1])))); assert 'torch' not in sys.modules"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, cwd=ROOT, check=True)
    assert time.perf_counter() - start < 2
    assert "6,738,415,616 parameters in 291 tensors, 12.55 GiB, float16" in done.stdout
    assert "projector       20,979,712 parameters" in done.stdout
    assert done.stdout.endswith("nothing is missing\n")

"""What a job or a run sends to a cluster: the code, and little else."""

import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST_BYTES = 20 * 10**6


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive that Ray makes of the working directory."""
    from ray._private.runtime_env.packaging import create_package

    path = tmp_path_factory.mktemp("upload") / "package.zip"
    create_package(str(ROOT), path, include_gitignore=True)
    return path


def test_it_is_small(package: Path) -> None:
    assert package.stat().st_size < MOST_BYTES
    print(f"{package.stat().st_size / 1e6:.1f} MB")


def test_it_holds_the_code_and_neither_results_nor_tests(package: Path) -> None:
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
    for needed in ("llava_ray/runtime.py", "evals/catalogue.py", "pipelines/finetune.py", ".rayignore"):
        assert needed in names
    assert any(name.startswith("pipelines/recipes/") for name in names)
    unwanted = (".git/", ".venv/", "runs/", "tests/", "pipelines/screenshots/")
    assert [name for name in names if name.startswith(unwanted) or name.endswith(".safetensors")] == []

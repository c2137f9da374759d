"""What a job or a run sends to a cluster: the code, and little else."""

import os
import shutil
import zipfile
from pathlib import Path

import pytest

from llava_ray.errors import ConfigError
from llava_ray.uploads import check_upload, measure_upload

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
    unwanted = (".git/", ".venv/", "runs/", "tests/", "docs/")
    assert [name for name in names if name.startswith(unwanted) or name.endswith(".safetensors")] == []
    assert [name for name in names if name.startswith("llava_ray/data/")]


def test_its_size_is_known_beforehand(package: Path) -> None:
    with zipfile.ZipFile(package) as archive:
        assert sum(entry.file_size for entry in archive.infolist()) == check_upload(ROOT)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A clone, in small, with data of one's own in it."""
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, tmp_path)
    files = ["llava_ray/data/records.py", "data/images/1.jpg", "data/mix.json", "photos/2.jpg", "photos/.gitignore"]
    for name in [*files, "photos/raw/3.jpg"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 3_000_000)
    (tmp_path / "photos/.gitignore").write_text("raw/\n")
    return tmp_path


def test_the_users_data_stay_here_and_the_code_called_data_goes(project: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    create_package(str(project), project.parent / "package.zip", include_gitignore=True)
    with zipfile.ZipFile(project.parent / "package.zip") as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    assert names == {".gitignore", ".rayignore", "llava_ray/data/records.py", "photos/2.jpg", "photos/.gitignore"}
    sizes = measure_upload(project)
    assert set(sizes) == {".gitignore", ".rayignore", "llava_ray", "photos"}
    assert sizes["photos"] == 3_000_005


def test_links_to_nothing_and_pipes_are_no_part_of_it(project: Path) -> None:
    before = measure_upload(project)
    (project / "broken").symlink_to(project / "nowhere")
    (project / "loop").symlink_to(project / "loop")
    os.mkfifo(project / "pipe")
    assert measure_upload(project) == before


def test_folders_that_make_an_upload_too_large_are_named(project: Path) -> None:
    with pytest.raises(ConfigError, match=r"with 6 MB, Ray takes 5: photos 3 MB, llava_ray 3 MB. Write /photos/ into"):
        check_upload(project, 5_000_000)

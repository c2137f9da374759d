"""What a run is called and compared by: fingerprints of models and the hash of data, wherever folders lie."""

import json
import shutil
from pathlib import Path

import fakes
import pytest
from samples import small_run

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.recipes import settings_hash
from llava_ray.errors import ConfigError
from llava_ray.model.assembly import assemble
from llava_ray.model.saving import save_bundle
from llava_ray.train.identity import identify_model, identify_run, identity_hash
from llava_ray.train.runs import RunFolder, claim_run, find_run

pytestmark = pytest.mark.slow

DATA = "d" * 64
MODELS = ("language_model", "vision_tower", "bundle")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with data, parts and a bundle."""
    folder = tmp_path_factory.mktemp("project")
    config = small_run(folder, num_samples=1)
    save_bundle(folder / "bundle", assemble(config.model, "square"))
    return folder


@pytest.fixture
def copied(project: Path, tmp_path: Path) -> Path:
    """The same in another folder, with times of its own."""
    return Path(shutil.copytree(project, tmp_path / "copied", copy_function=shutil.copyfile))


def config_in(folder: Path, **changes: object) -> FinetuneConfig:
    """The settings of a run in that project whose name nobody gave, as load_recipe names it."""
    there = {
        "run.storage_path": str(folder / "runs"),
        "run.name": None,
        "model.pretrain_mm_mlp_adapter": str(folder / "bundle"),
    }
    config = small_run(folder).replaced(there | changes)
    return config.replaced({"run.name": f"tune-{settings_hash(config)}"})


def finish(run: RunFolder, data_hash: str = DATA) -> None:
    """Leave what a finished run leaves."""
    Path(run.path).mkdir(parents=True, exist_ok=True)
    Path(run.path, "finished.json").write_text(json.dumps({"data_hash": data_hash}))


def start(config: FinetuneConfig, data_hash: str = DATA) -> RunFolder:
    """Find a run, note its settings, and finish it."""
    identity = identify_run(config, data_hash)
    run = find_run(config, identity)
    claim_run(run, config, identity)
    finish(run, data_hash)
    return run


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_the_same_wherever_it_lies(name, project, copied):
    assert identify_model(str(project / name)) == identify_model(str(copied / name))
    (copied / name / "README.md").write_text("of no account")
    assert identify_model(str(project / name)) == identify_model(str(copied / name))


@pytest.mark.parametrize("file", ["projector.safetensors", "language_model/model.safetensors"])
def test_another_models_identity_is_another(file, copied):
    before = identify_model(str(copied / "bundle"))
    if file == "projector.safetensors":
        content = bytearray((copied / "bundle" / file).read_bytes())
        content[-1] ^= 1
        (copied / "bundle" / file).write_bytes(bytes(content))
    else:  # written anew, as training does
        base = fakes.make_language_model(copied / "other", seed=5)
        model = small_run(copied).model.model_copy(update={"model_name_or_path": str(base)})
        save_bundle(copied / "bundle", assemble(model, "square"))
    assert identify_model(str(copied / "bundle")) != before


def test_hub_ids_stay_and_single_files_count(tmp_path):
    assert identify_model("lmsys/vicuna-7b-v1.5") == "lmsys/vicuna-7b-v1.5"
    (tmp_path / "a.bin").write_bytes(b"one")
    (tmp_path / "b.bin").write_bytes(b"two")
    assert identify_model(str(tmp_path / "a.bin")) != identify_model(str(tmp_path / "b.bin"))


def test_a_run_has_the_same_name_in_a_copied_project_and_another_for_all_that_counts(project, copied):
    names = {find_run(config, identify_run(config, DATA)).name for config in map(config_in, (project, copied))}
    assert len(names) == 1
    config = config_in(copied)
    others = [(config_in(copied, **{"train.seed": 7}), DATA), (config, "e" * 64)]
    others.append((config_in(copied, **{"model.pretrain_mm_mlp_adapter": None}), DATA))
    names |= {find_run(other, identify_run(other, data)).name for other, data in others}
    fakes.make_language_model(copied / "language_model", seed=9)
    names.add(find_run(config, identify_run(config, DATA)).name)
    assert len(names) == 5


def test_settings_that_are_the_default_do_not_count(project):
    config = config_in(project)
    identity = identify_run(config, DATA)
    assert identity_hash(config.replaced({"train.warmup_ratio": 0.03}), identity) == identity_hash(config, identity)


def test_a_finished_run_is_found_in_a_copied_project(project, copied):
    name = {"run.name": "mine"}
    given, unnamed = config_in(project).replaced(name), config_in(project)
    for config in (given, unnamed):
        start(config)
    shutil.copytree(project / "runs", copied / "runs")
    for config in (config_in(copied).replaced(name), config_in(copied)):
        run = find_run(config, identify_run(config, DATA))
        assert run.path.startswith(str(copied))
        assert run.finished(DATA) is not None


@pytest.mark.parametrize("settings_have_come_since", [False, True])
def test_a_run_named_under_the_older_rule_goes_on(settings_have_come_since, project, tmp_path):
    config = config_in(project, **{"run.storage_path": str(tmp_path)})
    noted = config.model_dump(mode="json")
    older = RunFolder(str(tmp_path), str(config.run.name))
    if settings_have_come_since:  # which has changed the hash
        older = RunFolder(str(tmp_path), "tune-01234567")
        del noted["train"]["tf32"]
    finish(older)
    Path(older.path, "resolved.json").write_text(json.dumps(noted))
    assert find_run(config, identify_run(config, DATA)) == older
    other = config_in(project, **{"run.storage_path": str(tmp_path), "train.seed": 3})
    assert find_run(other, identify_run(other, DATA)).name not in (older.name, other.run.name)


def test_another_model_or_other_data_at_the_same_path_are_refused_under_a_given_name(copied):
    config = config_in(copied).replaced({"run.name": "mine"})
    start(config)
    with pytest.raises(
        ConfigError, match=r"data.data_path: '.*json with data dddddddddddd' -> '.* with data eeeeeeeeeeee'"
    ):
        find_run(config, identify_run(config, "e" * 64))
    fakes.make_language_model(copied / "language_model", seed=9)
    with pytest.raises(ConfigError, match=r"model.model_name_or_path: '.*language_model with fingerprint"):
        find_run(config, identify_run(config, DATA))


def test_damaged_settings_of_a_run_are_named(copied):
    config = config_in(copied)
    run = start(config)
    Path(run.path, "resolved.json").write_text("[")
    with pytest.raises(ConfigError, match=r"resolved.json holds no settings.*--run.restart True"):
        find_run(config, identify_run(config, DATA))


def mixed_in(folder: Path, name: str | None = None, **changes: object) -> FinetuneConfig:
    """The settings of a run on a mixture in that project."""
    values = config_in(folder).model_dump()
    source = {"name": "a", "data_path": str(folder / "data.json"), "image_folder": str(folder / "images"), "weight": 1}
    values["data"] |= {"data_path": "", "image_folder": None, "sources": [source | changes]}
    values["run"]["name"] = name
    config = FinetuneConfig.parsed(values)
    return config if name else config.replaced({"run.name": f"tune-{settings_hash(config)}"})


def test_a_mixture_is_found_again_where_its_sources_have_moved(project: Path, copied: Path) -> None:
    names = {folder: start(mixed_in(folder)).name for folder in (project, copied)}
    assert len(set(names.values())) == 1
    assert start(mixed_in(project, held_out="h")).name == names[project]  # only looked at
    assert start(mixed_in(project, weight=2)).name != names[project]
    assert start(mixed_in(project), "e" * 64).name != names[project]


def test_a_mixture_under_a_used_name_says_what_differs(project: Path, copied: Path) -> None:
    start(mixed_in(project, "mixed"))
    moved = mixed_in(copied, "mixed").replaced({"run.storage_path": str(project / "runs")})
    identity = identify_run(moved, DATA)
    assert find_run(moved, identity).name == "mixed"
    with pytest.raises(ConfigError, match=r"data.sources.0.weight: 1.0 -> 2.0"):
        start(mixed_in(project, "mixed", weight=2))
    with pytest.raises(ConfigError, match=r"data.sources: '.*data.json with data dddddddddddd' -> '.* eeeeeeeeeeee'"):
        start(mixed_in(project, "mixed"), "e" * 64)

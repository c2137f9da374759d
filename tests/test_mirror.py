"""Tests mirror the product: a test file's folder is one of the product's, and each module is in a test's reach."""

import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRODUCT = ("llava_ray", "evals", "pipelines")

# Modules that no test imports, nor any module that a test imports: a module → the test that runs it all the same.
RUN_BY = {
    "llava_ray.model.network.transformers_tower": "llava_ray/model/test_vision_tower.py",
    "llava_ray.model.network.tower_protocol": "llava_ray/model/test_vision_tower.py",
    "llava_ray.train.rollouts.actor": "llava_ray/train/test_rollout_runs.py",
    "llava_ray.__main__": "llava_ray/test_command_line.py",
    "evals.comparison": "pipelines/test_evaluate.py",
    "evals.matching.option_texts": "evals/test_letters.py",
    "llava_ray.deployments.watchdog_process": "llava_ray/deployments/test_watchdog.py",
    "llava_ray.generate.builtin.row_attention": "llava_ray/generate/test_engine_contract.py",
    "llava_ray.images.base64_text": "llava_ray/data/test_record_media.py",
    "llava_ray.images.containers.boxes": "llava_ray/images/test_containers.py",
    "llava_ray.model.formats.bundle.names": "llava_ray/model/test_loading.py",
    "llava_ray.model.formats.known_templates": "llava_ray/model/test_layouts.py",
    "llava_ray.model.tensors.tensor_pickle": "llava_ray/model/test_weight_files.py",
    "llava_ray.report.evaluation": "pipelines/test_evaluate.py",
    "pipelines.evaluation_dry_run": "pipelines/test_evaluation_dry_run.py",
    "pipelines.evaluation_run": "pipelines/test_evaluate_run.py",
    "pipelines.quickstart_sweep": "pipelines/test_first_steps.py",
}
MAX_LISTED = 20
THIS = Path(__file__).name
NAME = re.compile(rf"\b(?:{'|'.join(PRODUCT)})(?:\.\w+)+")
IMPORT = re.compile(rf"^\s*from ((?:{'|'.join(PRODUCT)})[\w.]*) import (\([^)]*\)|[^\n]*)", re.MULTILINE)


def find_modules() -> dict[str, Path]:
    """Return the product's modules by name, packages included."""
    found = {}
    for folder in PRODUCT:
        for path in (ROOT / folder).rglob("*.py"):
            module = path.parent if path.name == "__init__.py" else path.with_suffix("")
            found[".".join(module.relative_to(ROOT).parts)] = path
    return found


MODULES = find_modules()


@cache
def named_in(path: Path) -> frozenset[str]:
    """Return the product's modules that a file imports, inside functions too, or names in full."""
    text = path.read_text(encoding="utf-8")
    found = {".".join(name.split(".")[:length]) for name in NAME.findall(text) for length in range(2, 6)}
    for package, names in IMPORT.findall(text):
        found |= {f"{package}.{name}" for name in re.findall(r"\w+", names)}
    return frozenset(found) & MODULES.keys()


def test_every_test_files_folder_is_one_of_the_products():
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    assert [str(folder) for folder in sorted(folders) if not (ROOT / folder).is_dir()] == []


def test_every_module_is_imported_by_a_test_or_one_step_away():
    named = frozenset().union(*(named_in(path) for path in (ROOT / "tests").rglob("*.py") if path.name != THIS))
    reached = named.union(*(named_in(MODULES[name]) for name in named))
    modules = {name for name, path in MODULES.items() if path.name != "__init__.py"}
    assert sorted(modules - reached - RUN_BY.keys()) == [], "test the module, or name the test that runs it"


def test_the_list_of_exceptions_is_short_and_right():
    assert len(RUN_BY) <= MAX_LISTED
    assert RUN_BY.keys() <= MODULES.keys()
    assert [test for test in RUN_BY.values() if not (ROOT / "tests" / test).is_file()] == []

"""Every shipped recipe's dry run works on a fresh clone or says what to run first; the printed next steps are right."""

import re
import shlex
from pathlib import Path

import pytest
from fakes import make_language_model, make_vision_tower
from samples import write_samples

from llava_ray import invocation
from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.model import ModelConfig
from llava_ray.config.recipes import load_recipe
from llava_ray.deployments.chat_page.examples import read_examples
from llava_ray.errors import ConfigError, ModelError
from llava_ray.model.assembly import assemble
from llava_ray.model.saving import save_bundle
from llava_ray.quickstart import easy_vqa
from pipelines import evaluate, finetune, preview, review, sweep
from pipelines.prerequisites import check_prerequisites, find_maker, missing_models
from pipelines.quickstart_results import describe_next_steps, write_examples

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "pipelines/recipes"
RECIPES = sorted(path for stage in ("pretrain", "finetune", "quickstart") for path in (FOLDER / stage).glob("*.toml"))
QUICKSTART = [path for path in RECIPES if path.parent.name == "quickstart"]


@pytest.fixture(autouse=True)
def scripts_of_a_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages name the commands as scripts."""
    monkeypatch.setenv(invocation.STARTED_AS_VARIABLE, invocation.SCRIPT)


def name(path: Path) -> str:
    """Return stage and recipe."""
    return f"{path.parent.name}/{path.stem}"


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the quickstart leaves, of tiny models."""
    folder = tmp_path_factory.mktemp("project")
    cache = folder / "runs/cache/quickstart"
    base, tower = make_language_model(cache / "smollm2-135m-4l"), make_vision_tower(cache / "dinov2-small-8l-56px")
    config = ModelConfig(model_name_or_path=str(base), vision_tower=str(tower), mm_vision_select_layer=-1)
    for bundle in ("words/model", "model"):
        save_bundle(folder / "runs/quickstart" / bundle, assemble(config, "square"))
    write_samples(cache, 8)
    (folder / "pipelines").symlink_to(ROOT / "pipelines")
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_on_a_fresh_clone(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if recipe in QUICKSTART:
        with pytest.raises(ConfigError, match=r"is not there yet: run python pipelines/quickstart.py first") as error:
            finetune.main([str(recipe), "--dry-run"])
        assert "\n" not in str(error.value)
        return
    if "grpo" in recipe.stem or "dpo" in recipe.stem:  # it starts from another recipe's model
        with pytest.raises(
            ConfigError, match=r"run python pipelines/finetune.py \S+/finetune/llava_v1_5_7b.toml first"
        ):
            finetune.main([str(recipe), "--dry-run"])
        return
    finetune.main([str(recipe), "--dry-run"])
    said = capsys.readouterr().out
    first = re.search(r"^First python pipelines/finetune.py (\S+), which makes (\S+)$", said, re.M)
    assert (first is not None) == (recipe.parent.name == "finetune")
    if first:
        made = load_recipe(FinetuneConfig, [str(ROOT / first[1])]).run
        assert f"{made.storage_path}/{made.name}/model" == first[2]
        with pytest.raises(ConfigError, match=r"run python \S+/finetune.py \S+/recipes/pretrain/"):
            finetune.main([str(recipe)])


@pytest.mark.parametrize("recipe", QUICKSTART, ids=name)
def test_after_the_quickstart_on_cpus(recipe, ready, monkeypatch, capsys):
    monkeypatch.chdir(ready)
    finetune.main([str(recipe), "--dry-run", "--cluster.use_gpu", "False"])
    said = capsys.readouterr().out
    assert not re.search("CUDA|NCCL|GPU", said)
    assert re.search(r"this machine, for all +\d+\.\d\d GiB", said)
    starts_whole = recipe.stem in ("grpo", "lora", "qlora", "yours")
    assert (re.search(r"projector .* mlp2x_gelu, runs/quickstart/model$", said, re.M) is not None) == starts_whole
    rows = dict(re.findall(r"^  (\w[\w' ]+?) +(\d+\.\d\d) GiB$", said, re.M))
    assert float(rows.pop("total")) == pytest.approx(sum(map(float, rows.values())), abs=0.05)


def test_other_settings_than_the_bundles_are_refused_as_a_start_does(ready, monkeypatch):
    monkeypatch.chdir(ready)
    with pytest.raises(ModelError, match=r"mm_projector_type is 'linear', but the projector in .* 'mlp2x_gelu'"):
        finetune.main([str(FOLDER / "quickstart/lora.toml"), "--dry-run", "--model.mm_projector_type", "linear"])


def test_the_sweep_says_what_to_run_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags in ([], ["--dry-run"]):
        with pytest.raises(ConfigError, match=r"words-language-model' is not there yet: run .*_sweep.py first"):
            sweep.main([str(FOLDER / "sweep/quickstart.toml"), *flags])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", sorted(FOLDER.glob("[er]*/*.toml")), ids=name)
def test_recipes_that_need_files_of_ones_own_say_so_in_a_line(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = {"evaluate": [evaluate, "run"], "review": [review]}[recipe.parent.name]
    with pytest.raises(ConfigError, match=r"--evaluate.model_path|--review.answers") as error:
        command[0].main([*command[1:], str(recipe), "--dry-run"])  # type: ignore[attr-defined]
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_models_that_no_command_of_ours_makes_are_left_to_others(ready, monkeypatch):
    monkeypatch.chdir(ready)
    assert find_maker("lmsys/vicuna-7b-v1.5") is None
    assert find_maker("runs/another/model") is None
    config = load_recipe(FinetuneConfig, [str(FOLDER / "quickstart/yours.toml")])
    assert missing_models(config) == {}
    check_prerequisites(config, {})


def test_the_next_steps_that_the_quickstart_prints_can_be_typed(ready, monkeypatch, capsys):
    monkeypatch.chdir(ready)
    cache = Path("runs/cache/quickstart")
    data, images = cache / "data.json", cache / "images"
    told = describe_next_steps("sqlite:///x", Path("runs/quickstart"), data, images)
    commands = [shlex.split(line) for line in re.findall(r"\.venv/bin/python (.*)", told.replace("\\\n", " "))]
    scripts = [words[0] for words in commands]
    assert scripts == ["pipelines/preview.py", "pipelines/finetune.py", "pipelines/finetune.py"]
    for script, *arguments in commands:
        if script == "pipelines/preview.py":
            preview.main(arguments)
        else:
            assert Path(arguments[0]).exists()
            finetune.main([*arguments, *([] if "--dry-run" in arguments else ["--dry-run"])])
    said = capsys.readouterr().out
    assert f"Data  {data}, 8 samples" in said
    assert "Model " in said


def test_the_next_steps_name_the_console_script_where_that_was_used(monkeypatch):
    monkeypatch.setenv(invocation.STARTED_AS_VARIABLE, invocation.CONSOLE_SCRIPT)
    told = describe_next_steps("sqlite:///x", Path("runs/quickstart"), Path("data.json"), Path("images"))
    commands = [line.split()[:4] for line in re.findall(r"llava-ray .*", told.replace("\\\n", " "))]
    assert [words[:3] for words in commands[1:]] == [
        ["llava-ray", "finetune", "quickstart/yours"],
        ["llava-ray", "finetune", "pretrain/llava_v1_5_7b"],
    ]
    assert commands[0] == ["llava-ray", "preview", "--model", "runs/quickstart/model"]
    assert not re.search(r"\.venv|\.py|\.toml", told)


def test_the_questions_that_the_page_begins_with_are_the_quickstarts_own(tmp_path):
    asked = easy_vqa.test_questions(100, seed=0)
    write_examples(tmp_path, asked)
    shown = read_examples(str(tmp_path / "examples.json"))
    assert len(shown) == len({question.kind for question in asked})
    assert {row["text"] for row in shown} <= {question.question for question in asked}
    assert all(Path(file).exists() for row in shown for file in row["files"])
    served = re.search(r"^serve:.*\n\t(.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert served[1].endswith("model=runs/quickstart/model page_examples=runs/quickstart/examples.json")

"""A tiny random model answers every benchmark in one job; nothing is asked twice, whatever happens."""

import json
from collections.abc import Callable
from pathlib import Path

import fakes
import pytest
from benchmark_files import WRITERS, write_benchmark

from evals.catalogue import make_benchmark
from llava_ray.config.evaluate import AskConfig, EvaluateConfig
from llava_ray.config.model import ModelConfig
from llava_ray.config.recipes import load_recipe
from llava_ray.errors import ConfigError
from llava_ray.generate.answers import GeneratedAnswer
from llava_ray.model.assembly import assemble
from llava_ray.model.saving import save_bundle
from pipelines.evaluate import main
from pipelines.evaluation_asking import SAME_ANSWERS, as_asked, check_answer_settings, list_benchmarks, save_answers

RECIPES = Path(__file__).resolve().parents[2] / "pipelines/recipes/evaluate"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluated")
    config = ModelConfig(
        model_name_or_path=str(fakes.make_language_model(root / "language_model")),
        vision_tower=str(fakes.make_vision_tower(root / "tower")),
    )
    save_bundle(root / "bundle", assemble(config, "pad"))
    return root / "bundle"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("benchmarks")
    for name in WRITERS:
        write_benchmark(name, root / name)
    return root


Run = Callable[..., list[dict[str, object]]]


@pytest.fixture
def run(bundle: Path, data: Path, tmp_path: Path) -> Run:
    def start(names: list[str], *more: str) -> list[dict[str, object]]:
        benchmarks = [f"{name}={data / name}" for name in names]
        flags = ["--evaluate.model_path", str(bundle), "--evaluate.max_new_tokens", "3", "--evaluate.batch_size", "8"]
        place = ["--run.storage_path", str(tmp_path), "--run.name", "e", "--actors.cpus_per_actor", "0.5"]
        found = main(["run", *flags, *place, "--actors.num_actors", "1", *more, "--evaluate.benchmarks", *benchmarks])
        assert isinstance(found, list)
        return found

    return start


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_all_benchmarks_in_one_job(run: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summaries = run(list(WRITERS))
    assert [summary["benchmark"] for summary in summaries] == list(WRITERS)
    for summary in summaries:
        name = str(summary["benchmark"])
        questions = make_benchmark(name).read(data / name)
        rows = [json.loads(line) for line in lines(tmp_path / "e" / name / "answers.jsonl")]
        assert [row["question_id"] for row in rows] == [question.id for question in questions]
        assert rows[0].keys() == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
        assert summary["missing"] == 0
        made = summary["provenance"]
        assert isinstance(made, dict)
        assert made.keys() >= {"profile", "prompt", "template", "generation", "model_hash", "torch", "transformers"}
    assert "withheld" in next(summary for summary in summaries if summary["benchmark"] == "mm_vet")
    assert (tmp_path / "e" / "mm_vet" / "submission" / "mm_vet_upload.json").exists()
    assert (tmp_path / "e" / "report.html").exists()
    heard = capsys.readouterr().out
    assert "gqa 4/4" in heard

    # Half of a benchmark's answers and half a line are gone: only those are asked again, and the file is the same.
    file = tmp_path / "e" / "mme" / "answers.jsonl"
    whole = file.read_bytes()
    kept = whole.split(b"\n")[:9]
    file.write_bytes(b"\n".join(kept) + b"\n" + kept[0][:20])
    again = run(list(WRITERS))
    assert file.read_bytes() == whole
    assert again == summaries
    # Nothing is asked at all: no cluster is needed, the rule may change.
    other = run(["gqa"], "--score.profile", "llava")
    assert (other[0]["profile"], other[0]["num_scored"]) == ("llava", 4)


@pytest.mark.ray
@pytest.mark.verify
@pytest.mark.usefixtures("ray_cluster")
def test_options_are_ranked_and_other_questions_asked(run: Run, data: Path, tmp_path: Path) -> None:
    summaries = run(["ai2d", "gqa"], "--evaluate.ranking", "text")
    questions = make_benchmark("ai2d").read(data / "ai2d")
    rows = [json.loads(line) for line in lines(tmp_path / "e" / "ai2d" / "answers.jsonl")]
    for question, row in zip(questions, rows, strict=True):
        weights = row["metadata"]["mean_log_likelihoods"]
        assert len(weights) == len(question.options)
        assert all(weight < 0 for weight in weights)
        assert row["text"] == "ABCDEFGH"[weights.index(max(weights))]
    assert summaries[0]["unparsed"] == 0
    assert "likeliest text" in str(summaries[0]["provenance"])
    written = [json.loads(line) for line in lines(tmp_path / "e" / "gqa" / "answers.jsonl")]
    assert all(row["metadata"] == {} for row in written)


def test_what_is_likeliest_is_kept_as_a_letter(data: Path, tmp_path: Path) -> None:
    config = AskConfig(model_path="m", benchmarks=(f"ai2d={data / 'ai2d'}",), ranking="text")
    [asked] = list_benchmarks(config, tmp_path)
    question = asked.questions[0]
    assert list(as_asked(asked, question, "text").candidates) == list(question.options)
    assert list(as_asked(asked, question, "letter").candidates) == ["A", "B", "C", "D"][: len(question.options)]
    assert not as_asked(asked, question).candidates
    likelihoods = tuple((-9.0 + place, 2) for place in range(len(question.options)))
    with asked.file:
        save_answers([GeneratedAnswer(asked.key(question.id), "", likelihoods)], [asked], "m")
        row = asked.file.rows[question.id]
    assert row["text"] == "ABCDEFGH"[len(question.options) - 1]
    assert row["metadata"]["mean_log_likelihoods"][0] == -4.5


def test_ranking_without_options_is_refused(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.ranking needs questions with options, and gqa has none"):
        run(["gqa"], "--evaluate.ranking", "letter")


def test_answers_of_other_settings_are_not_mixed(run: Run, tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "e" / "gqa"
    folder.mkdir(parents=True)
    questions = make_benchmark("gqa").read(data / "gqa")
    done = [{"question_id": question.id, "text": "yes"} for question in questions]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in done))
    assert run(["gqa"])[0]["score"] == 50
    with pytest.raises(ConfigError, match=r"made with another generation: choose another --run\.name, or"):
        run(["gqa"], "--evaluate.temperature", "0.5")
    (tmp_path / "recipe.toml").write_text('[evaluate]\nmodel_path = "x"\nbenchmarks = ["gqa"]\n')
    with pytest.raises(ConfigError, match="expected NAME=FOLDER"):
        main(["run", str(tmp_path / "recipe.toml")])


def test_two_runs_do_not_write_one_file(run: Run, tmp_path: Path) -> None:
    from llava_ray.generate.answers_file import AnswersFile

    with AnswersFile(tmp_path / "e" / "gqa" / "answers.jsonl") as file:
        file.append([{"question_id": 1, "text": "a"}, {"question_id": 2, "text": "b"}])
        file.append([{"question_id": 2, "text": "other"}])
        with pytest.raises(ConfigError, match="another run is writing"):
            run(["gqa"])
        file.arrange(["2"])  # of a run that asked for less
    assert [json.loads(line)["text"] for line in lines(tmp_path / "e" / "gqa" / "answers.jsonl")] == ["b", "a"]


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_load_and_name_benchmarks_that_there_are(recipe: Path) -> None:
    config = load_recipe(EvaluateConfig, [str(recipe), "--evaluate.model_path", "model"])
    assert config.score.profile == "llava"
    for entry in config.evaluate.benchmarks:
        make_benchmark(entry.partition("=")[0])


def test_the_rule_and_the_actors_do_not_make_another_run() -> None:
    base = ["--evaluate.model_path", "m", "--evaluate.benchmarks", "gqa=d"]
    names = {
        load_recipe(EvaluateConfig, [*base, *more]).run.name
        for more in ([], ["--score.profile", "llava"], ["--actors.num_actors", "3"], ["--cluster.num_workers", "2"])
    }
    assert len(names) == 1
    assert load_recipe(EvaluateConfig, [*base, "--evaluate.temperature", "1"]).run.name not in names


def test_a_run_without_an_answer_claims_no_settings(tmp_path: Path) -> None:
    made = dict.fromkeys(SAME_ANSWERS, "one")
    check_answer_settings(tmp_path / "provenance.json", made, has_answers=False)
    check_answer_settings(tmp_path / "provenance.json", made | {"model_hash": "two"}, has_answers=False)
    with pytest.raises(ConfigError, match="made with another model_hash"):
        check_answer_settings(tmp_path / "provenance.json", made, has_answers=True)

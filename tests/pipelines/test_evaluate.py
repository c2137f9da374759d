"""Answers go through score, report and submission in every benchmark's official format, without torch and Ray."""

import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import WRITERS, write_benchmark

from evals.benchmark import Benchmark, Question
from evals.catalogue import BENCHMARKS, make_benchmark
from llava_ray.errors import ConfigError, DataError
from pipelines.evaluate import main
from pipelines.evaluation_results import ScoreRequest, score_answers_file

pytestmark = pytest.mark.slow

PERFECT = {"mme": 600.0, "llava_bench": 100 * 9 / 8, "ocrbench": 4.0, "mmhal_bench": 6.0}
SUBMISSIONS = {
    "vqav2": "vqav2_upload.json",
    "gqa": "testdev_balanced_predictions.json",
    "vizwiz": "vizwiz_upload.json",
    "science_qa": "scienceqa_results.json",
    "mme": "mme/artwork.txt",
    "mmbench": "mmbench_dev_20230712.xlsx",
    "mmbench_cn": "mmbench_dev_cn_20231003.xlsx",
    "seed_bench": "seed_bench_upload.jsonl",
    "mm_vet": "mm_vet_upload.json",
    "mmmu": "mmmu_upload.json",
    "docvqa": "docvqa_upload.json",
    "hallusion_bench": "HallusionBench_result.json",
    "mmbench_v11": "MMBench_DEV_EN_V11.xlsx",
    "mmbench_v11_cn": "MMBench_DEV_CN_V11.xlsx",
    "mmstar": "MMStar.xlsx",
    "mmmu_pro": "llava_ray_standard_direct.jsonl",
    "mmmu_pro_4": "llava_ray_standard_direct.jsonl",
    "mmmu_pro_vision": "llava_ray_vision_direct.jsonl",
    "mathvista": "output_testmini.json",
    "ocrbench": "OCRBench_result.json",
    "blink": "blink_val_predictions.json",
    "chair": "chair_captions.json",
    "amber_generative": "amber_generative.json",
    "amber_discriminative": "amber_discriminative.json",
    "mmhal_bench": "mmhal_responses.json",
    "object_halbench": "obj_halbench_answer.jsonl",
}
REVIEWS = {"hallusion_bench": "correct", "llava_bench": "8 9\nBoth are fine.", "mm_vet": "1.0", "mathvista": "(C)"}
REVIEWS |= {"mmhal_bench": "Rating: 6", "object_halbench": '["dog"]'}
NEEDS_TOOLS = {"amber_generative", "object_halbench"}
"""Benchmarks whose authors' rule needs language tools that are not installed here."""


def read(name: str, folder: Path) -> tuple[Benchmark, list[Question]]:
    benchmark = make_benchmark(name)
    return benchmark, benchmark.read(folder)


def write_answers(file: Path, answers: dict[str, str]) -> Path:
    file.write_text("".join(json.dumps({"question_id": i, "text": text}) + "\n" for i, text in answers.items()))
    return file


def truths(questions: list[Question]) -> dict[str, str]:
    return {question.id: question.truths[0] for question in questions}


def score(name: str, folder: Path, answers: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    capsys.readouterr()
    reviews = folder / "reviews.jsonl"
    extra = ["--reviews", str(reviews)] if reviews.exists() else []
    main(["score", "--benchmark", name, "--data", str(folder), "--answers", str(answers), "--json", *extra, *more])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return dict(json.loads(out))


def put_reviews(name: str, folder: Path, questions: list[Question]) -> None:
    if name in REVIEWS:
        rows = [{"question_id": question.id, "content": REVIEWS[name]} for question in questions]
        (folder / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_official_format_goes_through(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_benchmark(name, tmp_path / name)
    benchmark, questions = read(name, folder)
    put_reviews(name, folder, questions)
    assert all(image.exists() for question in questions for image in question.images if isinstance(image, Path))
    assert all(question.prompt.count("<image>") in (0, len(question.images)) for question in questions)
    right = truths(questions)
    answers = write_answers(tmp_path / "answers.jsonl", right)
    out = tmp_path / "out"

    found = score(name, folder, answers, capsys, "--profile", "robust", "--output", str(out))
    assert found["score"] == pytest.approx(PERFECT.get(name, 100.0))
    assert (found["num_scored"], found["num_questions"]) == (len(questions), len(questions))
    assert (found["missing"], found["duplicate"], found["extra"], found["unparsed"], found["failed"]) == (0, 0, 0, 0, 0)
    assert found["provenance"].keys() >= {"profile", "prompt", "prompt_hash", "data_hash", "llava_ray"}
    assert json.loads((out / "result.json").read_text())["score"] == found["score"]
    page = (out / "report.html").read_text()
    assert benchmark.title in page
    assert benchmark.metric in (out / "report.md").read_text()
    written = {str(file.relative_to(out / "submission")) for file in out.glob("submission/**/*") if file.is_file()}
    assert SUBMISSIONS.get(name) in (written or {None})

    for profile in ("llava", "official"):
        if name in NEEDS_TOOLS:
            with pytest.raises(DataError, match=r"authors' own rule needs .*pip install .*--profile robust"):
                score(name, folder, answers, capsys, "--profile", profile)
            continue
        other = score(name, folder, answers, capsys, "--profile", profile)
        assert (other["num_scored"], other["missing"], other["provenance"]["profile"]) == (len(questions), 0, profile)

    # One answer is wrong, and moves its own row only.
    first = questions[0].id
    write_answers(answers, right | {first: "zebra"})
    (folder / "reviews.jsonl").unlink(missing_ok=True)
    put_reviews(name, folder, questions[1:])
    worse = score(name, folder, answers, capsys, "--output", str(out))
    changed = [
        row for row in map(json.loads, (out / "grades.jsonl").read_text().splitlines()) if row["score"] not in (1, 0.9)
    ]
    assert [row["id"] for row in changed] == [first]
    assert worse["score"] is None or worse["score"] < found["score"]
    assert "zebra" in (out / "report.html").read_text()
    assert "data:image/jpeg" in (out / "report.html").read_text() or not questions[0].images


@pytest.mark.parametrize(
    "name", ["pope", "mmbench", "textvqa", "mme", "science_qa", "mmbench_v11", "mmstar", "mmmu_pro", "ocrbench"]
)
def test_shuffled_doubled_and_foreign_answers_change_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_benchmark(name, tmp_path / name)
    _, questions = read(name, folder)
    said = truths(questions) | {questions[1].id: "zebra"}
    plain = score(name, folder, write_answers(tmp_path / "plain.jsonl", said), capsys, "--profile", "llava")
    lines = (tmp_path / "plain.jsonl").read_text().splitlines()
    mixed = [*lines, *lines[:2], json.dumps({"question_id": "nobody", "text": "yes"})]
    random.Random(0).shuffle(mixed)
    (tmp_path / "mixed.jsonl").write_text("\n".join(mixed) + "\n")
    again = score(name, folder, tmp_path / "mixed.jsonl", capsys, "--profile", "llava")
    assert (again["duplicate"], again["conflicting"], again["extra"], again["missing"]) == (2, 0, 1, 0)
    for key in ("score", "categories", "figures", "confidence_interval", "num_scored"):
        assert again[key] == plain[key]
    assert plain["score"] is not None


def test_no_headline_past_two_per_cent_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"id": f"q{i:03d}", "question": "?", "answer": "yes", "category": "odd" if i % 2 else "even"}
        for i in range(100)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = {row["id"]: "yes" for row in rows}
    answers = tmp_path.parent / f"{tmp_path.name}_answers.jsonl"
    write_answers(answers, {name: text for name, text in said.items() if name not in ("q000", "q001")})
    kept = score("custom", tmp_path, answers, capsys)
    assert (kept["score"], kept["missing"], kept["num_scored"], kept["ids"]["missing"]) == (98, 2, 98, ["q000", "q001"])
    write_answers(answers, {name: text for name, text in said.items() if name not in ("q000", "q001", "q002")})
    main(
        [
            "score",
            "--benchmark",
            "custom",
            "--data",
            str(tmp_path),
            "--answers",
            str(answers),
            "--output",
            str(tmp_path / "out"),
        ]
    )
    heard = capsys.readouterr()
    assert "withheld" in heard.out
    assert "97" not in heard.out.replace("num_scored     97", "")
    assert "3 of 100 questions have no score" in heard.err
    gone = score("custom", tmp_path, answers, capsys)
    assert (gone["score"], gone["computed_score"], gone["missing"]) == (None, 97, 3)
    assert (gone["categories"]["odd"]["score"], gone["categories"]["odd"]["num"]) == (98, 50)
    report = (tmp_path / "out" / "report.html").read_text()
    assert "withheld" in report
    assert "3 of 100 questions have no score" in report


def test_llava_answers_are_understood_by_image_and_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = "\nAnswer the question using a single word or phrase."
    folder = write_benchmark("textvqa", tmp_path / "textvqa")
    _, questions = read("textvqa", folder)
    rows = [{"question_id": q.cluster, "prompt": q.prompt, "text": q.truths[0], "model_id": "llava"} for q in questions]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    assert score("textvqa", folder, file, capsys, "--profile", "llava")["score"] == 100

    folder = write_benchmark("mme", tmp_path / "mme")
    _, questions = read("mme", folder)
    rows = [
        {"question_id": f"{q.categories[0]}/{q.facts['image']}", "prompt": q.prompt, "text": q.truths[0]}
        for q in questions
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    assert score("mme", folder, file, capsys, "--profile", "llava")["score"] == 600

    folder = write_benchmark("pope", tmp_path / "pope")
    asked = [(s, i) for s in ("random", "adversarial", "popular") for i in range(4)]
    rows = [
        {
            "question_id": n,
            "image": f"COCO_val2014_{i // 2:012d}.jpg",
            "text": f"Is there a {s} thing {i} in the image?{short}",
            "category": s,
        }
        for n, (s, i) in enumerate(asked)
    ]
    (folder / "llava_pope_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = [{"question_id": n, "prompt": "…", "text": "No" if i % 2 else "Yes"} for n, (_, i) in enumerate(asked)]
    del said[5]  # by line, all that follow would move
    file.write_text("".join(json.dumps(row) + "\n" for row in said))
    found = score("pope", folder, file, capsys, "--profile", "llava")
    assert (found["missing"], found["extra"], found["score"]) == (1, 0, None)
    assert found["categories"]["popular"]["score"] == found["categories"]["random"]["score"] == 100

    folder = write_benchmark("mm_vet", tmp_path / "mm_vet")
    put_reviews("mm_vet", folder, read("mm_vet", folder)[1])
    write_answers(file, {"0": "a", "1": "b"})
    assert score("mm_vet", folder, file, capsys, "--profile", "llava")["num_scored"] == 2


def test_ids_that_mean_several_questions_are_no_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_benchmark("pope", tmp_path / "pope")
    found = score("pope", folder, write_answers(tmp_path / "a.jsonl", {"1": "yes"}), capsys)
    assert (found["extra"], found["missing"], found["score"]) == (1, 12, None)
    for split in ("popular", "random"):
        (folder / f"coco_pope_{split}.json").unlink()
    found = score("pope", folder, write_answers(tmp_path / "a.jsonl", {str(i): "yes" for i in range(1, 5)}), capsys)
    assert (found["extra"], found["missing"]) == (0, 0)
    assert found["score"] == pytest.approx(66.67, abs=0.01)


def test_questions_without_answers_give_a_submission_and_no_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_benchmark("vqav2", tmp_path / "vqav2")
    (folder / "v2_mscoco_val2014_annotations.json").unlink()
    asked = (folder / "v2_OpenEnded_mscoco_val2014_questions.json").rename(
        folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json"
    )
    every = {"questions": [{"image_id": 1, "question": "?", "question_id": n} for n in range(88, 96)]}
    (folder / "v2_OpenEnded_mscoco_test2015_questions.json").write_text(json.dumps(every))
    assert asked.exists()
    answers = write_answers(tmp_path / "answers.jsonl", {"90": "Two dogs.", "91": "The red one"})
    found = score("vqav2", folder, answers, capsys, "--output", str(tmp_path / "out"))
    assert (found["score"], found["missing"], found["num_questions"]) == (None, 2, 4)
    assert "a server scores" in found["withheld"]
    upload = json.loads((tmp_path / "out" / "submission" / "vqav2_upload.json").read_text())
    assert [row["question_id"] for row in upload] == list(range(88, 96))
    assert {row["question_id"]: row["answer"] for row in upload if row["answer"]} == {90: "2 dogs", 91: "red 1"}


def test_the_spreadsheet_holds_every_row_and_its_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_benchmark("mmbench", tmp_path / "mmbench")
    _, questions = read("mmbench", folder)
    answers = write_answers(tmp_path / "answers.jsonl", {q.id: f"<{q.truths[0]}>" for q in questions})
    score("mmbench", folder, answers, capsys, "--output", str(tmp_path / "out"))
    with zipfile.ZipFile(tmp_path / "out" / "submission" / "mmbench_dev_20230712.xlsx") as book:
        sheet = book.read("xl/worksheets/sheet1.xml").decode()
    assert sheet.count("<row>") == 8
    assert "&lt;C&gt;" in sheet
    header = sheet.split("</row>")[0]
    order = [
        header.index(f">{name}<") for name in ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    ]
    assert order == sorted(order)


def test_two_results_are_compared_question_by_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": f"q{i}", "question": "?", "answer": "yes"} for i in range(8)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, bits in (("one", "11011011"), ("two", "10010010")):
        said = {f"q{i}": "yes" if bit == "1" else "no" for i, bit in enumerate(bits)}
        answers = write_answers(tmp_path / f"{name}.answers", said)
        score("custom", tmp_path, answers, capsys, "--output", str(tmp_path / name))
    main(["compare", str(tmp_path / "one"), str(tmp_path / "two"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["difference"], found["standard_error"]) == (37.5, pytest.approx(18.298, abs=1e-3))
    assert (found["num_compared"], found["better"], found["worse"], found["significant"]) == (8, 3, 0, True)
    main(["compare", str(tmp_path / "two"), str(tmp_path / "one")])
    assert "A - B = -37.50, 95 % interval -73.36 to -1.64" in capsys.readouterr().out

    score("custom", tmp_path, answers, capsys, "--output", str(tmp_path / "llava"), "--profile", "llava")
    with pytest.raises(ConfigError, match="differ in their profile"):
        main(["compare", str(tmp_path / "one"), str(tmp_path / "llava")])
    with pytest.raises(DataError, match=r"has no result\.json"):
        main(["compare", str(tmp_path), str(tmp_path / "one")])


def test_a_headline_that_is_no_mean_is_compared_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_benchmark("pope", tmp_path / "pope")
    _, questions = read("pope", folder)
    right = truths(questions)
    for name, said in (("one", right), ("two", right | {questions[0].id: "no"})):
        answers = write_answers(tmp_path / f"{name}.jsonl", said)
        score("pope", folder, answers, capsys, "--output", str(tmp_path / name))
    main(["compare", str(tmp_path / "one"), str(tmp_path / "two"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["difference"] == pytest.approx((100 - 200 / 3) / 3, abs=1e-3)
    assert found["standard_error"] > 0


@pytest.mark.parametrize("name", sorted(NEEDS_TOOLS))
def test_a_run_without_the_authors_tools_ends_with_the_reason(name: str, tmp_path: Path) -> None:
    folder = write_benchmark(name, tmp_path / name)
    answers = write_answers(tmp_path / "answers.jsonl", truths(read(name, folder)[1]))
    scored = score_answers_file(ScoreRequest(name, folder, answers, "official"), without_judge=True)
    assert (scored.result, scored.summary["score"]) == (None, None)
    assert "needs nltk, which is not installed here: pip install nltk" in scored.summary["withheld"]


def test_scores_are_kept_in_mlflow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow import MlflowClient

    folder = write_benchmark("gqa", tmp_path / "gqa")
    answers = write_answers(tmp_path / "a.jsonl", truths(read("gqa", folder)[1]))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    score("gqa", folder, answers, capsys, "--output", str(tmp_path / "out"), "--tracking_uri", uri)
    client = MlflowClient(uri)
    [run] = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.data.metrics["gqa/robust/score"] == 100
    assert run.data.params["gqa.profile"] == "robust"
    assert any(file.path.endswith("report.html") for file in client.list_artifacts(run.info.run_id, "evaluation"))


def test_faults_say_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = write_answers(tmp_path / "a.jsonl", {"1": "yes"})
    with pytest.raises(ConfigError, match="no benchmark 'imagenet'"):
        score("imagenet", tmp_path, answers, capsys)
    with pytest.raises(DataError, match="there is no folder"):
        score("gqa", tmp_path / "nowhere", answers, capsys)
    with pytest.raises(DataError, match=r"has no testdev_balanced_questions\.json.*see evals/README.md"):
        score("gqa", tmp_path, answers, capsys)
    folder = write_benchmark("llava_bench", tmp_path / "llava_bench")
    with pytest.raises(DataError, match="needs a judge: provide its reviews with --reviews"):
        score("llava_bench", folder, write_answers(answers, {"0": "x"}), capsys)
    (tmp_path / "bad.jsonl").write_text('{"question_id": 1, "text": "x"}\n{broken\n')
    with pytest.raises(DataError, match=r"bad.jsonl, line 2 is not JSON"):
        score("llava_bench", folder, tmp_path / "bad.jsonl", capsys)
    (tmp_path / "bad.jsonl").write_text('{"q": 1}\n')
    with pytest.raises(DataError, match="a row has q; expected question_id and text"):
        score("llava_bench", folder, tmp_path / "bad.jsonl", capsys)
    folder = write_benchmark("mme", tmp_path / "mme")
    text = next(folder.glob("**/0000.txt"))
    text.write_text(text.read_text() * 2)
    with pytest.raises(DataError, match="has 4 lines; expected two"):
        score("mme", folder, answers, capsys)


def test_scoring_loads_neither_torch_nor_ray(tmp_path: Path) -> None:
    folder = write_benchmark("mmmu", tmp_path / "mmmu")
    answers = write_answers(tmp_path / "a.jsonl", truths(read("mmmu", folder)[1]))
    code = (
        "import sys; from pipelines.evaluate import main; main(sys.argv[1:]);"
        "bad = {'torch', 'ray', 'transformers', 'mlflow'} & set(sys.modules); sys.exit(f'loaded {bad}' if bad else 0)"
    )
    arguments = [
        "score",
        "--benchmark",
        "mmmu",
        "--profile",
        "official",
        "--data",
        str(folder),
        "--answers",
        str(answers),
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--json", "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["score"] == 100


@pytest.mark.parametrize("name", BENCHMARKS)
def test_half_a_character_in_an_answer_stops_no_submission(name: str, tmp_path: Path) -> None:
    benchmark, questions = read(name, write_benchmark(name, tmp_path))
    files = benchmark.submit(questions, {question.id: "x\ud800" for question in questions})
    assert all(content.decode() for file, content in files.items() if not file.endswith(".xlsx"))


def test_every_benchmark_has_a_tiny_folder() -> None:
    assert WRITERS.keys() == BENCHMARKS.keys()

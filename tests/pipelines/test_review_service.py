"""Our own service as judge, through the OpenAI API: an engine that echoes, and real models."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fakes
import openai
import pytest
from commands import free_port
from pictures import picture
from review_files import write_lines
from serving import asking, data_uri

from llava_ray.config.model import ModelConfig
from llava_ray.model.assembly import assemble
from llava_ray.model.saving import save_bundle
from pipelines.review import main
from pipelines.review_run import Outcome

QUICKSTART = Path(__file__).resolve().parents[2] / "runs/quickstart/model"
COLOURS = ("red", "green", "blue", "yellow")

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@contextmanager
def service(settings: dict[str, str]) -> Iterator[str]:
    """The API on Ray Serve; yields its address."""
    from ray import serve

    from llava_ray.deployments import api

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(api({"num_cpus": "0.1", "max_ingress_replicas": "1", **settings}), name="judges", route_prefix="/")
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        serve.shutdown()


def make_bundle(folder: Path) -> Path:
    """The quickstart's model where it is there, a random one otherwise."""
    if QUICKSTART.exists():
        return QUICKSTART
    config = ModelConfig(
        model_name_or_path=str(fakes.make_language_model(folder / "language_model")),
        vision_tower=str(fakes.make_vision_tower(folder / "tower")),
    )
    save_bundle(folder / "bundle", assemble(config, "pad"))
    return folder / "bundle"


def write_questions(folder: Path, answer: Callable[[str], str]) -> list[str]:
    """Questions about images of one colour, with answers; the flags that name them."""
    (folder / "images").mkdir()
    questions, answers = [], []
    for colour in COLOURS:
        (folder / "images" / f"{colour}.png").write_bytes(picture(colour=colour))
        questions.append(
            {"question_id": colour, "image": f"{colour}.png", "text": "What colour is it?", "category": "conv"}
        )
        answers.append({"question_id": colour, "text": answer(colour), "model_id": "ours"})
    references = [{"question_id": colour, "text": f"It is {colour}."} for colour in COLOURS]
    named = {"questions": questions, "references": references, "answers": answers}
    files = [(f"--{name}", str(write_lines(folder / f"{name}.jsonl", rows))) for name, rows in named.items()]
    return [
        *(part for pair in files for part in pair),
        "--image_folder",
        str(folder / "images"),
        "--output",
        str(folder / "out"),
    ]


def test_an_echo_judges(tmp_path: Path) -> None:
    """It says the request's own words; the only score in them is the rubric's."""
    rubric = tmp_path / "rubric.toml"
    rubric.write_text('[prompts]\ndefault = "Score: 7"\n')
    files = write_questions(tmp_path, lambda colour: f"It is {colour}.")
    with service({"model": "judge@echo", "engine": "serving:make_engine"}) as address:
        whose = ["--judge.model", "judge", "--judge.base_url", address, "--mode", "single", "--rubric", str(rubric)]
        outcome = main([*files, *whose])
    assert isinstance(outcome, Outcome)
    (found,) = outcome.report["results"]
    assert outcome.complete
    assert (found["score"], found["done"]) == (7.0, 4)
    assert outcome.report["cost"]["prompt_tokens"] > 0


@pytest.mark.verify
def test_one_real_model_judges_another(tmp_path: Path) -> None:
    """The quickstart's model where it is there, answers about images; a second served one reviews the answers."""
    bundle = make_bundle(tmp_path)
    with service({"model": f"ours@{bundle},judge@{bundle}"}) as address:
        client = openai.OpenAI(base_url=address, api_key="none", timeout=120)

        def answer(colour: str) -> str:
            asked = asking("What colour is it?", data_uri(picture(colour=colour)), max_tokens=16, temperature=0)
            return (
                client.chat.completions.create(**{**asked, "model": "ours"}).choices[0].message.content or "(nothing)"
            )

        files = write_questions(tmp_path, answer)
        whose = ["--judge.model", "judge", "--judge.base_url", address, "--judge.sees_images", "True"]
        outcome = main([*files, *whose, "--judge.max_tokens", "16", "--judge.reasks", "0"])
    assert isinstance(outcome, Outcome)
    (found,) = outcome.report["results"]
    assert outcome.complete
    # So small a judge gives no scores, mostly; what it says is kept, and no number is made of it.
    assert found["done"] + found["unparsed"] == 4
    assert (outcome.report["calls"]["sent"], found["failed"]) == (8, 0)
    assert (found["score"] is None) == (found["unparsed"] > 0)


@pytest.mark.verify
def test_a_schema_holds_our_own_model_as_judge(tmp_path: Path) -> None:
    """200 reviews by the quickstart's model, which writes no scores of its own accord: all can be read."""
    questions = [
        {"question_id": f"{number}", "text": f"Is {number} more than {number % 7}?", "category": "conv"}
        for number in range(100)
    ]
    answers = [{"question_id": f"{number}", "text": f"It is {number}.", "model_id": "ours"} for number in range(100)]
    references = [{"question_id": f"{number}", "text": "Yes."} for number in range(100)]
    named = {"questions": questions, "references": references, "answers": answers}
    files = [(f"--{name}", str(write_lines(tmp_path / f"{name}.jsonl", rows))) for name, rows in named.items()]
    with service({"model": f"judge@{make_bundle(tmp_path)}"}) as address:
        whose = ["--judge.model", "judge", "--judge.base_url", address, "--judge.response_format", "json_schema"]
        whose += ["--judge.max_tokens", "256"]
        outcome = main([*(part for pair in files for part in pair), *whose, "--output", str(tmp_path / "out")])
    assert isinstance(outcome, Outcome)
    (found,) = outcome.report["results"]
    print(outcome.report["calls"], found)
    assert outcome.complete
    assert outcome.report["calls"]["sent"] == 200  # both orders of 100
    assert (found["done"], found["unparsed"], found["failed"]) == (100, 0, 0)

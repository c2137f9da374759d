"""Data sets answered with Ray Data say what decoding without Ray says."""

import io
from pathlib import Path

import fakes
import pytest
import torch
from PIL import Image

from llava_ray.chat.conversation import Turn, break_markers, with_markers
from llava_ray.chat.tokens import tokenize_prompt
from llava_ray.config.model import ModelConfig
from llava_ray.errors import DataError, ModelError
from llava_ray.generate.answers import Actors, answer_questions
from llava_ray.generate.decoding import answer_text, generate_batch
from llava_ray.generate.questions import ModelQuestion, decode_question_images, to_table
from llava_ray.images.geometry import crop_views
from llava_ray.images.processing import normalize_pixels
from llava_ray.model.assembly import assemble
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.saving import save_bundle

COLOURS = ["red", "green", "blue", "yellow", "white"]


def encoded(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("answers")
    config = ModelConfig(
        model_name_or_path=str(fakes.make_language_model(root / "language_model")),
        vision_tower=str(fakes.make_vision_tower(root / "tower")),
        mm_patch_merge_type="spatial_unpad",
    )
    save_bundle(root / "bundle", assemble(config, "anyres"))
    return root / "bundle"


@pytest.fixture
def questions(tmp_path: Path) -> list[ModelQuestion]:
    """Images as bytes and as a file, several of them, and a question without one."""
    (tmp_path / "red.png").write_bytes(encoded("red"))
    with_images = [ModelQuestion(f"q{i}", f"What is {i}?", encoded(COLOURS[i % 5])) for i in range(9)]
    return [
        *with_images,
        ModelQuestion("file", "What is 0?", str(tmp_path / "red.png")),
        ModelQuestion("text", "No image?"),
        ModelQuestion("two", "Is <image> like <image>?", [encoded("green"), str(tmp_path / "red.png")]),
        ModelQuestion("talk", "What is 7?", encoded("blue"), follow_ups=["And 8?", "And the <image> 9?"]),
    ]


def test_images_are_decoded_from_bytes_and_files(bundle: Path, questions: list[ModelQuestion]) -> None:
    spec = load_pretrained_model(bundle).image_spec
    table = decode_question_images(to_table(questions), spec)
    assert table.column_names[:4] == ["id", "question", "follow_ups", "candidates"]
    assert table.column_names[-3:] == ["unreadable", "pixels", "image_sizes"]
    pixels = table["pixels"].to_pylist()
    assert pixels[0] == pixels[9] == crop_views(Image.new("RGB", (40, 30), "red"), spec).tobytes()
    assert pixels[10] == b""
    assert pixels[11] == crop_views(Image.new("RGB", (40, 30), "green"), spec).tobytes() + pixels[9]
    assert table["image_sizes"].to_pylist() == [[[40, 30]]] * 10 + [[], [[40, 30]] * 2, [[40, 30]]]
    assert table["follow_ups"].to_pylist() == [[]] * 12 + [["And 8?", "And the <image> 9?"]]


def test_ids_tell_answers_apart(bundle: Path) -> None:
    with pytest.raises(DataError, match="two questions have the id 'a'"):
        answer_questions(bundle, [ModelQuestion("a", "x"), ModelQuestion("a", "y")])


def test_follow_ups_need_generated_answers(bundle: Path) -> None:
    asked = [ModelQuestion("a", "x"), ModelQuestion("b", "y", candidates=("yes", "no"), follow_ups=["z"])]
    with pytest.raises(DataError, match="question 'b' has candidates and follow_ups"):
        answer_questions(bundle, asked)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_answers_are_those_of_decoding_alone(bundle: Path, questions: list[ModelQuestion]) -> None:
    heard: list[tuple[int, int]] = []
    answers = answer_questions(
        bundle,
        questions,
        max_new_tokens=6,
        batch_size=4,
        actors=Actors(num=2, num_cpus=0.5),
        on_progress=lambda done, total: heard.append((done, total)),
    )
    assert [answer.id for answer in answers] == [question.id for question in questions]
    assert sorted(heard) == heard
    assert heard[-1] == (13, 13)

    parts = load_pretrained_model(bundle)
    for question, answer in zip(questions, answers, strict=True):
        images = [Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) for image in question.images]
        views = [normalize_pixels(crop_views(image, parts.image_spec), parts.image_spec) for image in images]
        turns: list[Turn] = []
        pixels, sizes = torch.cat(views) if views else None, [image.size for image in images]
        texts = [with_markers(question.question, len(images)), *map(break_markers, question.follow_ups)]
        for text, said in zip(texts, (answer.answer, *answer.later_answers), strict=True):
            turns.append(Turn("human", text))
            prompt = tokenize_prompt(turns, parts.template, parts.tokenizer)
            alone = generate_batch(parts, [prompt], [pixels], image_sizes=[sizes], max_new_tokens=6)[0]
            assert said == answer_text(parts, alone)
            turns.append(Turn("gpt", said))
    assert len({answer.answer for answer in answers}) > 1
    assert answers[0].answer == answers[9].answer


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("candidates", [(), ("yes", "no")])
def test_logits_that_are_not_finite_end_it_in_our_words(
    bundle: Path, tmp_path: Path, candidates: tuple[str, ...]
) -> None:
    """Weights that are finite, and too large for what is computed with them."""
    parts = load_pretrained_model(bundle)
    with torch.no_grad():
        parts.llava.language_model.get_output_embeddings().weight[7] = 3e38
    save_bundle(tmp_path / "wide", parts)
    asked = [ModelQuestion(f"q{index}", "What?", candidates=candidates) for index in range(3)]
    with pytest.raises(ModelError, match=r"logits are not finite .*batch of questions 'q0' to 'q2'"):
        answer_questions(tmp_path / "wide", asked)

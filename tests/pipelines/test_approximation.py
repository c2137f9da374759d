"""What export.py hub --approximate asks of samples: first questions, with system texts, none that is not learnt."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import make_tokenizer
from PIL import Image

from llava_ray.chat.asked_turns import first_question
from llava_ray.chat.conversation import Turn
from llava_ray.chat.templates import find_template
from llava_ray.chat.tokenizer import load_tokenizer
from llava_ray.chat.tokens import tokenize_prompt
from llava_ray.errors import ConfigError, DataError
from pipelines.approximation import Approximation, Loss, make_questions, measure_loss, read_samples

ASK, SAY = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}
IMAGE_ASK = {"from": "human", "value": "<image>\nWhat?"}
RECORDS: list[Any] = [
    {"conversations": [ASK, SAY]},
    {"system": "Be brief.", "conversations": [ASK, SAY]},
    {
        "image": "a.png",
        "conversations": [{**ASK, "value": "Ho"}, {**SAY, "weight": 0}, IMAGE_ASK, {**SAY, "value": "A"}],
    },
    {"conversations": [ASK]},
    {"conversations": [ASK, {**SAY, "weight": 0}]},
    {"image": "none.png", "conversations": [IMAGE_ASK, SAY]},
    {"image": "bad.png", "conversations": [IMAGE_ASK, SAY]},
    {"video": "v.mp4", "conversations": [ASK, SAY]},
    5,
]


@pytest.fixture
def samples(tmp_path: Path) -> str:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_text("no image")
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    return str(tmp_path / "data.json")


def parts_of(tmp_path: Path, version: str = "v1") -> Any:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path / "tokenizer"))
    return SimpleNamespace(tokenizer=tokenizer, template=find_template(version))


LEFT_OUT = {
    "no answer that is learnt": 2, "image_missing": 1, "image_unreadable": 1, "unsupported": 1, "malformed": 1,
}  # fmt: skip


def test_first_learnt_answers_are_asked_for_and_the_rest_is_counted(samples: str, tmp_path: Path) -> None:
    parts = parts_of(tmp_path)
    questions, left_out = make_questions(parts, read_samples(samples, None, 100))
    assert [(question.answer, question.num_images) for question in questions] == [
        ("Hello.", 0),
        ("Hello.", 0),
        ("A", 1),
    ]
    assert left_out == LEFT_OUT
    plain = [Turn("human", "Hi")]
    template = parts.template.with_system("Be brief.")
    assert questions[0].prompt == tokenize_prompt(plain, parts.template, parts.tokenizer)
    assert questions[1].prompt == tokenize_prompt(plain, template, parts.tokenizer)
    assert questions[2].record.images == (f"{tmp_path}/a.png",)


def test_a_template_without_a_place_for_the_system_leaves_the_sample_out(samples: str, tmp_path: Path) -> None:
    questions, left_out = make_questions(parts_of(tmp_path, "mistral_instruct"), read_samples(samples, None, 2))
    assert len(questions) == 1
    assert left_out == {"system_prompt": 1}


def test_nothing_to_ask_is_refused_with_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([RECORDS[3], RECORDS[7]]))
    near: Any = None
    with pytest.raises(DataError, match=r"no record to ask; 2 left out: no answer that is learnt \(1\), unsupported"):
        measure_loss(parts_of(tmp_path), near, read_samples(str(tmp_path / "data.json"), None, 5))


def test_what_is_left_out_is_said() -> None:
    assert str(Loss(4, 4, 2, {"malformed": 3})).endswith("(-50.0 points); 3 left out: malformed (3)")
    assert str(Loss(4, 4, 2)).endswith("(-50.0 points)")


@pytest.mark.parametrize("given", [{"image_folder": "images"}, {"max_samples": 200}, {"max_samples": 5}])
def test_flags_of_samples_alone_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="belong to --samples"):
        Approximation(approximate=True, **given).check()
    Approximation(approximate=True, samples="a.json", **given).check()
    with pytest.raises(ConfigError):
        Approximation(**given).check()


def test_the_first_question_is_the_turns_before_the_first_learnt_answer() -> None:
    turns = [
        Turn("system", "s"),
        Turn("human", "a"),
        Turn("gpt", "b", supervised=False),
        Turn("human", "c"),
        Turn("gpt", "d"),
    ]
    assert first_question(turns) == ("s", turns[1:4], turns[4])
    assert first_question(turns[:4]) is None
    assert first_question([]) is None

"""Records to train on: every question once, several about an image; the curriculum in words."""

import json
from collections import Counter

from evals import easy_vqa
from evals.easy_vqa_records import write_conversations, write_words


def test_plain_balanced_questions_come_first_and_then_the_natural_mix(tmp_path):
    records = json.loads(write_words(tmp_path, num_first=1000, num_natural=2000, seed=0).read_text())
    assert len(records) == 3000
    assert all("image" not in record and "<image>" not in str(record) for record in records)
    first = [record["conversations"] for record in records[:1000]]
    answers = Counter(turns[1]["value"] for turns in first)
    assert set(answers) == {"yes", "no"}
    assert abs(answers["yes"] - answers["no"]) < 100
    negated = sum(" not " in turns[0]["value"] or " no " in turns[0]["value"] for turns in first)
    assert 20 < negated < 150
    natural = Counter(record["conversations"][1]["value"] for record in records[1000:])
    assert {"circle", "red", "yes", "no"} <= set(natural)


def test_a_scene_tells_one_colour_and_one_shape_in_as_many_words_as_an_image_has_tokens(tmp_path):
    records = json.loads(write_words(tmp_path, num_first=10, num_natural=10, seed=0).read_text())
    scene, question = records[0]["conversations"][0]["value"].split("\n")
    words = scene.split()
    assert len(words) == 16
    assert len(set(words) & set(easy_vqa.COLOURS)) <= 1
    assert len(set(words) & set(easy_vqa.SHAPES)) <= 1
    assert set(words) <= {*easy_vqa.COLOURS, *easy_vqa.SHAPES}
    assert question.endswith("?")


def test_conversations_ask_every_train_question_once_and_the_image_comes_first(tmp_path):
    records = json.loads(write_conversations(tmp_path, num_turns=4, seed=1).read_text())
    by_image = {}
    for record in records:
        turns = record["conversations"]
        assert len(turns) <= 8
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert [turn["value"].startswith("<image>\n") for turn in turns] == [True] + [False] * (len(turns) - 1)
        asked = [turn["value"].removeprefix("<image>\n") for turn in turns]
        by_image.setdefault(record["image"], []).extend(zip(asked[::2], asked[1::2], strict=True))
    expected = {}
    for question in easy_vqa.questions("train"):
        expected.setdefault(question.image.name, []).append((question.question, question.answer))
    assert {image: sorted(asked) for image, asked in by_image.items()} == {
        image: sorted(asked) for image, asked in expected.items()
    }
    assert len({record["id"] for record in records}) == len(records)


def test_the_order_of_conversations_hangs_on_the_seed_alone(tmp_path):
    files = [write_conversations(tmp_path / str(n), num_turns=2, seed=seed) for n, seed in enumerate((1, 1, 2))]
    first, again, other = (file.read_text() for file in files)
    assert first == again != other

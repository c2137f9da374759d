"""Records to train on: every question once; the curriculum in words."""

import json
from collections import Counter

from llava_ray.quickstart import easy_vqa
from llava_ray.quickstart.easy_vqa_records import (
    write_conversations,
    write_open_questions,
    write_open_split,
    write_words,
)


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


def test_a_scene_tells_a_colour_and_a_shape(tmp_path):
    records = json.loads(write_words(tmp_path, num_first=10, num_natural=10, seed=0).read_text())
    scene, question = records[0]["conversations"][0]["value"].split("\n")
    article, colour, shape = scene.split()
    assert article == "a"
    assert colour in easy_vqa.COLOURS
    assert shape in easy_vqa.SHAPES
    assert question.endswith("?")


def test_conversations_ask_every_train_question_once_in_an_order_that_hangs_on_the_seed(tmp_path):
    files = [write_conversations(tmp_path / str(n), seed=seed) for n, seed in enumerate((1, 1, 2))]
    first, again, other = (file.read_text() for file in files)
    assert first == again != other
    by_id = {question.id: question for question in easy_vqa.read_questions("train")}
    records = json.loads(first)
    assert len(records) == len(by_id)
    for record in records:
        question = by_id.pop(record["id"])
        human, gpt = (turn["value"] for turn in record["conversations"])
        assert (record["image"], human, gpt) == (
            question.image.name,
            f"<image>\n{question.question}",
            question.answer,
        )


def test_open_questions_are_those_for_a_colour_or_a_shape(tmp_path):
    records = json.loads(write_open_questions(tmp_path, seed=1).read_text())
    answers = {record["conversations"][1]["value"] for record in records}
    assert answers == {*easy_vqa.COLOURS, *easy_vqa.SHAPES}
    assert len(records) == sum(question.answer not in ("yes", "no") for question in easy_vqa.read_questions("train"))


def test_held_out_images_are_in_no_question_that_is_learnt(tmp_path):
    learnt, judged = (
        json.loads(path.read_text()) for path in write_open_split(tmp_path, num_held_out_images=500, seed=0)
    )
    images = [{record["image"] for record in records} for records in (learnt, judged)]
    assert not images[0] & images[1]
    assert len(images[1]) == 500
    assert len(learnt) + len(judged) == len(json.loads(write_open_questions(tmp_path, seed=0).read_text()))
    assert len(learnt) > 3840  # what the sweep's recipe takes
    answers = [Counter(record["conversations"][1]["value"] for record in records) for records in (learnt, judged)]
    assert answers[0].keys() == answers[1].keys()

"""Records to train on: every question once, several in a conversation; the curriculum in words."""

import json
from collections import Counter

from llava_ray.quickstart import easy_vqa
from llava_ray.quickstart.easy_vqa_records import (
    WordsCurriculum,
    write_conversations,
    write_open_questions,
    write_open_split,
    write_words,
)


def list_turns(record):
    """Return the questions and answers of a record, without the scene before the first."""
    values = [turn["value"] for turn in record["conversations"]]
    assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * (len(values) // 2)
    _, _, values[0] = values[0].partition("\n")
    return list(zip(values[::2], values[1::2], strict=True))


def test_plain_balanced_questions_come_first_and_then_the_natural_mix(tmp_path):
    curriculum = WordsCurriculum(num_plain=1000, num_open=200, num_alone=300, num_in_conversations=1500)
    records = json.loads(write_words(tmp_path, curriculum, seed=0).read_text())
    assert all("image" not in record and "<image>" not in str(record) for record in records)
    assert len({record["id"] for record in records}) == len(records)
    turns = [turn for record in records for turn in list_turns(record)]
    assert len(turns) == 3000
    answers = Counter(answer for _, answer in turns[:1200])
    assert answers["yes"] + answers["no"] == 1000
    assert abs(answers["yes"] - answers["no"]) < 100
    halves = [Counter(answer in ("yes", "no") for _, answer in some) for some in (turns[:600], turns[600:1200])]
    assert all(60 < half[False] < 140 for half in halves)  # those for a colour or a shape are mixed in
    negated = sum(" not " in question or " no " in question for question, _ in turns[:1200])
    assert 20 < negated < 150
    for natural in (turns[1200:1500], turns[1500:]):
        assert {"circle", "red", "yes", "no"} <= {answer for _, answer in natural}
    assert {len(list_turns(record)) for record in records[:1500]} == {1}
    assert {len(list_turns(record)) for record in records[1500:]} == {1, 2, 3, 4, 5}


def test_a_scene_tells_a_colour_and_a_shape_and_its_answers_fit(tmp_path):
    records = json.loads(write_words(tmp_path, WordsCurriculum(300, 100, 100, 300), seed=0).read_text())
    for record in records:
        scene = record["conversations"][0]["value"].split("\n")[0]
        article, colour, shape = scene.split()
        assert article == "a"
        assert colour in easy_vqa.COLOURS
        assert shape in easy_vqa.SHAPES
        for question, answer in list_turns(record):
            assert question.endswith("?")
            words = question.rstrip("?").split()
            if answer in ("yes", "no"):
                fits = not {*words}.isdisjoint((colour, shape))
                assert (answer == "yes") == (fits != bool({"not", "no"} & {*words}))
            else:
                assert answer in (colour, shape)


def test_conversations_ask_every_train_question_once_in_an_order_that_hangs_on_the_seed(tmp_path):
    files = [write_conversations(tmp_path / str(n), seed=seed) for n, seed in enumerate((1, 1, 2))]
    first, again, other = (file.read_text() for file in files)
    assert first == again != other
    questions = easy_vqa.read_questions("train")
    records = json.loads(first)
    assert len({record["id"] for record in records}) == len(records)
    written = Counter((record["image"], *turn) for record in records for turn in list_turns(record))
    assert written == Counter((question.image.name, question.question, question.answer) for question in questions)
    assert all(record["conversations"][0]["value"].startswith("<image>\n") for record in records)
    assert str(records).count("<image>") == len(records)
    lengths = Counter(len(list_turns(record)) for record in records)
    assert set(lengths) == {1, 2, 3, 4, 5}
    assert lengths[1] < len(records) / 5  # only what is left of an image
    assert len({record["image"] for record in records[:1000]}) > 800  # the images are mixed, not one after the other


def test_open_questions_are_those_for_a_colour_or_a_shape(tmp_path):
    records = json.loads(write_open_questions(tmp_path, seed=1).read_text())
    answers = [answer for record in records for _, answer in list_turns(record)]
    assert {*answers} == {*easy_vqa.COLOURS, *easy_vqa.SHAPES}
    assert len(answers) == sum(question.kind != easy_vqa.YES_NO for question in easy_vqa.read_questions("train"))


def test_held_out_images_are_in_no_question_that_is_learnt(tmp_path):
    learnt, judged = (
        json.loads(path.read_text()) for path in write_open_split(tmp_path, num_held_out_images=500, seed=0)
    )
    images = [{record["image"] for record in records} for records in (learnt, judged)]
    assert not images[0] & images[1]
    assert len(images[1]) == 500
    assert {len(list_turns(record)) for record in (*learnt, *judged)} == {1}
    num_open = sum(question.kind != easy_vqa.YES_NO for question in easy_vqa.read_questions("train"))
    assert len(learnt) + len(judged) == num_open
    assert len(learnt) > 3840  # what the sweep's recipe takes
    answers = [Counter(record["conversations"][1]["value"] for record in records) for records in (learnt, judged)]
    assert answers[0].keys() == answers[1].keys()

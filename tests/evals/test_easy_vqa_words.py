"""The curriculum in words: order, balance, and text only."""

import json
from collections import Counter

from evals.easy_vqa_words import write_words


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


def test_the_scene_is_a_whole_caption(tmp_path):
    records = json.loads(write_words(tmp_path, num_first=10, num_natural=10, seed=0).read_text())
    scene, question = records[0]["conversations"][0]["value"].split("\n")
    assert len(scene.split()) == 3
    assert question.endswith("?")

"""What is asked and what is understood: LLaVA's requests byte by byte, PARSE vectors, strict schemas."""

import json
from pathlib import Path

import pytest

from llava_ray.errors import ConfigError, DataError
from llava_ray.review.rubric import build_default_rubric, compose_request, read_rubric, read_rules
from llava_ray.review.verdict import ReviewVerdict, build_response_format, format_verdict, read_verdict

RULES = {
    "conv": {"role": "Assistant", "prompt": "Rate the two."},
    "llava_bench_conv": {"role": "Assistant", "prompt": "Rate both.\nNow."},
}
BENCH = (
    "[Context]\nOne sentence.\nAnother.\n\n[Question]\nWhat?\n\n[Assistant 1]\nA bus.\n\n[End of Assistant 1]\n\n"
    "[Assistant 2]\nA dog.\n\n[End of Assistant 2]\n\n[System]\nRate both.\nNow.\n\n"
)
VISUAL = (
    "[Context]\nOne sentence.\n\ndog: [0.1, 0.2, 0.3, 0.4]\nbus: [0, 0, 1, 1]\n\n[Question]\nWhat?\n\n[Assistant 1]\n"
    "A bus.\n\n[End of Assistant 1]\n\n[Assistant 2]\nA dog.\n\n[End of Assistant 2]\n\n[System]\nRate the two.\n\n"
)


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    path = tmp_path / "rule.json"
    path.write_text(json.dumps(RULES))
    return path


def test_requests_under_a_rule_file_are_llavas_byte_by_byte(rules: Path) -> None:
    rubric = read_rules(rules)
    told = {"image": "a.jpg", "caption": ["One sentence.", "Another."]}
    assert compose_request(rubric, "llava_bench_conv", told, "What?", ("A bus.", "A dog."), as_json=False) == BENCH
    boxes = [{"category": "dog", "bbox": [0.1, 0.2, 0.3, 0.4]}, {"category": "bus", "bbox": [0, 0, 1, 1]}]
    told = {"captions": ["One sentence."], "instances": boxes}
    assert compose_request(rubric, "conv", told, "What?", ("A bus.", "A dog."), as_json=False) == VISUAL
    # The original joins a caption that is one text letter by letter.
    literal = compose_request(rubric, "conv", {"caption": "ab"}, "?", ("x", "y"), as_json=False)
    assert literal.startswith("[Context]\na\nb\n\n[Question]")
    assert "[Context]\nab\n\n" in compose_request(
        build_default_rubric("pair"), "conv", {"caption": "ab"}, "?", ("x", "y"), as_json=False
    )


def test_a_category_without_a_rule_is_refused(rules: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rule for category 'detail'; it has conv, llava_bench_conv"):
        read_rules(rules).rule("detail")
    assert build_default_rubric("pair").rule("anything") == build_default_rubric("pair").rule("default")
    (tmp_path / "bad.json").write_text('{"conv": "text"}')
    with pytest.raises(ConfigError, match="is no rule file"):
        read_rules(tmp_path / "bad.json")


def test_a_rubric_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('system = "Be strict."\n[prompts]\ndefault = "Rate."\n')
    rubric = read_rubric(path, "single")
    assert (rubric.system, rubric.rule("conv").prompt, rubric.name) == ("Be strict.", "Rate.", "mine")
    assert compose_request(rubric, "conv", None, "What?", ("A.",), as_json=False) == (
        "[Question]\nWhat?\n\n[Assistant]\nA.\n\n[End of Assistant]\n\n[System]\nRate.\n\n"
    )
    path.write_text('prompt = "Rate."')
    with pytest.raises(ConfigError, match="has prompt; expected name"):
        read_rubric(path, "single")


def test_any_change_of_words_is_another_version() -> None:
    assert build_default_rubric("pair").version != build_default_rubric("single").version
    assert build_default_rubric("pair").version == build_default_rubric("pair").version


@pytest.mark.parametrize(
    ("reply", "strict", "robust"),
    [
        ("8 7", True, True),
        ("8, 7", False, True),
        ("8,7", True, True),
        ("8 7 ", False, True),
        ("8.5 9", True, True),
        ("8/10 7/10", False, True),
        ("Assistant 1: 8\nAssistant 2: 7", False, True),
        ("**8 7**", False, True),
        ("Scores: 8 7", False, True),
        ("\n8 7\nThe first …", False, True),
        ("I am sorry.", False, False),
        ("80 70", True, False),
        ("", False, False),
    ],
)
def test_two_numbers(reply: str, strict: bool, robust: bool) -> None:
    by_llava = read_verdict(reply, "pair", as_json=False, strictly=True)
    ours = read_verdict(reply, "pair", as_json=False)
    assert (by_llava is not None, ours is not None) == (strict, robust)
    if ours is not None:
        assert ours.scores == ((8.5, 9) if "8.5" in reply else (8, 7))


@pytest.mark.parametrize(
    ("reply", "score"),
    [("7", 7), ("**7**\nGood.", 7), ("Score: 7/10", 7), ("\n7.5\n", 7.5), ("7 8", None), ("0", None), ("x", None)],
)
def test_one_number(reply: str, score: float | None) -> None:
    found = read_verdict(reply, "single", as_json=False)
    assert (found.scores[0] if found else None) == score


def test_a_schema_is_kept_to_the_letter() -> None:
    asked = build_response_format("pair")["json_schema"]
    assert asked["strict"]
    assert asked["schema"]["required"] == ["explanation", "score_1", "score_2"]
    assert not asked["schema"]["additionalProperties"]
    assert asked["schema"]["properties"]["score_2"] == {"type": "number", "minimum": 1.0, "maximum": 10.0}
    good = {"explanation": "why", "score_1": 8, "score_2": 7}
    assert read_verdict(json.dumps(good), "pair", as_json=True) == ReviewVerdict((8, 7), "why")
    bad = [good | {"score_1": "8"}, good | {"score_1": 11}, good | {"score_1": True}, good | {"x": 1}, [good], 8]
    for content in [*map(json.dumps, bad), "8 7", json.dumps(good)[:-1], '{"explanation": "", "score_1": NaN}']:
        assert read_verdict(content, "pair", as_json=True) is None
    assert read_verdict('{"explanation": "", "correctness": 0.5}', "grade", as_json=True) == ReviewVerdict((0.5,))


def test_a_verdict_is_written_as_llavas_scripts_read_it() -> None:
    assert format_verdict(ReviewVerdict((8, 7.5), "Because.")) == "8 7.5\nBecause."
    assert format_verdict(ReviewVerdict((0.5,))) == "0.5"


def test_json_is_read_behind_thoughts_and_in_a_fence_and_nothing_else() -> None:
    good = '{"explanation": "why", "score_1": 8, "score_2": 7}'
    for reply in (good, f"<think>3 4</think>\n{good}", f"```json\n{good}\n```", f"```\n{good}\n```\n"):
        assert read_verdict(reply, "pair", as_json=True) == ReviewVerdict((8, 7), "why")
    assert read_verdict(good, "pair", as_json=False) == ReviewVerdict((8, 7), "why")  # though it was asked for lines
    twice = '{"explanation": "", "score_1": 8, "score_1": 3, "score_2": 7}'
    huge = '{"explanation": "", "score_1": 8, "score_2": 1' + "0" * 400 + "}"
    for reply in (f"<think>{good}", f"{good}\n{good}", f"So: {good}", twice, huge, "[" * 50_000, "1" * 5000):
        assert read_verdict(reply, "pair", as_json=True) is None


def test_thoughts_are_no_part_of_the_explanation() -> None:
    assert read_verdict("<think>a\nb</think>\n8 7\nGood.", "pair", as_json=False) == ReviewVerdict((8, 7), "Good.")

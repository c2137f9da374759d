"""Replies as judges write them: read right, or not at all. What is right was written by hand, before the rule."""

import random

import pytest

from llava_ray.replies import parse_grade, parse_pair, parse_pair_strictly, parse_score, remove_reasoning

# reply: (score of the first answer, score of the second), or None where there is no verdict
PAIRS: dict[str, tuple[float, float] | None] = {
    # as asked
    "8 9": (8, 9),
    "8 9\nBoth see the bus; the second also sees 3 dogs.": (8, 9),
    "8  9": (8, 9),
    "8\t9": (8, 9),
    "8.0 9.0": (8, 9),
    "10 1": (10, 1),
    "8.5 9\nGood.": (8.5, 9),
    "8, 9\nGood.": (8, 9),
    "8; 9": (8, 9),
    "8 and 9": (8, 9),
    "8 & 9": (8, 9),
    "8 vs. 9": (8, 9),
    "8 | 9": (8, 9),
    "(8, 9)": (8, 9),
    "[8, 9]": (8, 9),
    "8/10 9/10\nGood.": (8, 9),
    "8 / 10, 9 / 10": (8, 9),
    "8 out of 10, 9 out of 10": (8, 9),
    "8 9.": (8, 9),
    "8 9. Both are good.": (8, 9),
    # marks
    "**8** **9**\nGood.": (8, 9),
    "__8 9__": (8, 9),
    "# 8 9": (8, 9),
    "> 8 9": (8, 9),
    "`8 9`": (8, 9),
    '"8 9"': (8, 9),
    "```\n8 9\n```\nGood.": (8, 9),
    "```text\n8 9\n```": (8, 9),
    r"\boxed{8 9}": (8, 9),
    r"$\boxed{8}$ $\boxed{9}$": (8, 9),
    "<answer>8 9</answer>": (8, 9),
    "８ ９": (8, 9),
    "８．５，９": (8.5, 9),
    "\u200b8\u200b 9\ufeff": (8, 9),
    "8\u00a09": (8, 9),
    "⑧ ⑨": (8, 9),
    "\r\n8 9\r\nGood.": (8, 9),
    # words before
    "Scores: 8 9": (8, 9),
    "**Scores:** 8 9": (8, 9),
    "Final scores: 8, 9": (8, 9),
    "The scores are 8 and 9.": (8, 9),
    "Scores (1-10): 8 9": (8, 9),
    "Scores (out of 10): 8 9": (8, 9),
    "Scores for Assistant 1 and Assistant 2: 8 9": (8, 9),
    "The scores of Assistant 1 and Assistant 2 are 8 and 9, respectively.": (8, 9),
    "Here are the scores:\n8 9\nGood.": (8, 9),
    "Sure! Here is my evaluation.\n\n8 9\n\nGood.": (8, 9),
    "Assistant 1, Assistant 2\n8 9": (8, 9),
    "| Assistant 1 | Assistant 2 |\n|---|---|\n| 8 | 9 |\nGood.": (8, 9),
    # a scale before
    "On a scale of 1 to 10, I score them as follows:\n8 9\nGood.": (8, 9),
    "On a scale from 1-10:\n8 9": (8, 9),
    "Scale: 1 to 10\n8 9": (8, 9),
    "1-10 scale, 10 being the best:\n8 9": (8, 9),
    "Between 1 and 10:\n8 9": (8, 9),
    "On a scale of 1 to 10: 8 9": None,  # not our form: a line of prose with numbers
    # labels
    "Assistant 1: 8\nAssistant 2: 9": (8, 9),
    "Assistant 1: 8/10\nAssistant 2: 9/10\nGood.": (8, 9),
    "Assistant 1: 8, Assistant 2: 9": (8, 9),
    "Assistant 1: 8/10 Assistant 2: 9/10": (8, 9),
    "Assistant 1：8\nAssistant 2：9": (8, 9),
    "**Assistant 1:** 8\n**Assistant 2:** 9": (8, 9),
    "**Assistant 1**: **8**\n**Assistant 2**: **9**": (8, 9),
    "- Assistant 1: 8\n- Assistant 2: 9": (8, 9),
    "1. Assistant 1: 8\n2. Assistant 2: 9": (8, 9),
    "Assistant 1 - 8\nAssistant 2 - 9": (8, 9),
    "Assistant 1 – 8, Assistant 2 – 9": (8, 9),
    "Assistant 1 = 8; Assistant 2 = 9": (8, 9),
    "Assistant 1 (8/10), Assistant 2 (9/10)": (8, 9),
    "Assistant 1's score: 8\nAssistant 2's score: 9": (8, 9),
    "Score of Assistant 1: 8\nScore of Assistant 2: 9": (8, 9),
    "Score for Assistant 2: 9\nScore for Assistant 1: 8": (8, 9),
    "Score 1: 8\nScore 2: 9": (8, 9),
    "Assistant 1: 8. It names 3 things.\nAssistant 2: 9": None,
    "Assistant 1: 8. It is fine.\nAssistant 2: 9 (very good)": (8, 9),
    "Assistant 1: 8\n\nIt is fine.\n\nAssistant 2: 9\n\nIt is better.": (8, 9),
    "Answer A: 8\nAnswer B: 9": (8, 9),
    "A: 8, B: 9": (8, 9),
    "First answer: 8. Second answer: 9.": (8, 9),
    "| Assistant 1 | 8 |\n| Assistant 2 | 9 |": (8, 9),
    '{"score_1": 8, "score_2": 9}': (8, 9),
    "Let me compare them.\nOne sees a bus.\nFinal scores: 8 9": (8, 9),
    "It lists 5 objects and 2 of them are wrong.\nFinal scores: 8 9": (8, 9),
    "It lists 5 objects and 2 of them are wrong.\nAssistant 1: 8\nAssistant 2: 9": (8, 9),
    # labels in another order
    "Assistant 2: 9, Assistant 1: 8\nGood.": (8, 9),
    "Assistant 2: 9\nAssistant 1: 8\nGood.": (8, 9),
    "Assistant 2: 9/10. Assistant 1: 8/10.": (8, 9),
    "B: 9, A: 8": (8, 9),
    "Second: 9, First: 8": (8, 9),
    '{"score_2": 9, "score_1": 8}': (8, 9),
    "Assistant 2, Assistant 1\n9 8": None,
    "| Assistant 2 | Assistant 1 |\n|---|---|\n| 9 | 8 |": None,
    "Scores (Assistant 2, Assistant 1): 9 8": None,
    "9 8\n(Assistant 2, Assistant 1)": None,
    "9 8 (Assistant 2 and Assistant 1)": None,
    "Scores of the second and the first answer: 9 8": None,
    "In reverse order:\n9 8": None,
    "9 for Assistant 2, 8 for Assistant 1": None,
    "9 for Assistant 2 8 for Assistant 1": None,
    "9 (Assistant 2), 8 (Assistant 1)": None,
    # two verdicts that differ
    "8 9\nOn reflection:\n7 9": None,
    "8 9\nFinal scores: 7 9": None,
    "9 8\nAssistant 1: 8\nAssistant 2: 9": None,
    "Assistant 1: 8, Assistant 2: 9\nAssistant 1: 7, Assistant 2: 9": None,
    "8 9\nHelpfulness:\nAssistant 1: 7\nAssistant 2: 9\nAccuracy:\nAssistant 1: 9\nAssistant 2: 9": (8, 9),
    "8 9\nAssistant 1: 8\nAssistant 2: 9": (8, 9),
    "8 9\n\nScores: 8 9": (8, 9),
    # thoughts
    "<think>First I compare 3 and 4 things.</think>\n8 9\nGood.": (8, 9),
    "<think>\n3 4\n</think>\n\n8 9": (8, 9),
    "3 4 might do.\n</think>\n8 9": (8, 9),
    "<THINK>3 4</THINK>8 9": (8, 9),
    "<thinking>3 4</thinking>8 9": (8, 9),
    "[THINK]3 4[/THINK]8 9": (8, 9),
    "◁think▷3 4◁/think▷8 9": (8, 9),
    "<think>a <think>3 4</think> b 5 6</think>8 9": (8, 9),
    "<|channel|>analysis<|message|>3 4<|end|><|start|>assistant<|channel|>final<|message|>8 9": (8, 9),
    "<think>perhaps 3 against 4": None,
    "<think>\n3 4\n": None,
    "8 9\n<think>or rather 7": None,
    "[Reasoning]\nBoth are good.\nScores: 8 9": (8, 9),
    "<think>3 4</think>": None,
    # numbers that are no scores of ours
    "-1 9\nThe first answer is missing.": None,
    "−1 9": None,
    "–1 9": None,
    "8 -9": None,
    "-1 -1": None,
    "Assistant 1: -1\nAssistant 2: 9": None,
    "Assistant 1: -1, Assistant 2: 9\n8 9": None,
    "0 9": None,
    "0.5 0.7": None,
    "80 90\nGood.": None,
    "8 90": None,
    "11 9": None,
    "80% 90%": None,
    "8/100 9/100": None,
    "8/9": None,
    "8/9 9/10": None,
    "4/5 5/5": None,
    "16/20 18/20": None,
    "8 out of 20, 9 out of 20": None,
    "Assistant 1: 80/100\nAssistant 2: 90/100": None,
    "On a scale of 1 to 100:\n8 9": None,
    "Out of 20:\n8 9": None,
    "7-8 9\nGood.": None,
    "7–8 9": None,
    "8-9": None,
    "8 - 9": None,
    "7~8 9": None,
    "8,5 9,5": None,
    "8.5.1 9": None,
    "8e0 9e0": None,
    "8½ 9": None,
    "8² 9": None,
    "8 (9)": None,
    "+8 +9": None,
    "8+ 9": None,
    ">8 9": (8, 9),
    "~8 ~9": None,
    "8\n9\nGood.": None,
    "1. 8\n2. 9": None,
    "1: 8, 2: 9": None,
    "8": None,
    "8 7 6": None,
    "9999999999999999999999 9": None,
    # prose
    "I give the first an 8 because it has 9 words.": None,
    "There are 8 dogs and 9 cats.": None,
    "The answers are 8 and 9.": None,
    "There are 2 reasons for 9 here.": None,
    "Assistant 1 names 3 objects, Assistant 2 names 4.": None,
    "Assistant 1: 3 objects are named.\nAssistant 2: 4 objects are named.": None,
    "Question 8, line 9": None,
    "GPT-4 and 8": None,
    "3D 4K": None,
    "Both are at (3, 4)": None,
    "eight nine": None,
    "I cannot rate these.": None,
    "VIII IX": None,
    "": None,
    "\n\n": None,
    "---": None,
    "The answers tell where the boxes of 2 dogs are:\n3 4\nwhich is right.": None,
    # a second verdict without a word for scores
    "Assistant 1: 8\nAssistant 2: 9\nFinal: 7 9": None,
    "8 9\nFinal: 7 9": None,
    "8 9\nOverall: 7 8": None,
    "8 9\nOverall 7 8": None,
    "8 9\nTotal - 7 8": None,
    "Scores: 8 9\nOverall 7 8": None,
    "Scores: 8 9\nActually, 7 9": None,
    "8 9\nActually 7 9": None,
    "8 9\nCorrection: 7 9": None,
    "8 9\nRevised scores: 7 9": None,
    "8 9\nIn conclusion: 7 9": None,
    "8 9\nSo: (7, 9)": None,
    "8 9\nGood. Final scores: 7 9": None,
    "8 9\nThe first is vague. Scores: 7, 9.": None,
    "8 9\nFinal: Assistant 1: 7, Assistant 2: 9": None,
    "Assistant 1: 8\nAssistant 2: 9\nFinal: Assistant 1: 7, Assistant 2: 9": None,
    "8 9\nOverall: Assistant 2: 9, Assistant 1: 7": None,
    "It lists 5 objects.\nOverall: 7 9\nScores: 8 9": None,
    "Overall: 7 9\n8 9": None,
    "Final: 8 9": (8, 9),
    "Overall: 8 9\nGood.": (8, 9),
    "8 9\nFinal: 8 9": (8, 9),
    "8 9\nOverall 8 9": (8, 9),
    "Assistant 1: 8\nAssistant 2: 9\nFinal: 8 9": (8, 9),
    "8 9\nFinal: Assistant 1: 8, Assistant 2: 9": (8, 9),
    "Scores: Assistant 1: 8, Assistant 2: 9": (8, 9),
    "8 9\nBoth name the 3 dogs, and 4 cats.": (8, 9),
    "8 9\nOverall, the second is better.": (8, 9),
    "8 9\nOverall: the second has 2 errors.": (8, 9),
    "8 9\nFinal thoughts: none": (8, 9),
    "Boxes: 3 4": None,
    "Dogs and cats: 3 4": None,
    "The two are 8 9": None,
    "There are 8 9": None,
    "8 9\nThe answers are 8 and 9.": (8, 9),
    "8 9\nThere are 2 dogs: 1 brown and 1 black.": (8, 9),
}
MAY_BE_READ = {"There are 2 reasons for 9 here.\n8 9": (8, 9), "Here: 8 9": (8, 9), "8 9 Good": (8, 9)}
SINGLES: dict[str, float | None] = {
    "7": 7,
    "7.5": 7.5,
    "**7**\nGood.": 7,
    "Score: 7/10": 7,
    "Rating: 7 out of 10": 7,
    "The score is 7.": 7,
    "Assistant 1: 7": 7,
    "7 - a good answer.": 7,
    "7/10. It is good.": 7,
    "<think>3</think>7": 7,
    "Scale 1-10\n7": 7,
    "７": 7,
    "It is fine. Score: 7": 7,
    "It names 3 of 4 things.\nScore: 7": 7,
    "7\nScore: 7": 7,
    "7\nScore: 8": None,
    "Clarity score: 7. Depth score: 8.": None,
    "7 8": None,
    "7-8": None,
    "-7": None,
    "0": None,
    "11": None,
    "70/100": None,
    "70%": None,
    "The answer lists 3 things.": None,
    "3 things are missing.": None,
    "<think>7": None,
    "x": None,
    "": None,
    # a second verdict
    "7\n9": None,
    "7\n\n9": None,
    "Score: 7\nOverall: 9": None,
    "Score: 7\nOverall 9": None,
    "7\nFinal: 9": None,
    "7\nActually, 9": None,
    "Score: 7\n9": None,
    "7\n**9**": None,
    "7\nCorrection: 9": None,
    "It is fine. Score: 7\nFinal: 9": None,
    "Overall: 9\nScore: 7": None,
    "7\nGood. Overall score: 9": None,
    "It names 3.\nOverall: 9\nScore: 7": None,
    "There are 7.": None,
    "It is 7": None,
    "Dogs: 7": None,
    "7\nOn reflection: 9": None,
    "7\nIn conclusion, 9": None,
    "7\nClarity: 9\nDepth: 6": 7,
    "7\nThe number of dogs is 3.": 7,
    "7\n7": 7,
    "Score: 7\nOverall: 7": 7,
    "Overall: 7": 7,
    "Final: 7/10\nGood.": 7,
    "7\nOverall, it is good.": 7,
    "7\nIt names 3 of 4 things.": 7,
    "7\nOverall: it names 3 things.": 7,
    "7\n\n1. It names all.\n2. It is long.": 7,
}
GRADES: dict[str, float | None] = {
    "0.7": 0.7,
    "1.0": 1,
    "1": 1,
    "0": 0,
    ".5": 0.5,
    " 0.5\n": 0.5,
    "**0.7**": 0.7,
    "Correctness: 0.7": 0.7,
    "| 0.4 |": 0.4,
    "0.3 because it names one.": 0.3,
    "0.5/1.0": 0.5,
    "<think>1 of 2</think>0.5": 0.5,
    "０.５": 0.5,
    "Score (0 to 1): 0.5": 0.5,
    "0.5\nIt has 2 of 4 elements.": 0.5,
    "score: 0.5": 0.5,
    "0.5 or 0.6": None,
    "0.5-0.6": None,
    "-0.5": None,
    "−1": None,
    "0,5": None,
    "5": None,
    "10": None,
    "1/2": None,
    "1/10": None,
    "1 out of 10": None,
    "1%": None,
    "7/10": None,
    "1.5": None,
    "1 element is missing.": None,
    "The answer names 1 element.": None,
    "I found 1 error": None,
    "<think>0.5": None,
    "totally right": None,
    "": None,
    # a second verdict
    "0.5\n0.7": None,
    "Score: 0.5\nFinal: 0.7": None,
    "0.5\nOverall 0.7": None,
    "0.5\n1": None,
    "0\n1": None,
    "Correctness: 0.5\nFinal grade: 0.7": None,
    "0.5\nOn reflection: 0.7": None,
    "0.5\n0.5": 0.5,
    "0.5\nFinal: 0.5": 0.5,
    "Final: 0.5": 0.5,
    "0.5\nOne of 2 elements.": 0.5,
    "0.5\n\n1. One is missing.": 0.5,
}


@pytest.mark.parametrize("reply", PAIRS)
def test_two_scores(reply: str) -> None:
    assert parse_pair(reply) == PAIRS[reply]


@pytest.mark.parametrize("reply", MAY_BE_READ)
def test_what_may_be_left_unread_is_never_read_wrong(reply: str) -> None:
    assert parse_pair(reply) in (None, MAY_BE_READ[reply])


@pytest.mark.parametrize("reply", SINGLES)
def test_one_score(reply: str) -> None:
    assert parse_score(reply) == SINGLES[reply]


@pytest.mark.parametrize("reply", GRADES)
def test_a_grade(reply: str) -> None:
    assert parse_grade(reply) == GRADES[reply]


def test_llavas_own_rule_reads_numbers_that_are_numbers() -> None:
    assert parse_pair_strictly("-1 9") == (-1, 9)
    assert parse_pair_strictly("nan 9") is None


def test_thoughts_end_or_nothing_is_said() -> None:
    assert remove_reasoning("<think>a</think> b") == "b"
    assert remove_reasoning("<think>a") is None
    assert remove_reasoning("b") == "b"


def test_long_replies_take_no_time() -> None:
    for part in (
        "8 9\n",
        "(",
        "<think>",
        "a ",
        "8",
        "Assistant 1: ",
        "1 to 10 ",
        " ",
        "**",
        "of ",
        "- ",
        "8 out of ",
        "the (",
        "(",
    ):
        parse_pair(part * (99_000 // len(part)))
        parse_grade(part * (99_000 // len(part)))
    assert parse_pair("8 9\n" + "x" * 10**6) is None


FORMS = [
    "{a} {b}",
    "{a}, {b}",
    "Scores: {a} {b}",
    "Assistant 1: {a}\nAssistant 2: {b}",
    "Assistant 2: {b}\nAssistant 1: {a}",
    "A: {a}, B: {b}",
    "Second answer: {b}; first answer: {a}",
    "| Assistant 1 | {a} |\n| Assistant 2 | {b} |",
]
AROUND = [
    "",
    "Sure.",
    "Here are the scores:",
    "On a scale of 1 to 10:",
    "<think>{c} {a}</think>",
    "```",
    "---",
    "It has {c} legs and {d} eyes.",
    "Assistant 2 is better.",
    "**",
    "\u200b",
    "(1-10)",
    "10 being best",
]


def test_two_thousand_replies_that_are_put_together_are_read_right_or_not_at_all() -> None:
    draw, read = random.Random(7), 0
    for _ in range(2000):
        numbers = {name: draw.choice([*range(1, 11), 7.5]) for name in "abcd"}
        before, after = draw.choices(AROUND, k=2)
        reply = f"{before}\n{draw.choice(FORMS)}\n{after}".format(**numbers)
        if draw.random() < 0.3:
            reply = reply.replace(":", draw.choice(["：", " =", " –"])).replace("{a}", f"**{numbers['a']}**")
        found = parse_pair(reply)
        assert found in (None, (numbers["a"], numbers["b"])), reply
        read += found is not None
    assert read > 1200

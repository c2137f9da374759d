"""Guesses come from what was written before, only where they cannot change an answer, and stop where they fail."""

import random
from dataclasses import fields, replace

import pytest

from llava_ray.generate.builtin.drafts import DraftSource, count_accepted, may_draft
from llava_ray.generate.engine import Sampling


def source(ids: list[int], longest: int = 8) -> DraftSource:
    made = DraftSource(longest)
    made.extend(ids)
    return made


def test_a_guess_is_what_followed_the_last_time() -> None:
    text = [1, 2, 3, 4, 5, 6, 1, 2, 3]
    assert source(text).draft(8) == [4, 5]  # two at first
    assert source([1, 2, 3, 9, *text]).draft(8) == [4, 5]  # the last time
    assert source(text).draft(1) == [4]
    assert source(text[:-1]).draft(8) == []
    assert source([7, 7, 7, 7]).draft(8) == [7]
    assert source([]).draft(8) == source([1, 2, 3]).draft(8) == []


def test_images_match_nothing_and_are_never_guessed() -> None:
    image = [-200] * 6
    assert source([1, *image, 5, *image]).draft(8) == []
    assert source([1, 2, 3, 4, *image, 1, 2, 3]).draft(8) == [4]


def test_right_guesses_become_longer_and_wrong_ones_rare() -> None:
    made = source([*range(40), *range(3)])
    lengths = []
    for _ in range(4):
        draft = made.draft(8)
        lengths.append(len(draft))
        made.learn(len(draft), len(draft))
        made.extend([*draft, made.ids[-1] + len(draft) + 1])
    assert lengths == [2, 4, 8, 8]
    assert made.ids[40:] == list(range(len(made.ids) - 40))
    made.learn(8, 3)
    assert len(made.draft(8)) == 4
    waited = []
    for _ in range(4):
        made.learn(4, 0)
        count = 0
        while not made.draft(8):
            made.extend([(made.ids[-1] + 1) % 40])
            count += 1
            assert count < 40
        waited.append(count)
    assert waited == [1, 2, 4, 8]


def test_what_is_accepted_is_what_greedy_decoding_chose() -> None:
    assert count_accepted([1, 2, 3], [1, 2, 3, 4]) == 3
    assert count_accepted([1, 2, 3], [1, 9, 3, 4]) == 1
    assert count_accepted([1], [2, 2]) == 0
    assert count_accepted([], [2]) == 0


def test_guessing_never_changes_a_text() -> None:
    """A deterministic writer with any habits gets the same text with guesses as without."""
    for seed in range(200):
        draw = random.Random(seed)
        habits = {(a, b): draw.randrange(6) for a in range(6) for b in range(6)}

        def follow(
            text: list[int], habits: dict[tuple[int, int], int] = habits, odd: int = draw.randrange(3, 40)
        ) -> int:
            return (habits[text[-2], text[-1]] + (len(text) % odd == 0)) % 6

        prompt = [draw.randrange(6) for _ in range(draw.randint(2, 30))]
        plain = list(prompt)
        while len(plain) < 120:
            plain.append(follow(plain))
        text, made = list(prompt), source(prompt)
        while len(text) < 120:
            draft = made.draft(8)
            chosen = [follow([*text, *draft[:place]]) for place in range(len(draft) + 1)]
            accepted = count_accepted(draft, chosen)
            if draft:
                made.learn(len(draft), accepted)
            made.extend(chosen[: accepted + 1])
            text += chosen[: accepted + 1]
        assert text[:120] == plain


def test_only_plain_greedy_answers_are_guessed() -> None:
    assert may_draft(Sampling())
    assert may_draft(Sampling(max_tokens=3, top_p=0.5, top_k=2, stop=("x",), seed=1, ignore_eos=True))
    assert not may_draft(Sampling(temperature=0.5))
    assert not may_draft(Sampling(logprobs=0))


@pytest.mark.parametrize("name", [one.name for one in fields(Sampling)])
def test_a_setting_that_guesses_know_nothing_of_excludes_them(name: str) -> None:
    """New settings are harmful until someone says otherwise."""
    harmless = {"max_tokens", "temperature", "top_p", "top_k", "stop", "seed", "ignore_eos"}
    assert name in harmless or not may_draft(replace(Sampling(), **{name: object()}))

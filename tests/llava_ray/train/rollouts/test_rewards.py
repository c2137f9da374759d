"""Rewards of sampled answers: rules, patterns, benchmarks' scorers, one's own, and what is wrong with them."""

import numpy as np
import pytest

from llava_ray.config.grpo import GrpoConfig
from llava_ray.errors import ConfigError, TrainingError
from llava_ray.train.rollouts.rewards import Attempt, Rewards, as_question, contains, make_reward

CHOICE = "Which colour?\nA. red\nB. dark blue\nAnswer with the option's letter."


def attempt(answer: str, truth: str = "red", question: str = "Which colour is it?") -> Attempt:
    return Attempt("r1", question, truth, answer)


def double_length(attempts: list[Attempt]) -> list[float]:
    return [2.0 * len(one.answer) for one in attempts]


def one_too_few(attempts: list[Attempt]) -> list[float]:
    return [1.0] * (len(attempts) - 1)


def not_finite(attempts: list[Attempt]) -> list[float]:
    return [float("nan") if one.answer == "bad" else 1.0 for one in attempts]


def words_for_numbers(attempts: list[Attempt]) -> list[str]:
    return ["good"] * len(attempts)


def broken(attempts: list[Attempt]) -> list[float]:
    raise KeyError("nothing here")


def by_number(attempts: list[Attempt]) -> dict[int, float]:
    return {number: 1.0 for number, _ in enumerate(attempts)}


def too_large(attempts: list[Attempt]) -> list[int]:
    return [10**400 for _ in attempts]


def complex_numbers(attempts: list[Attempt]) -> list[np.complex64]:
    return [np.complex64(1) for _ in attempts]


def emptied(attempts: list[Attempt]) -> list[float]:
    attempts.clear()
    return []


NO_FUNCTION = 3


@pytest.mark.parametrize(
    ("name", "answer", "truth", "score"),
    [
        ("exact", " Red.", "red", 1),
        ("exact", "reddish", "red", 0),
        ("contains", "It is a RED circle.", "red", 1),
        ("contains", "It is reddish.", "red", 0),
        ("contains", "", "red", 0),
        ("contains", "It costs 3.5 (about).", "3.5", 1),
        ("number", "It is 12.", "12", 1),
        ("yes_no", "Yes, it is.", "yes", 1),
        ("format:(yes|no)", " yes\n", "no", 1),
        ("format:(yes|no)", "yes and no", "no", 0),
        ("format:<think>.*</think> .+", "<think>a\nb</think> c", "c", 1),
        ("gqa", "red", "red", 1),
        ("vqav2", "2", "two", 1),
        ("pope", "No, there is not.", "no", 1),
        (f"{__name__}:double_length", "red", "", 6),
    ],
)
def test_a_reward_is_what_its_rule_says(name: str, answer: str, truth: str, score: float) -> None:
    assert list(make_reward(name)([attempt(answer, truth)])) == [score]


@pytest.mark.parametrize("name", ["letter", "mmbench", "ai2d", "science_qa"])
@pytest.mark.parametrize("truth", ["B", "dark blue"])
def test_options_are_read_from_the_question(name: str, truth: str) -> None:
    answers = [attempt(answer, truth, CHOICE) for answer in ("B", "A", "B. dark blue")]
    assert list(make_reward(name)(answers)) == [1, 0, 1]
    assert as_question(answers[0]).options == ("red", "dark blue")
    assert as_question(attempt("B", "B", "Is it\nB. blue\nA. red")).options == (), "not in order: they are no options"


@pytest.mark.parametrize("name", ["yes_no", "pope", "mme", "hallusion_bench", "amber_discriminative"])
@pytest.mark.parametrize("truth", ["no", "No.", "NO", "no dog", "No, there is none."])
def test_a_record_that_answers_in_other_words_rewards_what_it_means(name: str, truth: str) -> None:
    answers = [attempt(answer, truth, "Is there a dog?") for answer in ("No.", "Yes.", truth)]
    assert list(make_reward(name)(answers)) == [1, 0, 1]


@pytest.mark.parametrize("name", ["letter", "mmbench", "ai2d", "science_qa", "mmstar"])
@pytest.mark.parametrize("truth", ["(B)", "B.", "B. dark blue", "dark blue", "The answer is B"])
def test_a_record_may_name_its_option_in_any_way(name: str, truth: str) -> None:
    answers = [attempt(answer, truth, CHOICE) for answer in ("B", "A", truth)]
    assert list(make_reward(name)(answers)) == [1, 0, 1]


@pytest.mark.parametrize("name", ["exact", "words", "vqa", "anls", "gqa", "vqav2", "textvqa"])
def test_options_do_not_change_a_rule_for_texts(name: str) -> None:
    good, letter, bad = make_reward(name)([attempt(answer, "red", CHOICE) for answer in ("red", "A", "dark blue")])
    assert good > 0 and letter == bad == 0


@pytest.mark.parametrize(("truth", "answer"), [("The answer is 5", "5"), ("5", "It is 5."), ("1,200", "1200")])
def test_a_records_number_is_read(truth: str, answer: str) -> None:
    assert list(make_reward("number")([attempt(answer, truth), attempt("7", truth)])) == [1, 0]


@pytest.mark.parametrize(
    ("name", "truth", "said"),
    [
        ("yes_no", "a dog", "gives the record's own answer 'a dog' to .* no reward"),
        ("letter", "red", "no reward"),  # without options in the question
        ("mathvista", "twelve or so", "no reward"),
        ("contains", ".", "has no word"),
    ],
)
def test_a_record_that_no_answer_could_match_is_named(name: str, truth: str, said: str) -> None:
    rewards = Rewards.of(GrpoConfig(rewards=(name,)))
    with pytest.raises(TrainingError, match=f"reward '{name}' failed for the answers to 'r1' to 'r1': .*{said}"):
        rewards.compute([attempt("x", truth)])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("exactly", "there is no benchmark 'exactly'; expected one of .*or exact, words.*module:function"),
        ("mm_vet", "given by a judge"),
        ("custom", "needs more than a question and its answer"),
        ("format:(", "is no regular expression"),
        ("format:" + "a" * 2000, "2000 characters"),
        ("no_such_module:f", "cannot be imported: .*no_such_module"),
        (f"{__name__}:missing", "cannot be imported"),
        (f"{__name__}:NO_FUNCTION", "is int; expected a function"),
        (":", "cannot be imported"),
    ],
)
def test_a_reward_that_cannot_be_used_is_named(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Rewards.of(GrpoConfig(rewards=(name,)))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("one_too_few", "returned 1 numbers for 2 answers"),
        ("not_finite", "is nan for the answer 'bad' to record 'r1'; expected a finite number"),
        ("words_for_numbers", "is 'good' for the answer 'red'"),
        ("by_number", "returned 0 numbers for 2 answers; return a list"),
        ("too_large", "is a number of 1,329 bits"),
        ("complex_numbers", "is np.complex64"),
        ("emptied", "returned 0 numbers for 2 answers"),
        ("broken", "failed for the answers to 'r1' to 'r1': .*nothing here"),
    ],
)
def test_a_reward_that_gives_no_finite_number_is_named_with_its_record(function: str, said: str) -> None:
    rewards = Rewards.of(GrpoConfig(rewards=("exact", f"{__name__}:{function}")))
    with pytest.raises(TrainingError, match=f"reward '{__name__}:{function}' {said}"):
        rewards.compute([attempt("red"), attempt("bad")])


def test_several_rewards_are_added_up_with_their_weights() -> None:
    rewards = Rewards.of(GrpoConfig(rewards=("exact", "format:.{3}"), reward_weights=(2.0, 0.5)))
    values = rewards.compute([attempt("red"), attempt("tea"), attempt("blue")])
    assert values.tolist() == [[1, 1], [0, 1], [0, 0]]
    assert rewards.add_up(values).tolist() == [2.5, 0.5, 0]
    assert rewards.add_up(values.reshape(1, 3, 2)).shape == (1, 3)
    assert Rewards.of(GrpoConfig()).add_up(np.ones((2, 1))).tolist() == [1, 1]
    assert contains("a b", "B") == 1

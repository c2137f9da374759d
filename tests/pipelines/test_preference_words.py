"""Object words are found in answers or listed in a file, and replaced by others of their kind."""

import re
from pathlib import Path

import pytest

from llava_ray.errors import DataError
from pipelines.preference_words import WordGroups, find_words, read_words, replace_words

ANIMALS = WordGroups((("dog", "cat", "owl"), ("red", "blue")))


def test_words_of_answers_are_objects_not_what_describes_them() -> None:
    found = find_words(
        ["a red bus and an old bridge", "The dog is beside a kite.", "Yes", "blue", "Red", "two dogs on the table"]
    )
    assert found.groups == (("blue", "red"), ("dog", "dogs", "kite", "table"))
    with pytest.raises(DataError, match=r"name no two objects; give a list of words \(preferences\.words\)"):
        find_words(["Yes", "no", "it is so"])


def test_a_file_has_one_kind_or_several(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("# animals\nDog\ncat\n\nowl\n")
    assert read_words(path).groups == (("dog", "cat", "owl"),)
    path.write_text("dog, cat , owl\nred, blue\nalone\n")
    assert read_words(path).groups == (("dog", "cat", "owl"), ("red", "blue"))
    for text in ("", "dog", "dog\ndog"):
        path.write_text(text)
        with pytest.raises(DataError, match="names no two words"):
            read_words(path)


@pytest.mark.parametrize("seed", range(8))
def test_a_word_becomes_another_of_its_kind(seed: int) -> None:
    text = "A dog sees the dog. Dog!"
    found = replace_words(text, ANIMALS, 1, seed)
    assert found in ("A cat sees the cat. Cat!", "An owl sees the owl. Owl!")
    assert found == replace_words(text, ANIMALS, 1, seed)


def test_what_text_or_truth_has_is_not_put_in() -> None:
    assert replace_words("a dog and a cat", ANIMALS, 1, 0) in ("an owl and a cat", "a dog and an owl")
    assert replace_words("a dog", ANIMALS, 1, 0, avoided="a cat") == "an owl"
    assert replace_words("a dog", ANIMALS, 1, 0, avoided="a cat, an owl") is None
    assert replace_words("nothing", ANIMALS, 1, 0) is None
    assert replace_words("dogma", ANIMALS, 1, 0) is None
    several = replace_words("a red dog", ANIMALS, 5, 0)
    assert several in ("a blue cat", "a blue owl")
    assert {replace_words("DOG", ANIMALS, 1, seed) for seed in range(9)} == {"CAT", "OWL"}


def test_two_words_are_not_replaced_by_the_same() -> None:
    words = WordGroups((("dog", "cat", "owl", "fox"),))
    for seed in range(10):
        found = replace_words("a dog and a cat", words, 2, seed)
        assert found is not None
        assert sorted(re.findall("owl|fox", found)) == ["fox", "owl"]

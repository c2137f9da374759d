"""Number words: "twenty-five" is 25, "third" is 3rd."""

import re

_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
ONES = {word: number for number, word in enumerate(f"{_ONES} seventeen eighteen nineteen".split())}
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
TENS = {word: 10 * number for number, word in enumerate(_TENS.split(), start=2)}
_LARGE = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
ORDINALS = {word: number for number, word in enumerate(_ORDINALS.split(), start=1)}
_ENDINGS = {1: "st", 2: "nd", 3: "rd"}

_WORD = "|".join(sorted([*ONES, *TENS, *_LARGE], key=len, reverse=True))
_NUMBER_WORDS = re.compile(
    rf"\b(?:an? (?=(?:hundred|thousand|million|billion|dozen)\b))?(?:{_WORD})(?:(?:[ -]| and )(?:{_WORD}))*\b(?!-\w)",
    re.IGNORECASE,
)
_ORDINAL = re.compile(rf"\b(?:{'|'.join(ORDINALS)})\b", re.IGNORECASE)


def digits_for_words(text: str) -> str:
    """Replace number words in a text by digits."""
    return _NUMBER_WORDS.sub(_digits, text)


def digits_for_ordinals(text: str) -> str:
    """Replace ordinals in a text, such as "third" by "3rd"."""
    return _ORDINAL.sub(lambda match: _ordinal(ORDINALS[match[0].lower()]), text)


def _ordinal(number: int) -> str:
    return f"{number}{_ENDINGS.get(number, 'th')}"


def _digits(match: re.Match[str]) -> str:
    words = [word for word in re.split(r"[ -]+", match[0].lower()) if word not in ("and", "a", "an")]
    if all(word in _LARGE for word in words) and not match[0].lower().startswith("a"):
        return match[0]  # "5 million" and "hundreds" are read where the digits are
    total = part = 0
    previous = ""
    for word in words:
        if word in _LARGE:
            if previous in _LARGE and not (previous == "hundred" and _LARGE[word] > _LARGE["hundred"]):
                return match[0]  # "thousand million" has its own arithmetic
            if _LARGE[word] > _LARGE["hundred"]:
                total, part = total + (part or 1) * _LARGE[word], 0
            else:
                part = (part or 1) * _LARGE[word]
        elif previous and previous not in _LARGE and not (previous in TENS and ONES.get(word, 0) in range(1, 10)):
            return match[0]  # "two three" are two numbers
        else:
            part += ONES.get(word, 0) + TENS.get(word, 0)
        previous = word
    return str(total + part)

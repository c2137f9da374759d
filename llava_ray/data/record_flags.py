"""Flags that exclude a record, turn or part from training: a record that sets one is rejected."""

from typing import Any

from llava_ray.data.record_words import ABOUT, words_of

WEIGHTS_FAULT = "weights are supported per turn only, as 0 or 1 in `weight`"
PREFERENCES_FAULT = 'preferences are learnt by an objective over pairs, such as train.objective = "dpo"'

# Words that exclude something from training when false, and when true.
_LEARNT = {
    "train", "training", "trainable", "learn", "learnt", "learnable", "supervise", "supervised", "loss", "weight",
    "mask", "masking",
}  # fmt: skip
_NOT_LEARNT = {
    "masked", "ignore", "ignored", "skip", "skipped", "exclude", "excluded", "unsupervised", "untrainable",
    "unlearnt",
}  # fmt: skip
_WANTED = {"preferred", "chosen", "desirable"}
_UNWANTED = {"rejected", "dispreferred", "undesirable"}
_PREFERENCE_NAMES = {"label", "kto_tag"}  # of KTO, with true or false
_NEGATIONS = {"no", "not", "non", "never", "dont", "without"}
_OF_QUESTIONS = {"input", "prompt", "question", "user", "human", "instruction"}  # which are never supervised anyway
_YES, _NO = {"true", "yes", "1", "on"}, {"false", "no", "0", "off"}


def is_flag(name: str) -> bool:
    """Return whether a key may exclude something from training."""
    words = set(words_of(name))
    if "_".join(words_of(name)) in _PREFERENCE_NAMES:
        return True
    is_other = words & (ABOUT - {"is", "has"}) or words & _OF_QUESTIONS
    return not is_other and bool(words & (_LEARNT | _NOT_LEARNT | _WANTED | _UNWANTED))


def find_flag_fault(name: str, value: Any) -> str | None:
    """Return why a flag that excludes something is rejected; None for one that agrees with what is done anyway."""
    if not is_flag(name):
        return None
    if "_".join(words_of(name)) in _PREFERENCE_NAMES:
        return PREFERENCES_FAULT if isinstance(value, bool) else None
    words, answer = set(words_of(name)), _answer(value)
    if words & (_LEARNT | _NOT_LEARNT):
        if isinstance(value, list | tuple) and value:
            return WEIGHTS_FAULT  # weights of pieces of the text
        negated = bool(words & _NOT_LEARNT) != bool(words & _NEGATIONS)
        return WEIGHTS_FAULT if answer is negated else None
    return PREFERENCES_FAULT if answer is bool(words & _UNWANTED) else None


def _answer(value: Any) -> bool | None:
    """Convert a value to true or false; None for neither, such as a fraction."""
    if isinstance(value, bool | int | float):
        return True if value == 1 else False if 0 <= value < 1 else None
    text = value.strip().lower() if isinstance(value, str) and len(value) < 20 else ""
    return True if text in _YES else False if text in _NO else None

"""The question that a record asks: the turns before its first, or its last, supervised answer."""

from collections.abc import Sequence

from llava_ray.chat.conversation import Turn, split_system


def first_question(turns: Sequence[Turn]) -> tuple[str | None, Sequence[Turn], Turn] | None:
    """Return the system prompt, the turns before the first supervised answer, and that answer; None without one.

    Calls of tools are no answer.
    """
    return _find_question(turns, 0)


def final_question(turns: Sequence[Turn]) -> tuple[str | None, Sequence[Turn], Turn] | None:
    """Return the same as `first_question` for the last supervised answer."""
    return _find_question(turns, -1)


def _find_question(turns: Sequence[Turn], which: int) -> tuple[str | None, Sequence[Turn], Turn] | None:
    system, spoken = split_system(turns)
    answers = [index for index, turn in enumerate(spoken) if turn.role == "gpt" and turn.supervised and not turn.calls]
    return (system, spoken[: answers[which]], spoken[answers[which]]) if answers else None

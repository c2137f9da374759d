"""The rubric of preferences: which of two answers is more faithful to the image."""

from llava_ray.review.rubric import Rubric, Rule

_SYSTEM = "You are a careful and impartial judge of answers about images."
_PROMPT = (
    "Rate how faithful to the image each of the two answers above is, on a scale of 1 to 10, 10 being best. Go through "
    "what each answer claims about objects, their number, colours, places, actions and written words, and check every "
    "claim against the image. What is not there, is wrong or cannot be seen counts heavily against an answer, however "
    "well it is written; then it counts whether the answer answers the question and misses nothing that was asked "
    "for. More words are no merit. If [Context] holds a reference answer, what contradicts it is wrong.\nOn the first "
    "line write only the two scores, of {role} 1 and of {role} 2, with a space between them; give equal scores to "
    "answers that are equally faithful. From the second line on, explain your ratings; do not let the order of the "
    "answers sway you."
)
_ROLE = "Assistant"


def build_faithfulness_rubric() -> Rubric:
    """Build our own rubric for pairs of answers about an image."""
    return Rubric("faithfulness", "pair", {"default": Rule(_PROMPT.format(role=_ROLE), _ROLE)}, _SYSTEM)

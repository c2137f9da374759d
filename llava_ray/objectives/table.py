"""The objectives by name. To add one, write its file beside this one and enter it here."""

from llava_ray.config.preference import PAIR_OBJECTIVES, PreferenceConfig
from llava_ray.objectives.cross_entropy import CrossEntropy
from llava_ray.objectives.objective import Objective
from llava_ray.objectives.preference import PairObjective


def build_objective(name: str, preference: PreferenceConfig | None = None) -> Objective:
    """Build the objective that ``train.objective`` names."""
    if name in PAIR_OBJECTIVES:
        return PairObjective(name, preference or PreferenceConfig())
    assert name == "cross_entropy", name
    return CrossEntropy()

"""The objectives by name. To add one, write its file beside this one and enter it here."""

from collections.abc import Mapping

from llava_ray.objectives.cross_entropy import CrossEntropy
from llava_ray.objectives.objective import Objective

OBJECTIVES: Mapping[str, Objective] = {"cross_entropy": CrossEntropy()}

"""The model: a vision tower, a projector and a language model, composed of ordinary parts. No ray.

``tower``, ``projector`` and ``llava`` are the modules, ``freezing`` says what learns. ``bundle`` puts them together
from a config and keeps them in one self-describing folder, which ``manifest`` describes. ``layouts`` finds out what
any model folder is, without torch; ``loading`` loads it, and ``inspection`` tells of it.
"""

"""The model: a vision tower, a projector and a language model, composed of ordinary parts. No ray.

``tower``, ``projector`` and ``llava`` are the modules, ``assembly`` puts them together from a config, ``bundle`` keeps
them in one self-describing folder (``manifest``), ``freezing`` says what learns.
"""

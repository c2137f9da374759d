"""Moved to ``llava_ray.quickstart.easy_vqa``; this path goes with version 0.3."""

from llava_ray.moved import forward

__getattr__ = forward(__name__)

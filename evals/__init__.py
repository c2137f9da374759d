"""Benchmarks: what to show, what to ask, what is right and how to add up. No ray, no torch, no model.

Part of the distribution llava_ray.
"""

"""Benchmarks: prompts, grading and aggregation, independent of Ray, torch and models.

Part of the distribution llava_ray.
"""

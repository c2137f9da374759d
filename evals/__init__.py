"""Benchmarks: prompts, grading and aggregation, independent of Ray, torch and models."""

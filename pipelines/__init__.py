"""The commands: each reads like prose, and each `main(arguments)` can be called.

Part of the distribution llava_ray.
"""

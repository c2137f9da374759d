"""The commands, each with a `main(arguments)` that can be called.

Part of the distribution llava_ray.
"""

"""LLaVA's visual instruction tuning, Ray-native, end to end.

The packages below this one are layers: each imports only those beneath it (the README draws them, and
import-linter holds them). Importing ``llava_ray`` does nothing.
"""

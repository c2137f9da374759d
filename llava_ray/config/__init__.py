"""The settings of a run: closed, frozen pydantic schemas and the loading of recipes. No torch, no ray.

``schema`` is the base of all sections, ``sections`` the settings, ``recipes`` TOML plus flags.
"""

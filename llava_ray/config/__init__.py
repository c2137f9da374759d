"""What a run can be told: closed, frozen pydantic schemas and the loading of recipes. No torch, no ray.

``schema`` is the base all sections share, ``sections`` the settings, ``recipes`` TOML plus flags.
"""

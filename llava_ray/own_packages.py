"""Whether the top-level packages ``evals`` and ``pipelines`` are ours: other distributions install such names too."""

import importlib.util
from pathlib import Path

import llava_ray
from llava_ray.errors import ConfigError

_OWN = ("evals", "pipelines")
_MARK = "Part of the distribution llava_ray."  # stands in the docstring of each package
_ALSO_INSTALLED_BY = {"evals": " (OpenAI's evals installs one)"}


def check_own_packages() -> None:
    """Raise ConfigError unless the packages that would be imported lie beside llava_ray and are its own.

    Another distribution in the same environment replaces files of ours in place, so where they lie says too little.
    """
    root = Path(llava_ray.__file__).resolve().parents[1]
    for name in _OWN:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"the package {name!r}, which belongs to llava_ray, is not beside it in {root}; install llava_ray "
                "again: pip install --force-reinstall --no-deps llava_ray"
            )
        found = Path(spec.origin).resolve()
        if found.parents[1] != root or _MARK not in found.read_text(encoding="utf-8", errors="replace"):
            raise ConfigError(
                f"{name!r} is {found}, which is not llava_ray's: two packages share the name "
                f"{name!r}{_ALSO_INSTALLED_BY.get(name, '')}. Give llava_ray an environment of its own, or uninstall "
                "the other and install llava_ray again; if that file lies in the folder where you are or on "
                "PYTHONPATH, start from another folder or take it off PYTHONPATH."
            )

"""Import paths that moved work for one version and say where their names are now."""

import importlib
import subprocess
import sys
import warnings

import pytest

from llava_ray.moved import MOVED

NAMES = [(module, name) for module, names in MOVED.items() for name in names]


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{module}.{name}" for module, name in NAMES])
def test_an_old_path_gives_the_very_object_and_warns_where_it_is_imported(module, name):
    new_module, _, renamed = MOVED[module][name].partition(":")
    namespace: dict[str, object] = {}
    with pytest.warns(DeprecationWarning) as caught:
        exec(compile(f"from {module} import {name}", "someones_script.py", "exec"), namespace)
    assert namespace[name] is getattr(importlib.import_module(new_module), renamed or name)
    [warning] = caught
    assert warning.filename == "someones_script.py"
    assert f"{module}.{name} is {new_module}.{renamed or name} now" in str(warning.message)


def test_an_old_path_has_no_other_names():
    for module in MOVED:
        with pytest.raises(ImportError, match="cannot import name 'nothing'"):
            exec(f"from {module} import nothing")


def test_importing_an_old_module_warns_of_nothing_and_loads_nothing():
    program = [sys.executable, "-W", "error", "-c", f"import sys, {', '.join(MOVED)}; print(*sys.modules)"]
    ran = subprocess.run(program, capture_output=True, text=True, check=True)
    assert not {"torch", "ray", "transformers"} & set(ran.stdout.split())


@pytest.mark.slow
def test_what_the_readme_named_is_where_it_was():
    named = {"llava_ray.model.loading": ["load_pretrained_model"], "llava_ray.chat.templates": ["find_template"]}
    named["llava_ray.deployments"] = ["app", "api", "page"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r"(llava_ray|evals)\.")
        for module, names in named.items():
            assert all(callable(getattr(importlib.import_module(module), name)) for name in names)

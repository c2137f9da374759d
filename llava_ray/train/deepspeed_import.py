"""The import of DeepSpeed, without what only its autotuner uses."""

import sys
from types import ModuleType
from typing import Any


def import_deepspeed() -> Any:
    """Import DeepSpeed and return it.

    Its autotuner imports MLflow, where it is installed, which takes longer than DeepSpeed itself. It does without if it
    finds none, so it finds none: unless MLflow is imported already, and only until DeepSpeed is.
    """
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # importing it raises ImportError
    try:
        import deepspeed
    finally:
        if hidden:
            del sys.modules["mlflow"]
    module: ModuleType = deepspeed
    return module

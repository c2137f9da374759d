"""DeepSpeed's import leaves out what only its autotuner needs."""

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(("before", "expected"), [("", "False"), ("import mlflow", "True")])
def test_mlflow_is_neither_imported_nor_lost(before, expected):
    code = f"""
import os, sys
os.environ.update(DS_ACCELERATOR="cpu", TORCHDYNAMO_DISABLE="1")
{before}
from llava_ray.train.deepspeed_import import import_deepspeed
deepspeed = import_deepspeed()
print("mlflow" in sys.modules, callable(deepspeed.initialize))
import mlflow
assert mlflow.MlflowClient
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == [expected, "True"]

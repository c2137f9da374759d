"""Let torchvision be imported beside a CPU build of torch, in the environment of ``make test-vllm``.

vLLM's LLaVA imports torchvision, and its published wheel holds its operators for CUDA only: without CUDA their schemas
are missing and the import fails. They are declared here, in the installed package, for every process that vLLM starts;
nobody calls them.
"""

import sysconfig
from pathlib import Path

DECLARED = """\
from torch import library  # added by tests/vllm_environment.py

_schemas = library.Library("torchvision", "DEF")
_schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def declare() -> None:
    """Put the declarations at the beginning of torchvision, once."""
    package = Path(sysconfig.get_path("purelib")) / "torchvision" / "__init__.py"
    code = package.read_text()
    if not code.startswith(DECLARED):
        package.write_text(DECLARED + code)


if __name__ == "__main__":
    declare()

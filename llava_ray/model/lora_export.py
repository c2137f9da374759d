"""Export of an adapter alone in the original LLaVA's layout, and of a merged model."""

import shutil
from pathlib import Path

import torch

from llava_ray.errors import ModelError
from llava_ray.model.formats.declared_sizes import read_config
from llava_ray.model.formats.export_folder import Exported, check_not_existing, new_folder, write_json_file
from llava_ray.model.formats.layout import ADAPTER_CONFIG, ADAPTER_FILE, ADAPTER_FOLDER, NON_LORA_FILE, PROJECTOR_FILE
from llava_ray.model.formats.manifest import is_bundle, read_manifest
from llava_ray.model.formats.names import IMAGE_NEWLINE, PROJECTOR_PREFIX
from llava_ray.model.formats.original.names import PEFT_PREFIX, to_original
from llava_ray.model.formats.original.settings import TYPES, write_llava_settings, write_original_settings
from llava_ray.model.formats.part_configs import fill_defaults
from llava_ray.model.formats.sources import find_source
from llava_ray.model.lora.adapter_files import read_adapter
from llava_ray.model.tensors.tensor_files import read_json_object
from llava_ray.model.tensors.weight_files import read_weight_file
from llava_ray.reading import is_file, short_repr

_WRITTEN = (ADAPTER_CONFIG, ADAPTER_FILE)


def export_adapter(model: str | Path, output: str | Path, model_base: str | None = None) -> Exported:
    """Write a bundle's adapter as the original's LoRA folder: PEFT's files, non_lora_trainables.bin and config.json.

    The language model is not read, only its config. Raises ModelError for a bundle without an adapter.
    """
    folder = Path(model)
    manifest = read_manifest(folder)
    adapter = folder / ADAPTER_FOLDER
    absent = [name for name in _WRITTEN if not is_file(adapter / name)]
    if absent:
        raise ModelError(
            f"adapter: {adapter / absent[0]} is not there; the model was tuned as a whole, or is merged already. "
            "Export it with hub or original."
        )
    base = find_source(model_base or manifest.language_model.base, "language model", weights=False).folder
    read_adapter(adapter)  # raises if it is damaged or holds NaN
    language = fill_defaults(read_config(base / "config.json"), str(base / "config.json"))
    unused: dict[str, object] = {}
    if language["model_type"] in TYPES:
        config = write_original_settings(manifest, language, unused)
    else:
        config = {**language, **write_llava_settings(manifest, unused)}
    trainables = {
        PEFT_PREFIX + to_original(name if name == IMAGE_NEWLINE else PROJECTOR_PREFIX + name): tensor.load().clone()
        for name, tensor in read_weight_file(folder / PROJECTOR_FILE).items()
    }
    with new_folder(output) as new:
        for name in _WRITTEN:
            shutil.copyfile(adapter / name, new / name)
        torch.save(trainables, new / NON_LORA_FILE)
        write_json_file(new / "config.json", config)
    return Exported(Path(output), (f"its base is {manifest.language_model.base}, which has to be given with it",))


def export_merged(
    model: str | Path,
    output: str | Path,
    *,
    model_base: str | None = None,
    vision_tower: str | None = None,
    version: str | None = None,
) -> Exported:
    """Merge an adapter into its language model, in the base's own dtype, and write the whole as a bundle.

    ``model`` is a bundle with an adapter or a LoRA folder of the original's. The logits of a fixed text are compared
    before and after. Raises ModelError if they differ, or if there is no adapter.
    """
    from llava_ray.model.assembly import merge
    from llava_ray.model.loading import load_pretrained_model
    from llava_ray.model.saving import save_bundle

    check_not_existing(output)
    parts = load_pretrained_model(
        model, model_base, vision_tower=vision_tower, version=version, dtype=base_dtype(Path(model), model_base)
    )
    save_bundle(output, merge(parts), training=parts.manifest.training)
    return Exported(Path(output), ("the logits of a fixed text are those of base and adapter",))


def base_dtype(model: Path, model_base: str | None) -> torch.dtype:
    """Return the dtype that the config of an adapter's base names; fp32 where it names none. Raises ModelError."""
    named = model_base
    if named is None and is_bundle(model):
        named = read_manifest(model).language_model.base
    if named is None:
        named = read_json_object(model / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not named:
        raise ModelError(f"{model} does not name the base of its adapter; say where it is with --model_base.")
    file = find_source(named, "language model", weights=False).folder / "config.json"
    config = read_config(file)
    name = config.get("dtype", config.get("torch_dtype")) or "float32"
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(f"{file}: dtype is {short_repr(name)}, expected one such as bfloat16; fix it.")
    return dtype

"""Export to GGUF: the language model and ``mmproj``, which llama.cpp's multimodal programs load together."""

from pathlib import Path

from llava_ray.chat.templates import CHAT_TEMPLATE
from llava_ray.model.formats.export_folder import Exported, new_folder, with_vocabulary
from llava_ray.model.formats.gguf.files import TensorType, import_gguf
from llava_ray.model.formats.gguf.language_file import check_language_model_for_gguf, write_language_model
from llava_ray.model.formats.gguf.vision_file import check_vision_for_gguf, write_vision
from llava_ray.model.formats.model_files import ModelFiles


def export_gguf(
    model: ModelFiles, output: str | Path, wanted: TensorType = "f16", *, language_model_only: bool = False
) -> Exported:
    """Write ``model-TYPE.gguf`` and ``mmproj-TYPE.gguf`` to a new folder.

    Raises ModelError, naming the part, for what llama.cpp does not read; nothing is written then.
    """
    import_gguf()
    model, _ = with_vocabulary(model, "truncated")
    check_language_model_for_gguf(model)
    if not language_model_only:
        check_vision_for_gguf(model)
    of_tower = "f32" if wanted == "f32" else "f16"
    with new_folder(output) as new:
        write_language_model(model, new / f"model-{wanted}.gguf", wanted)
        if not language_model_only:
            write_vision(model, new / f"mmproj-{of_tower}.gguf", wanted)
    return Exported(Path(output), tuple(_notes(model, language_model_only=language_model_only)))


def _notes(model: ModelFiles, *, language_model_only: bool) -> list[str]:
    notes = []
    if model.manifest.version != CHAT_TEMPLATE:
        notes.append(
            f"the model was trained with the template {model.manifest.version!r}, which the file does not hold: give "
            "llama.cpp its own, such as --chat-template vicuna for 'v1'"
        )
    if not language_model_only and model.manifest.image_aspect_ratio != "pad":
        notes.append(
            f"llama.cpp pads images to squares, and the model was trained with image_aspect_ratio "
            f"{model.manifest.image_aspect_ratio!r}: answers about other images than squares differ"
        )
    return notes

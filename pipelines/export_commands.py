"""The subcommands of `export`. Each imports what it needs: torch takes seconds, and ``run_inspect`` needs none."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from llava_ray.errors import ConfigError
from pipelines.approximation import Approximation, bring_near
from pipelines.places import check_export

if TYPE_CHECKING:
    from llava_ray.model.formats.export_folder import Exported
    from llava_ray.model.formats.model_files import ModelFiles


@dataclass(frozen=True)
class ModelArguments:
    """Flags for facts that a folder does not record."""

    model_base: str | None = None
    """Folder of the language model that a bundle only references."""
    vision_tower: str | None = None
    """Folder of the vision tower."""
    version: str | None = None
    """Conversation template by LLaVA's name, for layouts that do not record it."""


_Model = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
_Base = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BASE")]
_Checkpoint = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
_Delta = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DELTA")]
_Output = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]
_BaseOrOutput = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="[BASE] OUTPUT")]
_OptionalOutput = Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="")]
_Parts = Annotated[ModelArguments, tyro.conf.OmitArgPrefixes]
_NOTHING = ModelArguments()
_Near = Annotated[Approximation, tyro.conf.OmitArgPrefixes]
_AS_IT_IS = Approximation()


def run_inspect(path: _Model, *, json: bool = False) -> None:
    """Inspect a folder: print its parts, sizes, template, and missing files.

    Args:
        path: A folder with a model in any layout.
        json: Say it as one JSON object.
    """
    from llava_ray.model.formats.inspection import inspect as look
    from llava_ray.model.formats.inspection import render_inspection

    found = look(path)
    print(found.to_json() if json else render_inspection(found))


def hub(
    model: _Model,
    output: _Output,
    given: _Parts = _NOTHING,
    *,
    vocabulary: Literal["auto", "kept", "padded", "truncated"] = "auto",
    transformers_only: bool = False,
    near: _Near = _AS_IT_IS,
) -> None:
    """Write the layout of llava-hf, which transformers, old and new, and vLLM load.

    Args:
        model: A bundle, or a model in the original or the hub layout.
        output: A folder that is not there yet.
        given: What the folder does not say of itself.
        vocabulary: Rows of the table: as they are (kept), up to a multiple of 64 with room for <image> (padded), only
            the language model's own (truncated), or padded only where there is no room (auto).
        transformers_only: Export also what vLLM does not take, as it is: the way without loss.
        near: Whether a tower may be written in another form.
    """
    near.check()
    check_export(model, output)
    from llava_ray.model.formats.hub.write import export_hub

    opened = _open_given(model, given)
    if near.approximate:
        from llava_ray.model.loading import load_pretrained_model

        opened = bring_near(lambda: load_pretrained_model(model, **vars(given)), opened, near)
    _print_export(export_hub(opened, output, vocabulary, for_vllm=not transformers_only))


def original(
    model: _Model, output: _Output, given: _Parts = _NOTHING, *, vocabulary: Literal["kept", "truncated"] = "truncated"
) -> None:
    """Write the layout of liuhaotian/llava-v1.5, with the tower in its folder vision_tower.

    Args:
        model: A bundle, or a model in the original or the hub layout.
        output: A folder that is not there yet.
        given: What the folder does not say of itself.
        vocabulary: Leave out the rows that the hub layout adds (truncated), or keep them.
    """
    check_export(model, output)
    from llava_ray.model.formats.original.write import export_original

    _print_export(export_original(_open_given(model, given), output, vocabulary))


def gguf(
    model: _Model,
    output: _Output,
    given: _Parts = _NOTHING,
    *,
    type: Literal["f32", "f16", "bf16", "q8_0"] = "f16",
    language_model_only: bool = False,
) -> None:
    """Write llama.cpp's files: the language model, and mmproj, its eyes (a CLIP or SigLIP tower and the projector).

    Args:
        model: A bundle, or a model in the original or the hub layout.
        output: A folder that is not there yet.
        given: What the folder does not say of itself.
        type: Precision of the language model's matrices; mmproj is in f32 or f16.
        language_model_only: Leave out mmproj, for a tower or projector that llama.cpp does not read.
    """
    check_export(model, output)
    from llava_ray.model.formats.gguf.write import export_gguf

    _print_export(export_gguf(_open_given(model, given), output, type, language_model_only=language_model_only))


def bundle(
    model: _Model, output: _Output, given: _Parts = _NOTHING, *, vocabulary: Literal["kept", "truncated"] = "truncated"
) -> None:
    """Write a llava_ray bundle with all parts inside.

    Args:
        model: A bundle, or a model in the original or the hub layout.
        output: A folder that is not there yet.
        given: What the folder does not say of itself.
        vocabulary: Leave out the rows that the hub layout adds (truncated), or keep them.
    """
    check_export(model, output)
    from llava_ray.model.formats.bundle.write import export_bundle

    _print_export(export_bundle(_open_given(model, given), output, vocabulary))


def projector(model: _Model, output: _Output, given: _Parts = _NOTHING) -> None:
    """Write the projector alone: mm_projector.bin and its config.json, as LLaVA's first stage leaves them."""
    check_export(model, output)
    from llava_ray.model.formats.original.write import export_projector

    _print_export(export_projector(_open_given(model, given), output))


def adapter(model: _Model, output: _Output, *, model_base: str | None = None) -> None:
    """Write a bundle's adapter alone, as LLaVA's LoRA folder."""
    check_export(model, output)
    from llava_ray.model.lora_export import export_adapter

    _print_export(export_adapter(model, output, model_base))


def run_merge(model: _Model, output: _Output, given: _Parts = _NOTHING) -> None:
    """Merge an adapter into its language model, compare logits before and after, and write a bundle.

    Args:
        model: A bundle with an adapter, or a LoRA folder of the original's.
        output: A folder that is not there yet.
        given: What the folder does not say of itself.
    """
    check_export(model, output)
    from llava_ray.model.lora_export import export_merged

    _print_export(export_merged(model, output, **vars(given)))


def run_consolidate(checkpoint: _Checkpoint, output: _Output) -> None:
    """Write the model of a run's checkpoint (step-… in its folder) as a bundle."""
    check_export(checkpoint, output)
    from llava_ray.model.formats.export_folder import Exported
    from llava_ray.train.consolidation import consolidate as gather

    gather(checkpoint, output)
    _print_export(Exported(output))


def run_make_delta(
    model: _Model, base_or_output: _BaseOrOutput, output: _OptionalOutput = None, *, model_base: Path | None = None
) -> None:
    """Write a model as its exact difference from the language model that it was tuned from.

    MODEL OUTPUT --model_base BASE, as the other subcommands take them, or MODEL BASE OUTPUT.

    Args:
        model: A bundle, or a model in the original or the hub layout.
        base_or_output: A folder that is not there yet; or the base, if OUTPUT follows.
        output: A folder that is not there yet.
        model_base: The language model that it was tuned from.
    """
    from llava_ray.model.formats.deltas import make_delta as make
    from llava_ray.model.formats.layout import LayoutKind
    from llava_ray.model.formats.layouts import read_layout

    base, written = (model_base, base_or_output) if output is None else (base_or_output, output)
    if base is None or (output is not None and model_base is not None):
        raise ConfigError("make-delta takes MODEL OUTPUT --model_base BASE, or MODEL BASE OUTPUT")
    kinds = [read_layout(folder).kind for folder in (model, base)]
    if kinds[0] is LayoutKind.LANGUAGE_MODEL != kinds[1]:
        raise ConfigError(
            f"{model} is a plain language model and {base} is not: make-delta takes the model before its base, "
            f"make-delta {base} {model} {written}"
        )
    _print_export(make(base, model, written))


def run_apply_delta(base: _Base, delta: _Delta, output: _Output) -> None:
    """Build a model from a delta and its base, which is verified."""
    from llava_ray.model.formats.deltas import apply_delta as apply

    _print_export(apply(base, delta, output))


def _open_given(model: Path, given: ModelArguments) -> "ModelFiles":
    """Open a model with the given parts."""
    from llava_ray.model.formats.model_opening import open_model

    opened = open_model(model, **vars(given))
    for note in opened.notes:
        print(f"Note: {note}")
    return opened


def _print_export(exported: "Exported") -> None:
    """Print the path of an export, and notes about it."""
    print(f"Written to {exported.folder}")
    for note in exported.notes:
        print(f"  {note}")

"""Models with one file damaged, through all that reads models: an error of ours or the model, never anything else."""

import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import damage
from fuzzing import NUM_INPUTS, fuzz, fuzz_at_length

from llava_ray.errors import LlavaRayError

NUM_EXPORTS = 1000


def make_folders(root: Path) -> dict[str, Path]:
    """Write tiny models in every layout, with what their loading has to be told beside them."""
    from fakes import make_language_model, make_vision_tower
    from originals import write_hub, write_lora, write_original, write_projector_only

    from llava_ray.config.lora import LoraConfig
    from llava_ray.config.model import ModelConfig
    from llava_ray.model.assembly import assemble
    from llava_ray.model.formats.deltas import make_delta
    from llava_ray.model.formats.hub.write import export_hub
    from llava_ray.model.formats.model_opening import open_model
    from llava_ray.model.lora.adapters import add_adapter
    from llava_ray.model.saving import save_bundle

    small = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 16}
    base = make_language_model(root / "base", **small)
    tower = make_vision_tower(root / "tower", hidden_size=16)
    config = ModelConfig(model_name_or_path=str(base), vision_tower=str(tower))
    parts = assemble(config, "pad")
    folders = {name: root / name for name in ("bundle", "original", "bin", "shards", "hub", "exported", "lora")}
    folders |= {name: root / name for name in ("projector", "adapter", "named", "delta")}
    save_bundle(folders["bundle"], parts)
    save_bundle(folders["named"], parts, include="projector")
    write_original(folders["original"], parts)
    write_original(folders["bin"], parts, ending="bin", with_tower=True)
    write_original(folders["shards"], parts, num_shards=2)
    write_hub(folders["hub"], parts)
    write_lora(folders["lora"], parts, ending="bin")
    write_projector_only(folders["projector"], parts)
    export_hub(open_model(folders["bundle"]), folders["exported"])
    make_delta(base, folders["bundle"], folders["delta"])
    add_adapter(parts.llava.language_model, LoraConfig(lora_enable=True, lora_r=2), 0)
    save_bundle(folders["adapter"], parts)
    return folders


def arguments_of(name: str, root: Path) -> dict[str, Any]:
    """Return what a folder of that kind does not say itself."""
    if name in ("bundle", "named", "adapter"):
        return {}
    given: dict[str, Any] = {} if name == "exported" else {"version": "v1"}
    given |= {"vision_tower": str(root / "tower")} if name not in ("hub", "exported") else {}
    return given | ({"model_base": str(root / "base")} if name in ("lora", "projector") else {})


def make_damaged(root: Path) -> Callable[[int, tuple[str, ...]], tuple[str, Path, random.Random]]:
    """Return a function from a seed to a copy of a model with one damaged file."""
    folders = make_folders(root)

    def damaged(seed: int, kinds: tuple[str, ...]) -> tuple[str, Path, random.Random]:
        generator = random.Random(seed)
        name = generator.choice([kind for kind in folders if kind in kinds or not kinds])
        copy = root / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folders[name], copy)
        file = generator.choice(sorted(path for path in copy.rglob("*") if path.is_file()))
        content = damage(generator, file)
        if content is None:
            file.unlink()
        elif generator.random() < 0.02:
            file.unlink()
            file.symlink_to(generator.choice(["/dev/zero", "/etc", str(file), "/proc/self/environ", "nowhere"]))
        else:
            file.write_bytes(content)
        return name, copy, generator

    return damaged


def silence() -> None:
    """Let libraries keep what they would say of each input to themselves."""
    import logging

    import transformers

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()


def make_reader() -> Callable[[int], str]:
    """Return what inspects, plans and loads a damaged model."""
    silence()
    from llava_ray.model.formats.inspection import inspect
    from llava_ray.model.loading import load_pretrained_model, read_pretrained_blueprint

    root = Path(tempfile.mkdtemp())
    damaged = make_damaged(root)
    kinds = ("bundle", "original", "bin", "shards", "hub", "exported", "lora", "projector", "adapter", "named")

    def read(seed: int) -> str:
        name, folder, _ = damaged(seed, kinds)
        outcomes, given = [], arguments_of(name, root)
        for verb in (inspect, (read_pretrained_blueprint, load_pretrained_model)[seed % 2]):
            try:
                verb(folder, **({} if verb is inspect else given))
                outcomes.append("read")
            except LlavaRayError as error:
                check_words(error)
                outcomes.append("refused")
        return " ".join(outcomes)

    return read


def check_words(error: LlavaRayError) -> None:
    """Fail for a message that nobody could read."""
    text = str(error)
    assert len(text) < 4000, text[:300]
    assert text.strip()


def make_exporter() -> Callable[[int], str]:
    """Return what exports a damaged model by one of the verbs."""
    silence()
    from llava_ray.model.formats.bundle.write import export_bundle
    from llava_ray.model.formats.deltas import apply_delta, make_delta
    from llava_ray.model.formats.hub.write import export_hub
    from llava_ray.model.formats.model_opening import open_model
    from llava_ray.model.formats.original.write import export_original, export_projector
    from llava_ray.model.lora_export import export_adapter, export_merged
    from llava_ray.train.consolidation import consolidate

    root = Path(tempfile.mkdtemp())
    damaged, base = make_damaged(root), root / "base"
    whole = ("bundle", "original", "bin", "shards", "hub", "exported")
    verbs: dict[str, tuple[tuple[str, ...], Callable[..., object]]] = {
        "bundle": (whole, lambda folder, out, **given: export_bundle(open_model(folder, **given), out)),
        "hub": (whole, lambda folder, out, **given: export_hub(open_model(folder, **given), out)),
        "original": (whole, lambda folder, out, **given: export_original(open_model(folder, **given), out)),
        "projector": (whole, lambda folder, out, **given: export_projector(open_model(folder, **given), out)),
        "adapter": (("adapter",), lambda folder, out, **_: export_adapter(folder, out)),
        "merge": (("adapter", "lora"), lambda folder, out, **given: export_merged(folder, out, **given)),
        "consolidate": (("named",), lambda folder, out, **_: consolidate(as_checkpoint(folder), out)),
        "make-delta": (whole, lambda folder, out, **_: make_delta(base, folder, out)),
        "apply-delta": (("delta",), lambda folder, out, **_: apply_delta(base, folder, out)),
    }

    def export(seed: int) -> str:
        verb = random.Random(-seed - 1).choice(list(verbs))
        kinds, run = verbs[verb]
        name, folder, _ = damaged(seed, kinds)
        shutil.rmtree(root / "output", ignore_errors=True)
        try:
            run(folder, root / "output", **arguments_of(name, root))
        except LlavaRayError as error:
            check_words(error)
            assert not (root / "output").exists()
            return f"{verb} refused"
        return f"{verb} written"

    return export


def as_checkpoint(model: Path) -> Path:
    """Put a model where a run's checkpoint has it."""
    from llava_ray.model.formats.layout import COMPLETE, TRAINER_STATE
    from llava_ray.train.checkpoints import MODEL_FOLDER, ZERO_TAG

    folder = model.with_name("checkpoint")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / ZERO_TAG).mkdir(parents=True)
    for name in (COMPLETE, "rng_rank0.pt", f"{ZERO_TAG}/mp_rank_00_model_states.pt"):
        (folder / name).touch()
    (folder / TRAINER_STATE).write_text('{"world_size": 1, "zero_stage": 0, "config": {}}')
    model.rename(folder / MODEL_FOLDER)
    return folder


@pytest.mark.slow
def test_damaged_models_are_read_or_refused() -> None:
    report = fuzz("checkpoints", make_reader, NUM_INPUTS)
    assert not report.faults
    assert report.num_inputs == NUM_INPUTS


@pytest.mark.verify
@pytest.mark.timeout(7200)
def test_damaged_models_are_read_or_refused_at_length() -> None:
    report = fuzz_at_length("checkpoints", make_reader)
    assert not report.faults


@pytest.mark.verify
@pytest.mark.timeout(7200)
def test_damaged_models_are_exported_or_refused() -> None:
    report = fuzz_at_length("checkpoint_exports", make_exporter, NUM_EXPORTS)
    assert not report.faults

"""Adapters over one base in one running batch: each request is answered as its merged model alone would have."""

import asyncio
import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engines import (
    answer_all,
    ask,
    by_transformers,
    count_differing,
    make_image,
    make_parts,
    make_requests,
    merged,
    request,
    started,
    write_adapter,
)

from llava_ray.errors import BundleError, ModelError, RecordError
from llava_ray.generate.engine import GenerationRequest
from llava_ray.generate.served_adapters import load_beside
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.formats.layout import ADAPTER_FOLDER
from llava_ray.model.loading import load_pretrained_model

pytestmark = pytest.mark.slow

ADAPTERS: dict[str, dict[str, object]] = {
    "plain": {"seed": 1},
    "seeing": {"seed": 2, "own_projector": True, "lora_r": 3},
    "dora": {"seed": 3, "use_dora": True, "lora_target_modules": ("q_proj", "up_proj", "down_proj")},
    "looking": {"seed": 5, "own_tower": True},
    "rslora": {"seed": 4, "use_rslora": True, "lora_r": 6, "lora_target_modules": ("lm_head", "v_proj")},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def base(root: Path) -> LlavaParts:
    return make_parts(root)


@pytest.fixture(scope="module")
def folders(root: Path, base: LlavaParts) -> dict[str, Path]:
    return {name: write_adapter(root / name, make_parts(root), **settings) for name, settings in ADAPTERS.items()}  # type: ignore[arg-type]


def named(asked: list[GenerationRequest], names: list[str | None]) -> list[GenerationRequest]:
    """The requests, each of the next adapter."""
    return [replace(one, model=names[index % len(names)]) for index, one in enumerate(asked)]


def differing(base: LlavaParts, folders: Mapping[str, Path], asked: list[GenerationRequest], **settings: object) -> int:
    """How many answers differ where rounding may decide; any other difference fails."""
    wholes = {None: base} | {name: merged(folder) for name, folder in folders.items()}
    expected = [by_transformers(wholes[one.model], one) for one in asked]
    draw = random.Random(1)
    delays = [draw.uniform(0, 0.3) for _ in asked]
    return count_differing(answer_all(base, asked, delays, folders, **settings), expected)


def test_requests_of_all_adapters_in_one_batch_equal_the_merged_models(
    base: LlavaParts, folders: dict[str, Path]
) -> None:
    asked = named(make_requests(50, seed=7), [None, *folders])
    alone = [by_transformers(base, replace(one, model=None)) for one in asked]
    print(f"{differing(base, folders, asked, max_running=20, prefill_chunk=40)} of 50 answers differ by rounding")
    answers = answer_all(base, asked, adapters=folders)
    others = [a.ids != e.ids for one, a, e in zip(asked, answers, alone, strict=True) if one.model is not None]
    assert sum(others) > 30  # the adapters do say something else
    assert all(a.ids == e.ids for one, a, e in zip(asked, answers, alone, strict=True) if one.model is None)


def test_biases_that_learnt_are_the_adapters_alone(tmp_path: Path) -> None:
    base = make_parts(tmp_path, "qwen2")
    folders = {
        "all": write_adapter(
            tmp_path / "all", make_parts(tmp_path, "qwen2"), seed=5, lora_bias="all", lora_target_modules=("o_proj",)
        ),
        "own": write_adapter(
            tmp_path / "own",
            make_parts(tmp_path, "qwen2"),
            seed=6,
            lora_bias="lora_only",
            lora_target_modules=("q_proj",),
        ),
    }
    before = {name: tensor.clone() for name, tensor in base.llava.state_dict().items()}
    assert differing(base, folders, named(make_requests(12, seed=8), [None, "all", "own"])) == 0
    after = base.llava.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_base_with_an_adapter_of_its_own(root: Path, folders: dict[str, Path]) -> None:
    base = load_pretrained_model(folders["seeing"])
    base.llava.language_model.generation_config.eos_token_id = 2
    modules = dict(base.llava.named_modules())
    asked = named(make_requests(12, seed=9), [None, "plain", "dora"])
    others = {name: folders[name] for name in ("plain", "dora")}
    wholes = {None: merged(folders["seeing"])} | {name: merged(folder) for name, folder in others.items()}
    for whole in wholes.values():
        whole.llava.language_model.generation_config.eos_token_id = 2
    expected = [by_transformers(wholes[one.model], one) for one in asked]
    assert count_differing(answer_all(base, asked, adapters=others), expected) == 0
    assert dict(base.llava.named_modules()) == modules


def test_a_bare_peft_folder(base: LlavaParts, folders: dict[str, Path], root: Path) -> None:
    bare = root / "dora" / ADAPTER_FOLDER
    asked = [request("is it?", f"{number}", make_image(number)) for number in range(3)]
    answers = answer_all(base, [replace(one, model="bare") for one in asked], adapters={"bare": bare})
    whole = [by_transformers(merged(folders["dora"]), one) for one in asked]
    assert [len(answer.ids) for answer in answers] == [8, 8, 8]
    assert count_differing(answers, whole) == 0


def test_an_image_is_kept_once_for_each_projector(base: LlavaParts, folders: dict[str, Path]) -> None:
    async def run() -> list[int]:
        engine = await started(base, folders)
        image, cached = make_image(3), []
        for number, name in enumerate([None, "plain", "dora", "seeing", "seeing", "looking", "looking"]):
            answer = await ask(engine, replace(request("is it?", f"{number}", image), model=name))
            cached.append(answer.chunks[0].num_cached_images)
        assert engine.card.adapters == tuple(folders)
        await engine.stop()
        return cached

    assert asyncio.run(run()) == [0, 1, 1, 0, 1, 0, 1]


def test_the_model_is_given_back(base: LlavaParts, folders: dict[str, Path]) -> None:
    before, modules = by_transformers(base, request()), dict(base.llava.named_modules())
    answer_all(base, [replace(request(), model="dora")], adapters=folders)
    assert by_transformers(base, request()) == before
    assert dict(base.llava.named_modules()) == modules


def test_an_adapter_may_bring_its_own_template(root: Path, base: LlavaParts) -> None:
    folder = write_adapter(root / "spoken", make_parts(root), seed=9)
    manifest = json.loads((folder / "llava.json").read_text())
    (folder / "llava.json").write_text(json.dumps(manifest | {"version": "v0"}))
    asked = replace(request(), model="spoken")
    expected = by_transformers(merged(folder), asked)
    assert answer_all(base, [asked], adapters={"spoken": folder})[0].ids == expected.ids


def test_an_unknown_name_is_refused(base: LlavaParts, folders: dict[str, Path]) -> None:
    with pytest.raises(RecordError, match="no adapter 'pirate' here; this engine serves 'plain', 'seeing'"):
        answer_all(base, [replace(request(), model="pirate")], adapters=folders)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_vision_select_layer": -1}, "trained with mm_vision_select_layer -1, but .* has -2"),
        ({"image_aspect_ratio": "square"}, "trained with image_aspect_ratio 'square'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end True"),
    ],
)
def test_what_all_requests_share_cannot_be_an_adapters(
    tmp_path: Path, root: Path, base: LlavaParts, folders: dict[str, Path], change: dict[str, object], message: str
) -> None:
    other = shutil.copytree(folders["plain"], tmp_path / "other")
    manifest = json.loads((other / "llava.json").read_text())
    (other / "llava.json").write_text(json.dumps(manifest | change))
    with pytest.raises(ModelError, match=message):
        load_beside(base, "other", other)


def test_adapters_of_other_models_and_whole_models_are_refused(
    tmp_path: Path, base: LlavaParts, folders: dict[str, Path]
) -> None:
    modules = dict(base.llava.named_modules())
    other = write_adapter(tmp_path / "other", make_parts(tmp_path, seed=5), seed=1)
    with pytest.raises((ModelError, BundleError), match="base"):
        load_beside(base, "other", other)
    with pytest.raises(ModelError, match="is no adapter"):
        load_beside(base, "whole", base.language_source.folder)
    assert dict(base.llava.named_modules()) == modules

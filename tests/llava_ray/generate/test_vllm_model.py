"""What vLLM is given and what is made of its answers, without vLLM: exports, refusals, settings, chunks."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fakes
import pytest
import torch
from engines import make_parts, request, write_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llava_ray.config.model import ModelConfig
from llava_ray.deployments.settings import ServeSettings
from llava_ray.deployments.vllm import make_engine
from llava_ray.errors import BundleError, ModelError, RecordError
from llava_ray.generate.decoding import Stops, default_stops
from llava_ray.generate.engine import Constraint
from llava_ray.generate.settings import VllmSettings
from llava_ray.generate.vllm.vllm_answer import VllmAnswer
from llava_ray.generate.vllm.vllm_engine import engine_arguments
from llava_ray.generate.vllm.vllm_model import prepare_model
from llava_ray.generate.vllm.vllm_prompts import VllmPrompt, VllmPrompts
from llava_ray.model.assembly import LlavaParts, assemble
from llava_ray.model.formats.hub.write import export_hub
from llava_ray.model.formats.model_opening import open_model
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.saving import save_bundle


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vllm")
    save_bundle(root / "model", make_parts(root), include="all")
    return root


@pytest.fixture(scope="module")
def parts(root: Path) -> LlavaParts:
    return load_pretrained_model(root / "model")


def test_a_bundle_is_exported_once(root: Path, parts: LlavaParts, tmp_path: Path) -> None:
    model = prepare_model(root / "model", tmp_path, {})
    config = json.loads((model.folder / "config.json").read_text())
    assert model.folder.parent == tmp_path
    assert (config["model_type"], config["image_token_index"]) == ("llava", model.image_token)
    assert model.stops == default_stops(parts)
    written = (model.folder / "config.json").stat().st_mtime_ns
    assert prepare_model(root / "model", tmp_path, {}).folder == model.folder
    assert (model.folder / "config.json").stat().st_mtime_ns == written
    again = prepare_model(model.folder, tmp_path, {})  # the hub layout as it is
    assert (again.folder, again.image_token, again.stops) == (model.folder, model.image_token, model.stops)


def test_a_model_that_is_quantised_on_disk_is_vllms_alone(root: Path, tmp_path: Path) -> None:
    hub = export_hub(open_model(root / "model"), tmp_path / "awq").folder
    file = hub / "model.safetensors"
    packed = {
        name.replace("proj.weight", "proj.qweight") if "language_model" in name else name: tensor
        for name, tensor in load_file(file).items()
    }
    save_file(packed, file, {"format": "pt"})
    config = json.loads((hub / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 128}
    (hub / "config.json").write_text(json.dumps(config))
    assert prepare_model(hub, tmp_path / "cache", {}).folder == hub
    with pytest.raises(ModelError, match=r"'awq' in quantization_config.*engine=vllm engine.quantization=awq"):
        load_pretrained_model(hub)


def test_an_adapter_gets_the_names_of_a_language_model_inside_a_llava(root: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "plain", load_pretrained_model(root / "model"), seed=1, lora_r=6)
    model = prepare_model(root / "model", tmp_path / "cache", {"it": folder})
    [adapter] = model.adapters
    assert (adapter.name, adapter.rank) == ("it", 6)
    with safe_open(adapter.folder / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    arguments = engine_arguments(model, VllmSettings(max_running=4, kv_cache_bytes=100))
    assert (arguments["enable_lora"], arguments["max_loras"], arguments["max_lora_rank"]) == (True, 2, 8)
    assert (arguments["max_num_seqs"], arguments["kv_cache_memory_bytes"]) == (4, 100)
    assert "max_model_len" not in arguments
    assert not {"enable_prefix_caching", "quantization", "load_format"} & arguments.keys()  # vLLM's own defaults
    awq = engine_arguments(model, VllmSettings(quantization="awq"))
    assert (awq["quantization"], "load_format" in awq) == ("awq", False)
    assert engine_arguments(model, VllmSettings(quantization="bitsandbytes"))["load_format"] == "bitsandbytes"
    assert engine_arguments(model, VllmSettings(prefix_cache=False))["enable_prefix_caching"] is False
    on_gpu = engine_arguments(model, VllmSettings(memory_share=0.7, num_gpus=1, prefill_chunk=9))
    assert (on_gpu["gpu_memory_utilization"], on_gpu["max_num_batched_tokens"]) == (0.7, 9)
    later = engine_arguments(model, VllmSettings(max_lora_rank=60, max_loaded_adapters=9))
    assert (later["max_loras"], later["max_cpu_loras"], later["max_lora_rank"]) == (6, 12, 64)


def test_an_adapter_that_does_not_fit_is_refused_before_vllm_runs_it(root: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "wide", load_pretrained_model(root / "model"), seed=1)
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(name for name in tensors if "lora_B" in name)
    for changed, message in (
        (torch.ones(7, 4), "is 7 wide, expected"),
        (tensors[first] * torch.nan, "NaN or infinite"),
    ):
        save_file(tensors | {first: changed}, file, {"format": "pt"})
        with pytest.raises(ModelError, match=message):
            prepare_model(root / "model", tmp_path / "cache", {"wide": folder})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora = True; vLLM expects False"),
        ({"lora_bias": "all"}, "bias = 'all'"),
        ({"own_projector": True}, "has its own projector, and vLLM supports one for all"),
        ({"own_tower": True}, "vision_tower 'a tower of its own'"),
    ],
)
def test_adapters_that_vllm_cannot_serve_are_refused(
    root: Path, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    folder = write_adapter(tmp_path / "odd", load_pretrained_model(root / "model"), seed=2, **settings)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=message):
        prepare_model(root / "model", tmp_path / "cache", {"odd": folder})


def test_an_adapter_of_another_base_is_refused(root: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "other", make_parts(tmp_path, seed=5), seed=3)
    with pytest.raises((BundleError, ModelError), match="base"):
        prepare_model(root / "model", tmp_path / "cache", {"other": folder})


def test_a_tower_that_vllm_does_not_take_is_named(tmp_path: Path) -> None:
    config = ModelConfig(
        model_name_or_path=str(fakes.make_language_model(tmp_path / "language")),
        vision_tower=str(fakes.make_vision_tower(tmp_path / "tower", "dinov2")),
    )
    save_bundle(tmp_path / "model", assemble(config, "pad"), include="all")
    with pytest.raises(ModelError, match="vision tower: vLLM takes CLIP and SigLIP towers, this one is 'dinov2'"):
        prepare_model(tmp_path / "model", tmp_path / "cache", {})


def test_a_replica_is_told_by_the_services_settings() -> None:
    told = {"model": "m@path", "adapters": "a@folder", "engine": "vllm", "export_dir": "/exports", "max_num_seqs": "7"}
    settings = ServeSettings.parsed(told)
    engine = make_engine(settings.sources[0], settings)
    assert (engine.name, engine.path, engine.adapters) == ("m", "path", {"a": "folder"})
    assert (engine.settings.dtype, engine.settings.num_gpus, engine.settings.max_running) == ("float32", 0, 7)
    assert engine.settings.cache_dir == "/exports"
    on_gpus = settings.replaced({"num_gpus": 2.0})
    assert make_engine(on_gpus.sources[0], on_gpus).settings.num_gpus == 2
    with pytest.raises(ModelError, match="not running"):
        engine.check_health()


def output(ids: list[int], reason: str | None = None, logprobs: list[dict[int, object]] | None = None) -> object:
    """What vLLM hands out: new tokens, and of the request how many tokens its prompt has and when it was begun."""
    new = SimpleNamespace(token_ids=ids, finish_reason=reason, logprobs=logprobs)
    stats = SimpleNamespace(queued_ts=1.0, scheduled_ts=1.5)
    return SimpleNamespace(outputs=[new], prompt_token_ids=[1] * 9, metrics=stats)


def answer(parts: LlavaParts, stop_texts: tuple[str, ...] = (), **sampling: object) -> VllmAnswer:
    prompt = VllmPrompt({}, None, Stops(frozenset({fakes.EOS})), stop_texts)
    return VllmAnswer(prompt, parts.tokenizer, request(**sampling))  # type: ignore[arg-type]


def test_the_token_that_ends_an_answer_is_no_part_of_it(parts: LlavaParts) -> None:
    ids = parts.tokenizer.encode(" red circle", add_special_tokens=False)
    writing = answer(parts)
    first, last = writing.take(output(ids[:2])), writing.take(output([*ids[2:], fakes.EOS], "stop"))
    assert first.text + last.text == "red circle"
    assert (first.finish_reason, last.finish_reason, last.token_ids) == (None, "stop", tuple(ids[2:]))
    assert (first.num_prompt_tokens, first.queued_s) == (9, 0.5)


def test_a_stop_text_ends_it_in_the_middle_of_an_output(parts: LlavaParts) -> None:
    ids = parts.tokenizer.encode("red circle blue", add_special_tokens=False)
    chunk = answer(parts, (" cir",)).take(output(ids))
    assert (chunk.text, chunk.finish_reason) == ("red", "stop")
    assert len(chunk.token_ids) < len(ids)


def test_half_a_character_is_left_out_at_the_end(parts: LlavaParts) -> None:
    ids = parts.tokenizer.encode("é", add_special_tokens=False)
    chunk = answer(parts).take(output(ids[:1], "length"))
    assert (chunk.text, chunk.token_ids, chunk.finish_reason) == ("", tuple(ids[:1]), "length")


def test_logprobs_are_the_likeliest_best_first(parts: LlavaParts) -> None:
    row = {7: SimpleNamespace(logprob=-3.0, rank=3), 5: SimpleNamespace(logprob=-0.1, rank=1)}
    row[6] = SimpleNamespace(logprob=-2.0, rank=2)
    [told] = answer(parts, logprobs=2).take(output([7], None, [row])).logprobs
    assert (told.token_id, told.logprob) == (7, -3.0)
    assert [(token, value) for token, _, value in told.top] == [(5, -0.1), (6, -2.0)]


def test_scores_of_prompts_are_read_without_those_of_images(parts: LlavaParts) -> None:
    def entry(logprob: float, rank: int) -> SimpleNamespace:
        return SimpleNamespace(logprob=logprob, rank=rank)

    prompt = VllmPrompt({}, None, Stops(frozenset({fakes.EOS})), (), image_token=9)
    writing = VllmAnswer(prompt, parts.tokenizer, request(prompt_logprobs=2))
    rows = [None, {9: entry(-7.0, 8)}, {6: entry(-1.0, 2), 5: entry(-0.5, 1)}, {8: entry(-4.0, 7), 5: entry(-0.5, 1)}]
    told = writing.read_prompt(SimpleNamespace(prompt_token_ids=[1, 9, 6, 8], prompt_logprobs=rows))
    assert told[:2] == (None, None)
    text = parts.tokenizer.decode
    assert told[2:] == (
        ((6, text([6]), -1.0, 2), (5, text([5]), -0.5, 1)),
        ((8, text([8]), -4.0, 7), (5, text([5]), -0.5, 1)),
    )
    rows[3] = {8: entry(float("nan"), 7)}
    with pytest.raises(ModelError, match="not finite"):
        writing.read_prompt(SimpleNamespace(prompt_token_ids=[1, 9, 6, 8], prompt_logprobs=rows))


def test_what_vllm_continues_keeps_its_space(parts: LlavaParts) -> None:
    ids = parts.tokenizer.encode("a red circle", add_special_tokens=False)
    place = len(parts.tokenizer.encode("a", add_special_tokens=False))
    prompt = VllmPrompt({}, None, Stops(frozenset({fakes.EOS})), (), text_ids=[-200, *ids[:place]])
    begun = replace(request(), continue_final_message=True)
    assert VllmAnswer(prompt, parts.tokenizer, begun).take(output(ids[place:], "length")).text == " red circle"


def test_what_vllm_could_not_write_is_an_error(parts: LlavaParts) -> None:
    with pytest.raises(ModelError, match="ended the answer with 'error'"):
        answer(parts).take(output([], "error"))


def test_constraints_are_passed_as_grammars(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the names of vLLM's present API, which is not installed here."""

    class Params(SimpleNamespace):
        def __init__(self, **fields: object) -> None:
            super().__init__(**fields)

    kinds = SimpleNamespace(StructuredOutputsParams=Params, RequestOutputKind=SimpleNamespace(DELTA="delta"))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=Params))
    monkeypatch.setitem(sys.modules, "vllm.exceptions", SimpleNamespace(VLLMClientError=ValueError))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", kinds)
    model = prepare_model(root / "model", tmp_path, {})
    prompts = VllmPrompts(model.blueprint, model, 2048)
    edits = {"presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 1.5, "min_p": 0.1}
    edited = prompts.make(request("is it?", **edits, logit_bias=((5, 2.0),), prompt_logprobs=2)).params
    assert {name: getattr(edited, name) for name in edits} == edits
    assert (edited.logit_bias, edited.prompt_logprobs) == ({5: 2.0}, 2)
    with pytest.raises(RecordError, match="logit_bias names tokens"):
        prompts.make(request("is it?", logit_bias=((10**6, 2.0),)))
    plain = prompts.make(request("is it?", ignore_eos=False))
    assert (plain.params.logit_bias, plain.params.prompt_logprobs, plain.params.repetition_penalty) == (None, None, 1)
    assert (plain.params.structured_outputs, plain.grammar) == (None, None)
    held = prompts.make(request("is it?", constraint=Constraint("choice", '["red"]', "guided_choice")))
    assert held.params.structured_outputs.grammar == 'start: " " body\nbody: "red"\n'
    assert vars(held.params.structured_outputs).keys() == {"grammar"}
    answer = VllmAnswer(held, model.blueprint.tokenizer, request("is it?"))
    ids = model.blueprint.tokenizer.convert_tokens_to_ids(["Ġ", "r", "e", "d"])  # "red" ends this model's answers
    output = SimpleNamespace(
        outputs=[SimpleNamespace(token_ids=ids, finish_reason=None, logprobs=None)], metrics=None, prompt_token_ids=[1]
    )
    assert answer.take(output).text == "red"
    with pytest.raises(RecordError, match="guided_regex"):
        prompts.make(request("is it?", constraint=Constraint("regex", "(", "guided_regex")))
    prompts.grammars.close()

"""LoRA adapters: injected into a language model, stored in PEFT's own files, merged with a check.

PEFT's layers are injected in place: the model keeps its class, so callers are unaffected. peft is imported inside the
functions: that takes seconds, and most processes do not need it.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llava_ray.config.lora import LoraConfig
from llava_ray.errors import BundleError, ModelError
from llava_ray.model.formats.layout import ADAPTER_FILE
from llava_ray.model.formats.manifest import ManifestPart
from llava_ray.model.formats.original.names import PEFT_PREFIX
from llava_ray.model.lora.adapter_files import AdapterFiles, read_adapter
from llava_ray.model.network.quantization import dequantize, find_dtype, find_quantization
from llava_ray.reading import wrap_errors

ADAPTER = "default"  # PEFT's own name for the only one
OTHER_PARTS = ("projector", "vision_tower")
# Tolerances as shares of the logits' spread: rounding a merged matrix to 16 bits changes them by about 1 %.
MERGE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}
_PROBE_LENGTH = 64


def has_adapter(language_model: nn.Module) -> bool:
    """Return whether the model has an adapter."""
    return "peft_config" in vars(language_model)


def add_adapter(language_model: PreTrainedModel, lora: LoraConfig, seed: int) -> None:
    """Add a new adapter, initially without effect; only it is trained, and the biases of ``lora_bias``.

    Its values depend on ``seed`` alone, so they are equal on every rank. Raises ModelError for a target that the model
    does not have.
    """
    targets = find_target_modules(language_model, lora.lora_target_modules)
    inject_adapter(language_model, peft_settings(lora, targets), seed)


def peft_settings(lora: LoraConfig, targets: list[str]) -> Any:
    """Convert ``lora`` to PEFT's settings."""
    import peft

    return peft.LoraConfig(
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        bias=lora.lora_bias,
        target_modules=targets,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        task_type="CAUSAL_LM",
    )


def find_target_modules(language_model: PreTrainedModel, named: tuple[str, ...] | None) -> list[str]:
    """Find the last names of every Linear but the head, or of the ``named`` ones. Raises ModelError.

    As in LLaVA, where however the names of an already loaded tower matched as well. Names that begin with another part
    are not the language model's.
    """
    linears = {name: module for name, module in language_model.named_modules() if isinstance(module, nn.Linear)}
    head = language_model.get_output_embeddings()
    every = sorted({name.rpartition(".")[2] for name, module in linears.items() if module is not head})
    if named is None:
        return every
    named = tuple(name for name in named if name.partition(".")[0] not in OTHER_PARTS)
    if not named:
        raise ModelError(
            "lora.lora_target_modules names no layer of the language model, so the adapter would be empty."
        )
    for target in named:
        if not any(name == target or name.endswith(f".{target}") for name in linears):
            raise ModelError(
                f"lora.lora_target_modules names {target!r}, which is not a Linear of the language model; it has "
                f"{', '.join(every)}. Correct the name, or leave the setting out to adapt them all."
            )
    return list(named)


def inject_adapter(model: nn.Module, config: Any, seed: int) -> None:
    """Inject PEFT's layers into the model, in its compute dtype; new values depend on ``seed`` alone."""
    import peft

    # A forked generator: equal values on every rank, whatever random numbers it has drawn before.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        peft.LoraModel(model, config, ADAPTER)
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.to(find_dtype(model))


def load_adapter(
    language_model: PreTrainedModel, folder: str | Path, *, base_fingerprint: str | None = None, learns: bool = False
) -> None:
    """Load the adapter of a PEFT folder (ours, or LLaVA's LoRA folder) into the model that it was trained on.

    ``base_fingerprint`` is that of the model's weight files; it is compared if the adapter records its base's. Raises
    ModelError for an adapter that is incomplete, damaged, or of another model; the model is then unchanged.
    """
    import peft

    files = read_adapter(Path(folder))
    check_base(files, base_fingerprint)
    files.config.inference_mode = not learns
    remedy = f"It was trained over {files.base or 'another model'}; point at that one, or copy the adapter again."
    with wrap_errors(f"{files.folder}", remedy, says="is an adapter of another language model"):
        inject_adapter(language_model, files.config, seed=0)
    expected = {n: tuple(t.shape) for n, t in adapter_tensors(language_model, language_model.state_dict()).items()}
    found = {name: tuple(tensor.shape) for name, tensor in files.tensors.items()}
    if expected != found:
        remove_adapter(language_model)
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ModelError(
            f"{len(wrong)} tensors in {files.folder} do not fit the language model, the first is {wrong[0]}: found "
            f"{found.get(wrong[0], 'none')}, expected {expected.get(wrong[0], 'none')}. It was trained over "
            f"{files.base or 'another model'}; point at that one."
        )
    peft.set_peft_model_state_dict(language_model, files.tensors)


def check_base(files: AdapterFiles, base_fingerprint: str | None) -> None:
    """Raise BundleError if the adapter was trained over other weights than those with this fingerprint."""
    if base_fingerprint and files.base_fingerprint and base_fingerprint != files.base_fingerprint:
        raise BundleError(
            f"the adapter in {files.folder} was trained over {files.base} (fingerprint {files.base_fingerprint[:12]}), "
            f"not over this language model (fingerprint {base_fingerprint[:12]}); point at the right base."
        )


def save_adapter(
    folder: Path, language_model: PreTrainedModel, base: ManifestPart, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Save the adapter in PEFT's format, with the id and fingerprint of the base that it needs.

    ``tensors`` are full ones under the model's own names, as gathered from a training engine; by default the model's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = adapter_tensors(language_model, language_model.state_dict() if tensors is None else tensors)
    metadata = {"format": "pt", "base_model": base.base, "base_model_fingerprint": base.fingerprint}
    whole = {f"{PEFT_PREFIX}{name}": tensor.detach().contiguous() for name, tensor in named.items()}
    save_file(whole, folder / ADAPTER_FILE, metadata=metadata)
    config = copy.copy(peft_config(language_model))
    config.base_model_name_or_path, config.inference_mode = base.base, True
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)  # a set, whose order differs from run to run
    config.save_pretrained(folder)


def peft_config(language_model: PreTrainedModel) -> Any:
    """Return PEFT's settings of the model's adapter."""
    return vars(language_model)["peft_config"][ADAPTER]


def adapter_tensors(language_model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the adapter's tensors, and the biases trained with it, under the names of PEFT's files."""
    import peft

    picked: dict[str, Tensor] = peft.get_peft_model_state_dict(
        language_model, state_dict=dict(tensors), adapter_name=ADAPTER, save_embedding_layers=False
    )
    return picked


def adapter_parameters(language_model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter's own parameters by their names in the model."""
    return {
        f"{name}.{kind}.{inner}": parameter
        for name, layer in adapter_layers(language_model).items()
        for kind in layer.adapter_layer_names
        for inner, parameter in layer.get_submodule(kind).named_parameters()
    }


def adapter_layers(language_model: nn.Module) -> dict[str, Any]:
    """Return the layers that have an adapter, by name."""
    if not has_adapter(language_model):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in language_model.named_modules() if isinstance(module, BaseTunerLayer)}


def adapted_parts(llava: nn.Module) -> set[str]:
    """Return which of Llava's parts have layers with an adapter."""
    return {name.partition(".")[0] for name in adapter_layers(llava)}


def remove_adapter(language_model: PreTrainedModel) -> None:
    """Remove the adapter and restore the model without it."""
    for name, layer in adapter_layers(language_model).items():
        language_model.set_submodule(name, layer.get_base_layer())
    del language_model.peft_config


@torch.no_grad()
def merge_adapter(language_model: PreTrainedModel) -> None:
    """Merge the adapter into the language model, in place; a quantised base is dequantised first.

    Logits on a fixed input before and after are compared: raises ModelError where they differ by more than rounding
    (the model is then unusable).
    """
    before = compute_probe_logits(language_model)
    quantization = find_quantization(language_model)
    dtype = find_dtype(language_model)
    if quantization is not None:
        import peft

        config, tensors = peft_config(language_model), adapter_tensors(language_model, language_model.state_dict())
        # peft merges into quantised matrices by rounding the sum again; ordinary ones lose nothing.
        remove_adapter(language_model)
        dequantize(language_model, dtype)
        inject_adapter(language_model, config, seed=0)
        peft.set_peft_model_state_dict(language_model, tensors)
        if quantization.bits == 8:  # 8 bits round activations as well, which a merged model cannot reproduce
            before = compute_probe_logits(language_model)
    for layer in adapter_layers(language_model).values():
        layer.merge(safe_merge=True)
    remove_adapter(language_model)
    _check_merged(before, compute_probe_logits(language_model), MERGE_TOLERANCE[dtype])


def compute_probe_logits(language_model: PreTrainedModel) -> Float32[Tensor, "t vocab"]:
    """Compute the logits of a fixed text: token ids spread over the vocabulary."""
    training = language_model.training
    vocab_size: int = language_model.config.get_text_config().vocab_size
    ids = torch.arange(0, vocab_size, max(1, vocab_size // _PROBE_LENGTH), device=language_model.device)[:_PROBE_LENGTH]
    logits: Tensor = language_model.eval()(input_ids=ids[None], use_cache=False).logits[0]
    language_model.train(training)
    return logits.float()


def measure_drift(found: Float32[Tensor, "t vocab"], expected: Float32[Tensor, "t vocab"]) -> float:
    """Compute the distance of logits from the expected ones, as a share of the latter's spread; NaN for NaNs."""
    return float((found - expected).square().mean().sqrt() / expected.std())


def _check_merged(before: Float32[Tensor, "t vocab"], after: Float32[Tensor, "t vocab"], tolerance: float) -> None:
    """Raise ModelError if a merge changed the logits by more than ``tolerance`` of their spread."""
    drift = measure_drift(after, before)
    if not drift <= tolerance:
        raise ModelError(
            f"merging changed the logits of a fixed text by {drift:.2g} of their spread, expected at most "
            f"{tolerance:.2g}: nothing was written. Load the model in float32 to merge it; if that fails too, the "
            "adapter holds extreme numbers (check its training loss), or affects a tied head."
        )

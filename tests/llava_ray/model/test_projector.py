from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import gelu, linear

from llava_ray.errors import ModelError
from llava_ray.model.formats.projector_files import load_projector_weights
from llava_ray.model.network.projector import adopt_projector, build_projector


def test_two_layers_have_llavas_tensor_names_and_exact_gelu() -> None:
    projector = build_projector("mlp2x_gelu", 6, 4)
    weights = projector.state_dict()
    assert list(weights) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    features = torch.randn(2, 3, 6)
    hidden = gelu(linear(features, weights["0.weight"], weights["0.bias"]), approximate="none")
    expected = linear(hidden, weights["2.weight"], weights["2.bias"])
    torch.testing.assert_close(projector(features), expected)


def test_two_layers_have_llava_v1_5_7bs_number_of_parameters() -> None:
    with torch.device("meta"):
        projector = build_projector("mlp2x_gelu", 1024, 4096)
    assert sum(p.numel() for p in projector.parameters()) == 20_979_712


@pytest.mark.parametrize(
    ("mm_projector_type", "names"),
    [
        ("linear", ["weight", "bias"]),
        ("identity", []),
        ("mlp1x_gelu", ["0.weight", "0.bias"]),
        ("mlp3x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]),
    ],
)
def test_types(mm_projector_type: str, names: list[str]) -> None:
    projector = build_projector(mm_projector_type, 4, 4)
    assert list(projector.state_dict()) == names
    assert projector(torch.zeros(1, 2, 4)).shape == (1, 2, 4)


@pytest.mark.parametrize("mm_projector_type", ["mlp0x_gelu", "mlp2x", "resampler", ""])
def test_unknown_type_is_refused_by_name(mm_projector_type: str) -> None:
    with pytest.raises(ModelError, match=f"'{mm_projector_type}'.*'mlp2x_gelu'"):
        build_projector(mm_projector_type, 4, 4)


def test_identity_needs_equal_widths() -> None:
    with pytest.raises(ModelError, match=r"tower has 6 .* language model 4"):
        build_projector("identity", 6, 4)


def write_safetensors(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    save_file(weights, folder / "some.safetensors")
    return folder / "some.safetensors"


def write_bundle_file(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    save_file(weights, folder / "projector.safetensors")
    return folder


def write_original(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    # What LLaVA's pretraining leaves, where the adapter of a whole run may also hold embeddings.
    tensors = {f"model.mm_projector.{name}": tensor for name, tensor in weights.items()}
    torch.save(tensors | {"model.embed_tokens.weight": torch.zeros(2, 2)}, folder / "mm_projector.bin")
    return folder / "mm_projector.bin"


def write_original_folder(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    write_original(folder, weights)
    return folder


@pytest.mark.parametrize("write", [write_safetensors, write_bundle_file, write_original, write_original_folder])
def test_weights_are_read_from_every_layout(write: Callable[..., Path], tmp_path: Path) -> None:
    trained, fresh = build_projector("mlp2x_gelu", 6, 4), build_projector("mlp2x_gelu", 6, 4)
    source = write(tmp_path, trained.state_dict())
    adopt_projector(fresh, load_projector_weights(source), str(source))
    features = torch.randn(1, 2, 6)
    assert torch.equal(fresh(features), trained(features))


def test_misfit_says_type_and_widths_of_both() -> None:
    projector = build_projector("mlp2x_gelu", 6, 4)
    found = "linear from tower width 8 to language model width 4"
    expected = "mlp2x_gelu from tower width 6 to language model width 4"
    with pytest.raises(ModelError, match=f"in here does not fit: it is {found}, expected {expected}"):
        adopt_projector(projector, build_projector("linear", 8, 4).state_dict(), "here")


def test_missing_tensor_is_refused() -> None:
    weights = build_projector("mlp2x_gelu", 6, 4).state_dict()
    del weights["2.bias"]
    with pytest.raises(ModelError, match="does not fit"):
        adopt_projector(build_projector("mlp2x_gelu", 6, 4), weights, "here")


def test_no_file_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no projector at .*nowhere.*pretrain_mm_mlp_adapter"):
        load_projector_weights(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["broken.safetensors", "mm_projector.bin"])
def test_damaged_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"not a model")
    with pytest.raises(ModelError, match=rf"{name} is (not a whole safetensors file|cut off, damaged)"):
        load_projector_weights(tmp_path / name)


def test_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"mm_projector.0.weight": Bomb()}, tmp_path / "mm_projector.bin")
    with pytest.raises(
        ModelError, match=r"mm_projector\.bin holds more than tensors: it refers to __builtin__\.getattr"
    ):
        load_projector_weights(tmp_path / "mm_projector.bin")
    assert not (tmp_path / "exploded").exists()

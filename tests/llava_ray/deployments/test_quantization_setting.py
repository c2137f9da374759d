"""engine.quantization reaches the engine that has it, and is refused by the others with the reason and the remedy."""

import pytest

from llava_ray.deployments.builtin import make_engine as make_builtin
from llava_ray.deployments.settings import ServeSettings
from llava_ray.deployments.vllm import make_engine as make_vllm
from llava_ray.errors import ConfigError, ModelError
from llava_ray.generate.vllm.vllm_quantization import check_known


def parsed(**given: object) -> ServeSettings:
    return ServeSettings.parsed({"model": "a", **{key.replace("__", "."): value for key, value in given.items()}})


def test_the_builtin_engine_has_int8() -> None:
    settings = parsed(engine__quantization="int8")
    assert make_builtin(settings.sources[0], settings).settings.quantization == "int8"
    plain = parsed()
    assert make_builtin(plain.sources[0], plain).settings.quantization is None


@pytest.mark.parametrize("name", ["bitsandbytes", "awq", "gptq", "fp8", "compressed-tensors"])
def test_vllm_has_its_own(name: str) -> None:
    settings = parsed(engine="vllm", engine__quantization=name)
    assert make_vllm(settings.sources[0], settings).settings.quantization == name
    with pytest.raises(ConfigError, match=rf"'{name}' is none of engine=builtin's \(int8\); engine=vllm has it"):
        parsed(engine__quantization=name)


def test_what_an_engine_has_not_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'int8' is none of engine=vllm's .*engine=builtin has it"):
        parsed(engine="vllm", engine__quantization="int8")
    with pytest.raises(ConfigError, match=r"'int4' is none of engine=builtin's \(int8\); choose one"):
        parsed(engine__quantization="int4")
    with pytest.raises(ConfigError, match="is for CPUs, and num_gpus is set"):
        parsed(engine__quantization="int8", num_gpus=1)
    assert parsed(engine="mine:make", engine__quantization="own").engine_quantization == "own"


def test_the_installed_vllm_is_asked() -> None:
    check_known(None, [])
    check_known("awq", ["awq", "fp8"])
    with pytest.raises(ModelError, match=r"has no quantization 'bitsandbytes'; it has awq, fp8.*vllm-bnb-plugin"):
        check_known("bitsandbytes", ["fp8", "awq"])

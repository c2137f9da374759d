"""Where a part's files are: a folder as it is, or a hub id through the hub's own cache."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from llava_ray.chat.tokenizer import load_tokenizer
from llava_ray.errors import ModelError

# What transformers raises on folders that are incomplete or damaged.
LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UnpicklingError)

SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class Source:
    """Where a part is: its ``name`` as people write it (hub id, or absolute folder) and the ``folder`` of its files.

    ``origin`` is what the part was tuned from, or ``name`` again.
    """

    name: str
    folder: Path
    origin: str


def find_source(name: str | Path, part: str, *, weights: bool = True) -> Source:
    """Find a part's files, downloading a hub id into the hub's cache. Without ``weights`` only small files are fetched.

    Raises ModelError that names the path and the remedy when there is nothing to be found.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Source(str(folder.resolve()), folder.resolve(), str(folder.resolve()))
    try:
        found = Path(
            snapshot_download(str(name), allow_patterns=[*SMALL_FILES, *(["*.safetensors"] if weights else [])])
        )
        if weights and not list(found.glob("*.safetensors")):
            found = Path(snapshot_download(str(name), allow_patterns=[*SMALL_FILES, "*.bin"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"no such {part}: {str(name)!r} is neither a folder here ({folder.absolute()}) nor a model that the hub "
            f"gave us ({type(error).__name__}). Check the spelling; without network, download it elsewhere and give "
            "the folder, which every node must see."
        ) from error
    return Source(str(name), found, str(name))


@contextmanager
def loading(path: str | Path, part: str) -> Iterator[None]:
    """Put a failure to load into words: which part, from where, and why."""
    try:
        yield
    except LOADING_ERRORS as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the {part} in {path} cannot be loaded: {reason} Expected a folder as transformers' save_pretrained "
            "writes it; copy it again, or point at another."
        ) from error


def check_loaded(info: Mapping[str, Any], path: str | Path, part: str) -> None:
    """Raise ModelError if transformers made up tensors that the files do not hold."""
    made_up = sorted(info["missing_keys"])
    if made_up:
        raise ModelError(
            f"the {part} in {path} lacks {len(made_up)} tensors, the first is {made_up[0]}; they would be random. "
            "Expected all weights of the class named in config.json; copy the folder again."
        )


def read_config(path: str | Path, part: str) -> PreTrainedConfig:
    """Read a part's config.json. Raises ModelError."""
    with loading(path, part):
        config: PreTrainedConfig = AutoConfig.from_pretrained(path)
    return config


def load_padding_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can pad, without adding to its vocabulary. Raises ModelError.

    Where it has no padding token its unknown token serves (as in LLaVA), else its end token: padding is always
    masked, so its id teaches nothing.
    """
    tokenizer = load_tokenizer(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(
            f"the tokenizer in {path} has neither a padding, an unknown nor an end token; expected at least an end "
            "token (eos_token in tokenizer_config.json)."
        )
    return tokenizer

"""Models by their id on the Hugging Face hub: how ids are written, and the download into the hub's own cache.

An id is ``org/name``, or ``hf://org/name``, with ``@revision`` for a branch, tag or commit. A local folder wins over a
plain id of the same name; ``hf://`` always means the hub. Only weights, settings and tokenizer files are fetched, and
nothing that is fetched is executed: weights in PyTorch's pickles are read without unpickling (`pickled_tensors`).
"""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from llava_ray.errors import ModelError
from llava_ray.model.formats.layout import NON_LORA_FILE, ORIGINAL_PROJECTOR_FILE
from llava_ray.reading import MAX_SHOWN, is_folder, short_repr

SCHEME = "hf://"
_WRITTEN = re.compile(r"hf:/{1,2}(?P<name>[^@]*)(@(?P<revision>.+))?")  # a pathlib.Path has one slash
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
_WEIGHT_FILES = ["*.safetensors", ORIGINAL_PROJECTOR_FILE, NON_LORA_FILE]
_PICKLES = ["*.bin"]


@dataclass(frozen=True)
class HubId:
    """A repository on the hub, at a revision; None for its main branch."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        """Return the id as it is written: as short as it stays clear."""
        if self.revision is None and not is_folder(Path(self.name)):
            return self.name
        return f"{SCHEME}{self.name}" + (f"@{self.revision}" if self.revision else "")


def is_hub_url(name: object) -> bool:
    """Return whether a name is written with ``hf://``."""
    return isinstance(name, str | Path) and _WRITTEN.fullmatch(str(name)) is not None


def parse_hub_id(name: str | Path) -> HubId:
    """Return the repository that a name means, where it is no folder. Raises ModelError for ``hf://`` without an id."""
    found = _WRITTEN.fullmatch(str(name))
    if found is None:
        return HubId(str(name))
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", found["name"]):
        raise ModelError(
            f"{short_repr(str(name))} names no model on the hub; expected hf://org/name or hf://org/name@revision."
        )
    return HubId(found["name"], found["revision"])


def download(hub_id: HubId, part: str, *, weights: bool) -> Path:
    """Return the folder of a repository in the hub's cache, with what is missing fetched.

    Without ``weights`` only small files are fetched. Raises ModelError that names the reason and the remedy.
    """
    try:
        return _download(hub_id, weights=weights)
    except GatedRepoError as error:
        raise ModelError(
            f"{part} {str(hub_id)!r}: its publisher has to grant access first. Ask for it on the model's page, then "
            "log in on every node (hf auth login, or HF_TOKEN)."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"no such {part}: {hub_id.name!r} on the hub has no revision {hub_id.revision!r}; give a branch, tag or "
            "commit that its page lists."
        ) from error
    except (
        HFValidationError,
        RepositoryNotFoundError,
        EntryNotFoundError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        HfHubHTTPError,
        OSError,
        ValueError,
    ) as error:
        raise ModelError(_not_found(hub_id, part, error)) from error


def _download(hub_id: HubId, *, weights: bool) -> Path:
    def fetch(patterns: list[str]) -> Path:
        return Path(snapshot_download(hub_id.name, revision=hub_id.revision, allow_patterns=patterns))

    found = fetch([*_SMALL_FILES, *(_WEIGHT_FILES if weights else [])])
    if weights and not list(found.glob("*.safetensors")):
        found = fetch([*_SMALL_FILES, *_PICKLES])
    return found


def _not_found(hub_id: HubId, part: str, error: Exception) -> str:
    """Return the words for a repository that cannot be fetched, and is not in the cache."""
    folder = str(Path(hub_id.name).expanduser().absolute())[:MAX_SHOWN]
    asked = str(hub_id)
    start = f"no such {part}: {short_repr(asked)} is neither a folder here ({folder}) nor a model that the hub provides"
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set, and it is not in the hub's cache"
    elif isinstance(error, RepositoryNotFoundError):
        why = f"{constants.ENDPOINT} has no such repository, or it is private: log in with hf auth login, or HF_TOKEN"
    elif isinstance(error, HFValidationError):
        why = "it is no possible id"
    else:
        why = f"{constants.ENDPOINT} cannot be reached, and it is not in the hub's cache: {type(error).__name__}"
    return (
        f"{start} ({why}). Check the spelling; without network, download it elsewhere and give the folder, which every "
        "node must see."
    )

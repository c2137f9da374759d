"""The model of one deployment: its name in requests, and where it is."""

from llava_ray.config.schema import ConfigSection

_RUN_MODEL = "model"  # the name of every run's bundle, which does not identify a model
_HUB_SCHEME = "hf://"


class ModelSource(ConfigSection):
    """One deployment of a model."""

    name: str
    """The model's name in requests."""
    path: str
    """Folder or hub id."""
    adapters: tuple[tuple[str, str], ...] = ()
    """(name, folder) of each of its LoRA adapters."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names for requests, its own first."""
        return (self.name, *(name for name, _ in self.adapters))


def split_model_name(text: str) -> tuple[str, str]:
    """Split ``NAME@PATH``; a bare path is named by its last part, or the one before if that is "model".

    The ``@`` of ``hf://org/name@revision`` is that of a revision.
    """
    name, at, path = text.partition("@")
    if at and not text.startswith(_HUB_SCHEME):
        return name, path
    bare = name if text.startswith(_HUB_SCHEME) else text
    parts = [part for part in bare.split("/") if part not in ("", ".")]
    if len(parts) > 1 and parts[-1] == _RUN_MODEL:
        parts.pop()
    return (parts[-1] if parts else text), text

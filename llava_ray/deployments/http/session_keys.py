"""Keys of sessions, whose requests go to one replica."""

import hashlib

from llava_ray.deployments.messages import Task

_LONG_TEXT = 256 * 1024  # characters of a text, or of an image's end, that are hashed


def find_session(task: Task) -> str:
    """Return a chat's session key from its constant parts: model, system prompt, first question, first image."""
    first = task.turns[0].value if task.turns else task.prompt or ""
    image = task.media[0] if task.media else ""
    start = "\0".join((task.model, task.system or "", first[:_LONG_TEXT], str(len(image)), image[-_LONG_TEXT:]))
    return hash_session(start)


def hash_session(name: str) -> str:
    """Hash a session's name to a short ASCII string."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()

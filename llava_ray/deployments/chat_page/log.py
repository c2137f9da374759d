"""Logs of conversations of users who agreed: a JSONL file per day, images by hash, old files deleted."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from llava_ray.deployments.chat_page.chat import ChatbotMessage, Parameters, paths_of, pieces_of
from llava_ray.deployments.chat_page.uploads import Uploads

LogKind = Literal["chat", "upvote", "downvote", "flag"]


class ConversationLog:
    """A log in the format of the original's page, without the users' addresses."""

    def __init__(self, folder: Path, days: int, now: Callable[[], float] = time.time) -> None:
        """Initialise a log in ``folder`` with so many days of retention."""
        self.folder = folder
        self.images = folder / "images"
        self.days = days
        self.now = now
        self.purged = ""

    def write(
        self,
        kind: LogKind,
        history: Sequence[ChatbotMessage],
        parameters: Parameters,
        uploads: Uploads,
        figures: str = "",
    ) -> None:
        """Append one line. Raises OSError if the folder cannot be written to, RefusalError for images not uploaded."""
        files = uploads.read_all(paths_of(history))
        moment = self.now()
        today = datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d")
        self.images.mkdir(parents=True, exist_ok=True)
        if self.purged != today:
            self.purge(moment)
            self.purged = today
        record = {
            "tstamp": round(moment, 4),
            "type": kind,
            "model": parameters.model,
            "parameters": {
                "temperature": parameters.temperature,
                "top_p": parameters.top_p,
                "max_tokens": int(parameters.max_tokens),
            },
            "figures": figures,
            "messages": [self.message(message, files) for message in history],
        }
        with (self.folder / f"{today}-conv.jsonl").open("a") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def message(self, source: ChatbotMessage, files: Mapping[str, bytes]) -> dict[str, Any]:
        """Convert a message for the log; images are named by their hash."""
        content = [
            piece if isinstance(piece, str) else {"image": self.keep(piece["path"], files[piece["path"]])}
            for piece in pieces_of(source)
        ]
        return {"role": source["role"], "content": content}

    def keep(self, path: str, data: bytes) -> str:
        """Save an image unless it exists already; return its name."""
        name = hashlib.sha256(data).hexdigest() + Path(path).suffix.lower()
        place = self.images / name
        if not place.exists():
            partial = place.with_suffix(".partial")
            partial.write_bytes(data)
            partial.replace(place)
        return name

    def purge(self, moment: float) -> None:
        """Delete logs past the retention, and images that no other log names."""
        oldest = (datetime.fromtimestamp(moment, UTC) - timedelta(days=self.days)).strftime("%Y-%m-%d")
        for log in self.folder.glob("*-conv.jsonl"):
            if log.name[: len(oldest)] < oldest:
                log.unlink()
        named = "".join(log.read_text() for log in self.folder.glob("*-conv.jsonl"))
        for image in self.images.iterdir():
            if image.name not in named:
                image.unlink()

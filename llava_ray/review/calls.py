"""Items to be judged, and the calls that they take: one request each, under a key that is the hash of all it says."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llava_ray.config.review import JudgeConfig
from llava_ray.errors import DataError
from llava_ray.review.prices import Price, find_price
from llava_ray.review.rubric import AS_JSON, ReviewKind, Rubric, compose
from llava_ray.review.verdict import schema

_Order = Literal["given", "swapped"]
_TOKENS_PER_MESSAGE = 16  # roles, separators, the schema's own; generous
_BYTES_PER_TOKEN = 3  # of English text about 4.5
_REASONING = re.compile(r"(?:.*/)?(?:o[1-9]|gpt-[5-9])(?![\w])", re.IGNORECASE)
_MEDIA_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp", b"GIF8": "image/gif"}


@dataclass(frozen=True)
class Item:
    """One question with the answers to judge: one, or two of which the first is Assistant 1 of the given order."""

    id: str
    question: str
    answers: tuple[str, ...]
    names: tuple[str, ...]
    """Who gave each answer: "reference", or a model's name."""
    category: str = "default"
    context: Any = None
    image: Path | None = None
    cluster: str = ""
    """What it shares with other items, mostly the image: they are not independent."""
    request: str | None = None
    """The whole text of the request, where a benchmark words it itself."""
    answer_ids: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    """Under which it is counted; default: its category."""


@dataclass(frozen=True)
class JudgeSpec:
    """One judge: a model at an address, with its settings and price (None: not known)."""

    model: str
    base_url: str
    config: JudgeConfig
    price: Price | None

    @property
    def name(self) -> str:
        """What it is called in reports: the model, with its address where that is not OpenAI's."""
        host = self.base_url.partition("://")[2].removesuffix("/v1")
        return self.model if host == "api.openai.com" else f"{self.model} at {host}"

    @property
    def as_json(self) -> bool:
        """Whether the reply is held to the schema."""
        return self.config.response_format == "json_schema"


@dataclass(frozen=True)
class Call:
    """One request: who is asked what, under which key, and what it can take and cost at most."""

    key: str
    judge: str
    item_id: str
    pair: str
    """Who is judged: the names of the item's answers."""
    order: _Order
    sample: int
    kind: ReviewKind
    body: dict[str, Any]
    tokens: int
    """Estimate of prompt and output, for the rate."""
    dollars: float
    """The most it can cost: as many prompt tokens as the text has bytes, and the longest output."""
    image: Path | None = None
    image_content: bytes = b""

    def loaded(self) -> "Call":
        """Return the call with its image's content, to travel. Raises DataError."""
        return self if self.image is None else replace(self, image_content=_read_image_bytes(self.image, self.item_id))


def list_judges(config: JudgeConfig) -> list[JudgeSpec]:
    """Return all judges of a job, the first one first. Raises ConfigError for a price that is not known."""
    judges = [(config.model, config.base_url)]
    for entry in config.others:
        model, _, address = entry.partition("=")
        judges.append((model, (address or config.base_url).rstrip("/")))
    return [JudgeSpec(model, address, config, find_price(config, model)) for model, address in judges]


class CallPlan:
    """All calls of a job, by number; a call's text is made when it is asked for, so that a plan stays small."""

    def __init__(
        self, items: Sequence[Item], rubric: Rubric, judges: Sequence[JudgeSpec], *, both_orders: bool, samples: int
    ) -> None:
        """List the calls, item by item, so that a job that is stopped has whole items."""
        self.items = items
        self.rubric = rubric
        self.judges = {judge.name: judge for judge in judges}
        self.image_hashes: dict[Path, str] = {}
        swaps: tuple[_Order, ...] = ("given", "swapped") if both_orders and rubric.kind == "pair" else ("given",)
        self.slots = [
            (number, judge.name, order, sample)
            for number in range(len(items))
            for judge in judges
            for sample in range(samples)
            for order in swaps
        ]

    def __len__(self) -> int:
        """Return how many calls there are."""
        return len(self.slots)

    def __getitem__(self, index: int) -> Call:
        """Return a call. Raises DataError for an image that cannot be sent."""
        number, judge, order, sample = self.slots[index]
        return self.call(self.items[number], self.judges[judge], order, sample)

    def __iter__(self) -> Iterator[Call]:
        """Go through all calls."""
        return (self[index] for index in range(len(self)))

    def call(self, item: Item, judge: JudgeSpec, order: _Order, sample: int) -> Call:
        """Word one request and hash it."""
        answers = item.answers if order == "given" else item.answers[::-1]
        rubric = self.rubric
        if item.request is None:
            text = compose(rubric, item.category, item.context, item.question, answers, as_json=judge.as_json)
        else:
            text = item.request + (AS_JSON if judge.as_json else "")
        image = item.image if judge.config.sees_images else None
        image_hash = self.hash_of(image, item) if image else ""
        body = _request_body(judge, rubric, text, sample)
        canonical = {
            "judge": [judge.base_url, judge.model],
            "rubric": rubric.version,
            "body": body,
            "order": order,
            "image": image_hash,
            "sample": sample,
        }
        key = hashlib.sha256(json.dumps(canonical, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]
        prompt_bytes = sum(len(message["content"].encode()) for message in body["messages"])
        extra = 2 * _TOKENS_PER_MESSAGE + (judge.config.tokens_per_image if image else 0)
        if judge.as_json:
            extra += len(json.dumps(body["response_format"]))
        longest = judge.config.max_tokens
        most = judge.price.cost(prompt_bytes + extra, longest) if judge.price else 0.0
        tokens = -(-prompt_bytes // _BYTES_PER_TOKEN) + extra + longest
        pair = " | ".join(item.names)
        return Call(key, judge.name, item.id, pair, order, sample, rubric.kind, body, tokens, most, image)

    def hash_of(self, image: Path, item: Item) -> str:
        """Return the hash of an image's content, read once. Raises DataError."""
        if image not in self.image_hashes:
            self.image_hashes[image] = hashlib.sha256(_read_image_bytes(image, item.id)).hexdigest()
        return self.image_hashes[image]


def _request_body(judge: JudgeSpec, rubric: Rubric, text: str, sample: int) -> dict[str, Any]:
    """Return the parameters of a chat completion, images left out."""
    config = judge.config
    messages = [{"role": "system", "content": rubric.system}] if rubric.system else []
    body: dict[str, Any] = {
        "model": judge.model,
        "messages": [*messages, {"role": "user", "content": text}],
        "temperature": config.temperature,
        token_limit_name(config, judge.model): config.max_tokens,
    }
    if config.seed is not None:
        body["seed"] = config.seed + sample
    if judge.as_json:
        body["response_format"] = schema(rubric.kind)
    return body


def token_limit_name(config: JudgeConfig, model: str) -> str:
    """Return how the endpoint calls the limit of a reply: OpenAI's reasoning models refuse the older name."""
    if config.token_limit_name != "auto":
        return config.token_limit_name
    return "max_completion_tokens" if _REASONING.match(model) else "max_tokens"


def with_image(body: Mapping[str, Any], content: bytes) -> dict[str, Any]:
    """Return a request whose last message shows an image before its text."""
    *others, last = body["messages"]
    encoded = base64.b64encode(content).decode()
    shown = {"type": "image_url", "image_url": {"url": f"data:{_media_type(content)};base64,{encoded}"}}
    parts = [shown, {"type": "text", "text": last["content"]}]
    return {**body, "messages": [*others, {**last, "content": parts}]}


def _media_type(content: bytes) -> str | None:
    """Return what an encoded image is, by its first bytes; None for what judges do not take."""
    return next((kind for start, kind in _MEDIA_TYPES.items() if content.startswith(start)), None)


def _read_image_bytes(path: Path, item: str) -> bytes:
    """Read an image file as it is. Raises DataError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"item {item!r}: cannot read the image {path}: {error.strerror}; check --image_folder"
        ) from error
    if _media_type(content) is None:
        raise DataError(
            f"item {item!r}: {path} is no PNG, JPEG, WebP or GIF file, and judges take no other: convert it"
        )
    return content

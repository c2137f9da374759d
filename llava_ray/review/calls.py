"""Items to be judged, and their calls: one request each, with a key that hashes its contents."""

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
from llava_ray.review.rubric import AS_JSON, ReviewKind, Rubric, compose_request
from llava_ray.review.verdict import build_response_format

_Order = Literal["given", "swapped"]
_OPENAI = "api.openai.com"
_TOKENS_PER_MESSAGE = 16  # roles, separators, the schema's own; generous
_TOKENS_OF_SCORES = 100  # of a verdict's names, numbers and marks
_SHORTEST = 40  # characters of an explanation that is bounded
_BYTES_PER_TOKEN = 3  # of English text about 4.5
_REASONING = re.compile(r"(?:.*/)?(?:o[1-9]|gpt-[5-9])(?![\w])", re.IGNORECASE)
_MEDIA_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp", b"GIF8": "image/gif"}


@dataclass(frozen=True)
class Item:
    """A question with one answer to judge, or two, the first of which is Assistant 1 in the given order."""

    id: str
    question: str
    answers: tuple[str, ...]
    names: tuple[str, ...]
    """The source of each answer: "reference", or a model's name."""
    category: str = "default"
    context: Any = None
    image: Path | None = None
    cluster: str = ""
    """The unit of correlated items, mostly the image: they are not independent in statistics."""
    request: str | None = None
    """The whole text of the request, where a benchmark defines it."""
    answer_ids: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    """Categories in which it is counted; default: its category."""


@dataclass(frozen=True)
class JudgeSpec:
    """A judge: a model at an address, with its settings and price (None: unknown)."""

    model: str
    base_url: str
    config: JudgeConfig
    price: Price | None

    @property
    def name(self) -> str:
        """Return the name in reports: the model, with its address unless it is OpenAI's."""
        return self.model if self.is_openais else f"{self.model} at {self.host}"

    @property
    def host(self) -> str:
        """Return the host of the judge's address, with its port and path."""
        return self.base_url.partition("://")[2].removesuffix("/v1")

    @property
    def is_openais(self) -> bool:
        """Return whether OpenAI itself answers."""
        return self.host == _OPENAI

    @property
    def as_json(self) -> bool:
        """Return whether replies follow the JSON schema."""
        return self.config.response_format == "json_schema"


@dataclass(frozen=True)
class Call:
    """One request to a judge, with its key and upper bounds of tokens and cost."""

    key: str
    judge: str
    item_id: str
    pair: str
    """The names of the item's answers."""
    order: _Order
    sample: int
    kind: ReviewKind
    body: dict[str, Any]
    tokens: int
    """Estimated tokens of prompt and output, for the rate limit."""
    dollars: float
    """Upper bound of the cost: one prompt token per byte of the text, and the longest output."""
    image: Path | None = None
    image_content: bytes = b""

    def with_image_content(self) -> "Call":
        """Return the call with its image's content, for another process. Raises DataError."""
        return self if self.image is None else replace(self, image_content=_read_image_bytes(self.image, self.item_id))


def list_judges(config: JudgeConfig) -> list[JudgeSpec]:
    """Return all judges of a job, the main one first. Raises ConfigError for an unknown price."""
    judges = [(config.model, config.base_url)]
    for entry in config.others:
        model, _, address = entry.partition("=")
        judges.append((model, (address or config.base_url).rstrip("/")))
    return [JudgeSpec(model, address, config, find_price(config, model)) for model, address in judges]


class CallPlan:
    """All calls of a job, by number; a call's text is built on access, so that a plan stays small."""

    def __init__(
        self, items: Sequence[Item], rubric: Rubric, judges: Sequence[JudgeSpec], *, both_orders: bool, samples: int
    ) -> None:
        """List the calls, item by item, so that a stopped job has complete items."""
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
        """Return the number of calls."""
        return len(self.slots)

    def __getitem__(self, index: int) -> Call:
        """Build a call. Raises DataError for an image that cannot be sent."""
        number, judge, order, sample = self.slots[index]
        return self.call(self.items[number], self.judges[judge], order, sample)

    def __iter__(self) -> Iterator[Call]:
        """Iterate over all calls."""
        return (self[index] for index in range(len(self)))

    def call(self, item: Item, judge: JudgeSpec, order: _Order, sample: int) -> Call:
        """Build one request and its key."""
        answers = item.answers if order == "given" else item.answers[::-1]
        rubric = self.rubric
        if item.request is None:
            text = compose_request(rubric, item.category, item.context, item.question, answers, as_json=judge.as_json)
        else:
            text = item.request + (AS_JSON if judge.as_json else "")
        image = item.image if judge.config.sees_images else None
        image_hash = self.hash_of(image, item) if image else ""
        body = _request_body(judge, rubric, text, sample)
        canonical = {
            "judge": [judge.base_url, judge.model],
            "rubric": rubric.version,
            "body": _identify_body(body, rubric),
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
        """Compute the hash of an image's content, cached. Raises DataError."""
        if image not in self.image_hashes:
            self.image_hashes[image] = hashlib.sha256(_read_image_bytes(image, item.id)).hexdigest()
        return self.image_hashes[image]


def _request_body(judge: JudgeSpec, rubric: Rubric, text: str, sample: int) -> dict[str, Any]:
    """Return the parameters of a chat completion, without images."""
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
        # So that a model that never stops explaining still gives its scores; OpenAI's schemas have no maxLength.
        longest = None if judge.is_openais else max(_SHORTEST, config.max_tokens - _TOKENS_OF_SCORES)
        body["response_format"] = build_response_format(rubric.kind, longest)
    return body


def _identify_body(body: dict[str, Any], rubric: Rubric) -> dict[str, Any]:
    """Return what tells calls apart: a schema's bounds do not, so that replies of earlier versions are found again."""
    if "response_format" not in body:
        return body
    return body | {"response_format": build_response_format(rubric.kind, with_bounds=False)}


def token_limit_name(config: JudgeConfig, model: str) -> str:
    """Return the endpoint's name for the reply's token limit: OpenAI's reasoning models reject the older one."""
    if config.token_limit_name != "auto":
        return config.token_limit_name
    return "max_completion_tokens" if _REASONING.match(model) else "max_tokens"


def with_image(body: Mapping[str, Any], content: bytes) -> dict[str, Any]:
    """Return a request whose last message has an image before its text."""
    *others, last = body["messages"]
    encoded = base64.b64encode(content).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:{_media_type(content)};base64,{encoded}"}}
    parts = [image, {"type": "text", "text": last["content"]}]
    return {**body, "messages": [*others, {**last, "content": parts}]}


def _media_type(content: bytes) -> str | None:
    """Return the media type of an encoded image; None if judges do not accept it."""
    return next((kind for start, kind in _MEDIA_TYPES.items() if content.startswith(start)), None)


def _read_image_bytes(path: Path, item: str) -> bytes:
    """Read an image file without decoding. Raises DataError."""
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

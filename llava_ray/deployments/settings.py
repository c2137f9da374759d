"""What a service is told when it starts: every key of ``serve run llava_ray.deployments:app key=value``."""

import ipaddress
from typing import Annotated, Literal, Self

from pydantic import AliasChoices, BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as validator_of_whole

from llava_ray.config.schema import ConfigSection

_MIB = 2**20
_RUN_MODEL = "model"  # what the bundle in every run's folder is called: it says nothing


def split(value: object) -> object:
    """Take a list as the command line has it: with commas."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


_Texts = Annotated[tuple[str, ...], BeforeValidator(split)]


class ServeSettings(ConfigSection):
    """One application: which models it serves, how many copies, what it accepts from outside."""

    model: _Texts = Field(validation_alias=AliasChoices("model", "models"))
    """Bundles, or any folder or hub id that a LLaVA comes in; several with commas. ``NAME@PATH`` names one, otherwise
    its folder's name does; of ``…/NAME/model``, as a run leaves it, NAME."""
    adapters: _Texts = ()
    """LoRA folders over the first model's base, ``NAME@PATH`` or PATH: each is a model of its own in requests."""
    engine: str = "builtin"
    """"builtin", "vllm", or "module:function": called with a ModelSource and these settings, it returns an Engine."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights; auto is bfloat16 on a GPU and float32 without one."""
    export_dir: str = "~/.cache/llava_ray/vllm"
    """Where engine=vllm keeps models that are not in the hub layout in its form; a machine's replicas share it."""
    max_num_seqs: PositiveInt = 32
    """Answers that a replica writes at the same time."""
    max_model_len: PositiveInt | None = None
    """Tokens of prompt and answer together; default: the model's own."""
    max_tokens: PositiveInt = 512
    """New tokens where a request does not say how many."""

    min_replicas: NonNegativeInt = 1
    """Copies of each model that are always there; 0 lets it go when nobody asks."""
    max_replicas: PositiveInt = 1
    """Copies of each model at most."""
    min_ingress_replicas: PositiveInt = 1
    """Copies of the API's front that are always there (``api`` only)."""
    max_ingress_replicas: PositiveInt = 4
    """Copies of the API's front at most (``api`` only)."""
    api_app: str = "api"
    """Name of the application whose models the page asks (``page`` only)."""
    target_ongoing_requests: PositiveFloat = 16.0
    """Requests running and waiting that a replica should have: more of them start another, fewer stop one."""
    upscale_delay_s: NonNegativeFloat = 5.0
    """How long there must be too many before a replica is started."""
    downscale_delay_s: NonNegativeFloat = 300.0
    """How long there must be too few before one is stopped."""
    drain_timeout_s: PositiveFloat = 180.0
    """How long a replica that is stopped may take to finish its answers."""
    num_cpus: NonNegativeFloat = 1.0
    """Logical CPUs of a model's replica."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs of a model's replica."""
    accelerator_type: str | None = None
    """Ray's name of the GPU that replicas must have, such as "A100"."""
    max_queued_requests: NonNegativeInt = 64
    """Requests that wait in a replica; the next is refused with 429 before anything of it is decoded."""
    retry_after_s: PositiveInt = 2
    """What a refused client is told to wait."""

    allowed_media_domains: _Texts = ()
    """Hosts that http(s) images may come from; none by default. ``.example.org`` stands for all its subdomains."""
    allow_private_media_addresses: bool = False
    """Let an allowed domain be an address of this machine or of the private network."""
    allowed_local_media_path: str | None = None
    """Folder under which ``file:`` images may lie; none by default."""
    max_body_bytes: PositiveInt = 32 * _MIB
    """Of a whole request; data URIs are a third larger than their image."""
    max_image_bytes: PositiveInt = 16 * _MIB
    """Of one encoded image."""
    max_image_pixels: PositiveInt = 50_000_000
    """Width times height, read from the header before anything is decoded."""
    max_image_frames: PositiveInt = 64
    """Frames of an animation; only the first is looked at."""
    image_decode_s: PositiveFloat = 10.0
    """Processor time for decoding one image, in a process of its own that is killed beyond it."""
    max_images: PositiveInt = 8
    """Images of one request."""
    max_open_requests: PositiveInt = 1500
    """Requests that one ingress holds at once, streams included; health is always answered."""
    max_open_requests_per_address: PositiveInt = 1000
    """The same from one address."""
    max_page_streams: PositiveInt = 512
    """Open pages' event streams that one ingress holds at once; a page that is open has one or two."""
    max_page_streams_per_address: PositiveInt = 64
    """The same from one address."""
    max_bytes_in_flight: PositiveInt = 512 * _MIB
    """Bodies, and images of the page's chats, that one ingress holds at once; the next is refused with 429. One body of
    max_body_bytes always fits."""
    max_bytes_in_flight_per_key: PositiveInt = 256 * _MIB
    """The same with one key; from one address where there are no keys."""
    max_upload_bytes: PositiveInt = 4096 * _MIB
    """Uploads that the page keeps on its disk; each is deleted after a day."""
    trusted_proxies: _Texts = ()
    """Addresses and networks (10.0.0.0/8) of proxies whose X-Forwarded-For is believed; none by default."""
    max_choices: PositiveInt = 8
    """``n`` of one request."""
    max_text_chars: PositiveInt = 400_000
    """Characters of all messages of one request."""
    body_timeout_s: PositiveFloat = 20.0
    """For a request's body to arrive whole."""
    media_timeout_s: PositiveFloat = 5.0
    """For one image to be fetched, redirects included."""
    max_redirects: NonNegativeInt = 3
    """Hops from one allowed address to the next."""

    api_keys_file: str | None = None
    """TOML with a table of keys; see ``auth``. LLAVA_RAY_API_KEYS ("name=key,name=key") does the same. Without either,
    everybody who reaches the port may ask."""
    requests_per_minute: PositiveInt | None = None
    """Of each key that has no limit of its own (of everybody together where there are no keys); default: no limit."""
    logins_per_minute: PositiveInt = 20
    """Attempts to log in to the page from one address, a quarter of them at once."""
    cors_allowed_origins: _Texts = ()
    """Origins whose pages may call the API from a browser; none by default."""
    moderation_url: str | None = None
    """Base address of an OpenAI-compatible API whose /moderations replicas ask before each answer; its key comes from
    LLAVA_RAY_MODERATION_KEY. What it does not pass, and anything while it does not answer, is refused."""
    moderation_model: str = "omni-moderation-latest"
    """Model that moderates."""
    moderation_timeout_s: PositiveFloat = 5.0
    """For its verdict."""

    page_title: str = "LLaVA"
    """Heading of the page."""
    page_examples: str | None = None
    """JSON file of questions to begin with that fit the model, ``[{"text": …, "image": path beside the file}, …]``;
    without it the page shows none."""
    page_root_path: str = ""
    """Path under which a proxy shows the page and which it takes off, such as "/llava". Serve's own route_prefix needs
    no word of it."""
    page_log_dir: str | None = None
    """Folder for conversation logs of users who agree to it; without it nobody is asked and nothing is kept."""
    page_log_days: PositiveInt = 30
    """Days after which logs and images that no log names any more are deleted."""
    mlflow_tracking_uri: str | None = None
    """Where to send one trace a request (times and counts, never texts); default: nowhere."""

    @validator_of_whole(mode="after")
    def consistent(self) -> Self:
        """Refuse bounds that exclude each other."""
        if not self.model:
            raise ValueError("model: no path given; expected model=PATH")
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} > max_replicas {self.max_replicas}")
        if self.min_ingress_replicas > self.max_ingress_replicas:
            raise ValueError(
                f"min_ingress_replicas {self.min_ingress_replicas} > max_ingress_replicas {self.max_ingress_replicas}"
            )
        for entry in self.trusted_proxies:
            try:
                ipaddress.ip_network(entry, strict=False)
            except ValueError:
                raise ValueError(f"trusted_proxies: {entry!r} is no address or network such as 10.0.0.0/8") from None
        names = [name for source in self.sources for name in source.names]
        if len(set(names)) < len(names):
            raise ValueError(f"two models are called the same: {', '.join(names)}; name them, NAME@PATH")
        return self

    @property
    def sources(self) -> tuple["ModelSource", ...]:
        """Return each model with the adapters that are served over it."""
        adapters = tuple(_split_name(text) for text in self.adapters)
        return tuple(
            ModelSource(name=name, path=path, adapters=adapters if index == 0 else ())
            for index, (name, path) in enumerate(map(_split_name, self.model))
        )


class ModelSource(ConfigSection):
    """One deployment of a model."""

    name: str
    """What requests call it."""
    path: str
    """Folder or hub id."""
    adapters: tuple[tuple[str, str], ...] = ()
    """(name, folder) of each LoRA beside it."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names under which it answers, its own first."""
        return (self.name, *(name for name, _ in self.adapters))


def _split_name(text: str) -> tuple[str, str]:
    """Split ``NAME@PATH``; a bare path is called like its last part, or the one before if that is only "model"."""
    name, at, path = text.partition("@")
    if at:
        return name, path
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if len(parts) > 1 and parts[-1] == _RUN_MODEL:
        parts.pop()
    return (parts[-1] if parts else text), text

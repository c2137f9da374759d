"""Settings of a service: every key of ``serve run llava_ray.deployments:app key=value``."""

import ipaddress
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as validator_of_whole
from pydantic.fields import FieldInfo

from llava_ray.config.schema import ConfigSection
from llava_ray.deployments.adapters.places import is_plain_url
from llava_ray.deployments.model_source import ModelSource, split_model_name
from llava_ray.deployments.quantization import check_quantization

_MIB = 2**20


def split(value: object) -> object:
    """Split a comma-separated list."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


_Texts = Annotated[tuple[str, ...], BeforeValidator(split)]


def _of_engine(name: str, default: Any = None) -> Any:
    """Return the field of an engine's setting, ``engine.NAME`` in a command or file."""
    return Field(default=default, validation_alias=AliasChoices(f"engine.{name}", f"engine_{name}"))


class ServeSettings(ConfigSection):
    """The settings of one application: its models, replicas and limits."""

    model: _Texts = Field(validation_alias=AliasChoices("model", "models"))
    """Bundles, or folders or hub ids (``org/name``, ``hf://org/name@revision``) of any LLaVA; several with commas.
    ``NAME@PATH`` names one, otherwise its folder's name does; for a run's ``…/NAME/model``, NAME."""
    adapters: _Texts = ()
    """LoRA folders for the first model, ``NAME@PATH`` or PATH: requests name each as a model."""
    engine: str = "builtin"
    """"builtin", "vllm", or "module:function": called with a ModelSource and these settings, it returns an Engine."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights; auto is bfloat16 on a GPU and float32 without one."""
    export_dir: str = "~/.cache/llava_ray/vllm"
    """Folder for engine=vllm's exports of models that are not in the hub layout; shared by a machine's replicas."""
    max_num_seqs: PositiveInt = 32
    """Concurrent answers of a replica."""
    max_model_len: PositiveInt | None = None
    """Tokens of prompt and answer together; default: the model's own."""
    max_tokens: PositiveInt = 512
    """New tokens of requests without max_tokens."""
    tool_format: Literal["hermes", "llama_json", "mistral", "pythonic"] | None = None
    """Format of the tool calls that models write; default: the one that a model's chat template shows."""
    engine_kv_cache_bytes: PositiveInt | None = _of_engine("kv_cache_bytes")
    """Memory of keys and values in a replica; default: ``engine.memory_share`` of what is free."""
    engine_kv_cache_tokens: PositiveInt | None = _of_engine("kv_cache_tokens")
    """The same in tokens (builtin)."""
    engine_memory_share: Annotated[float, Field(gt=0, le=1)] | None = _of_engine("memory_share")
    """Share of the memory that a device, or the control group, has free once the model is loaded, for keys and values;
    default: 0.8 of a GPU, a quarter of what is free on a CPU, both divided by the replicas that may share it. With
    vllm: of all memory of a GPU, the weights included."""
    engine_prefix_cache_share: Annotated[float, Field(ge=0, le=1)] = _of_engine("prefix_cache_share", 0.5)
    """Most of the KV memory that keeps text already read for later requests that begin with it; 0 keeps none."""
    engine_prefill_chunk: PositiveInt | None = _of_engine("prefill_chunk")
    """Prompt tokens of one step, which bounds the pause of running streams; default: 256 on a CPU, 2,048 on a GPU."""
    engine_speculative_tokens: NonNegativeInt = _of_engine("speculative_tokens", 8)
    """Most tokens of a greedy answer that are guessed from its prompt and checked at once; 0 guesses none (builtin)."""
    engine_max_waiting_tokens: PositiveInt | None = _of_engine("max_waiting_tokens")
    """Tokens of prompts and answers that wait for memory in a replica; a request beyond them is rejected with 429.
    Default: 32 times what its KV memory holds (builtin)."""
    engine_image_cache_bytes: NonNegativeInt = _of_engine("image_cache_bytes", 256 * _MIB)
    """Memory of the embeddings of images already seen (builtin)."""
    engine_packed_weight_bytes: NonNegativeInt = _of_engine("packed_weight_bytes", 4096 * _MIB)
    """On a CPU, memory for packed copies of the weight matrices; a model that needs more has none (builtin)."""
    engine_quantization: str | None = _of_engine("quantization")
    """Form of the language model's weights in memory: int8 (builtin, on a CPU), or one of vLLM's names, such as
    bitsandbytes, fp8, awq or gptq; default: as they are on disk."""

    min_replicas: NonNegativeInt = 1
    """Minimum replicas of each model; 0 unloads it while there are no requests."""
    max_replicas: PositiveInt = 1
    """Maximum replicas of each model."""
    min_ingress_replicas: PositiveInt = 1
    """Minimum ingress replicas (``api`` only)."""
    max_ingress_replicas: PositiveInt = 4
    """Maximum ingress replicas (``api`` only)."""
    api_app: str = "api"
    """Name of the application whose models the page uses (``page`` only)."""
    target_ongoing_requests: PositiveFloat = 16.0
    """Target of running and waiting requests per replica: more of them start another, fewer stop one."""
    upscale_delay_s: NonNegativeFloat = 5.0
    """Seconds above the target before a replica is started."""
    downscale_delay_s: NonNegativeFloat = 300.0
    """Seconds below the target before one is stopped."""
    drain_timeout_s: PositiveFloat = 180.0
    """Seconds that a stopping replica may take to finish its answers."""
    num_cpus: NonNegativeFloat = 1.0
    """Logical CPUs of a model's replica."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs of a model's replica."""
    accelerator_type: str | None = None
    """Ray's name of the GPU that replicas must have, such as "A100"."""
    max_queued_requests: NonNegativeInt = 64
    """Requests that wait in a replica; the next is rejected with 429 before its images are read."""
    retry_after_s: PositiveInt = 2
    """Seconds of the Retry-After header of a rejected request."""

    allowed_media_domains: _Texts = ()
    """Hosts that http(s) images may come from; none by default. ``.example.org`` stands for all its subdomains."""
    allow_private_media_addresses: bool = False
    """Whether allowed domains may resolve to this machine or a private network."""
    allowed_local_media_path: str | None = None
    """Folder under which ``file:`` images may lie; none by default."""
    max_body_bytes: PositiveInt = 32 * _MIB
    """Bytes of a whole request; data URIs are a third larger than their image."""
    max_image_bytes: PositiveInt = 16 * _MIB
    """Bytes of one encoded image."""
    max_image_pixels: PositiveInt = 50_000_000
    """Width times height, read from the header before anything is decoded."""
    max_image_frames: PositiveInt = 64
    """Frames of an animation; only the first is used."""
    image_decode_s: PositiveFloat = 10.0
    """CPU seconds for decoding one image, in a separate process that is killed after them."""
    max_images: PositiveInt = 8
    """Images of one request."""
    max_open_requests: PositiveInt = 1500
    """Open requests of one ingress, streams included; health checks are always answered."""
    max_open_requests_per_address: PositiveInt = 1000
    """The same from one address."""
    max_page_streams: PositiveInt = 512
    """Open event streams of one ingress's page; an open page has one or two."""
    max_page_streams_per_address: PositiveInt = 64
    """The same from one address."""
    max_bytes_in_flight: PositiveInt = 512 * _MIB
    """Bytes of bodies, and of images of the page's chats, in one ingress; the next is rejected with 429. One body of
    max_body_bytes always fits."""
    max_bytes_in_flight_per_key: PositiveInt = 256 * _MIB
    """The same with one key; from one address where there are no keys."""
    max_upload_bytes: PositiveInt = 4096 * _MIB
    """Bytes of the page's uploads on disk; each is deleted after a day."""
    trusted_proxies: _Texts = ()
    """Addresses and networks (10.0.0.0/8) of proxies whose X-Forwarded-For is trusted; none by default."""
    max_choices: PositiveInt = 8
    """Largest ``n`` of a request."""
    max_text_chars: PositiveInt = 400_000
    """Characters of all messages of one request."""
    body_timeout_s: PositiveFloat = 20.0
    """Seconds for a request's body to arrive."""
    media_timeout_s: PositiveFloat = 5.0
    """Seconds for fetching one image, redirects included."""
    max_redirects: NonNegativeInt = 3
    """Redirects from one allowed address to another."""

    api_keys_file: str | None = None
    """TOML with a table of keys; see ``auth``. LLAVA_RAY_API_KEYS ("name=key,name=key") does the same. Without either,
    requests need no key."""
    requests_per_minute: PositiveInt | None = None
    """Rate of each key without its own limit (of all clients together where there are no keys); default: no limit."""
    logins_per_minute: PositiveInt = 20
    """Login attempts on the page from one address, with bursts of a quarter of them."""
    admin_keys: _Texts = ()
    """Names of the API keys that may load and unload adapters while the service runs; none by default."""
    allowed_adapter_paths: _Texts = ()
    """Folders under which such adapters may lie, with links resolved; the same on all machines. None by default."""
    allowed_adapter_urls: _Texts = ()
    """Addresses under which such adapters' folders may lie, such as ``https://example.org/adapters/``; none by
    default."""
    max_adapters: PositiveInt = 1000
    """Adapters that were loaded while the service runs and are known to it."""
    max_loaded_adapters: PositiveInt = 32
    """Those of them in the memory of one replica; the least recently used one makes room, and its next request loads it
    again."""
    max_lora_rank: PositiveInt = 256
    """Largest rank of such an adapter."""
    max_adapter_bytes: PositiveInt = 4096 * _MIB
    """Bytes of the files of such an adapter."""
    adapter_cache_dir: str = "~/.cache/llava_ray/adapters"
    """Folder for downloaded adapters; shared by a machine's replicas."""
    adapter_cache_bytes: PositiveInt = 16384 * _MIB
    """Bytes of downloaded adapters; the least recently used ones are deleted beyond them."""
    adapter_timeout_s: PositiveFloat = 300.0
    """Seconds for the download of one adapter."""
    api_docs: bool = False
    """Whether /docs and /redoc (one page, without scripts and other hosts) and /openapi.json describe the API."""
    cors_allowed_origins: _Texts = ()
    """Origins whose pages may call the API from a browser; none by default."""
    moderation_url: str | None = None
    """Base address of an OpenAI-compatible API whose /moderations is called before each answer; its key comes from
    LLAVA_RAY_MODERATION_KEY. Flagged requests, and all requests while it does not respond, are rejected."""
    moderation_model: str = "omni-moderation-latest"
    """Name of the moderation model."""
    moderation_timeout_s: PositiveFloat = 5.0
    """Seconds for the moderation's response."""

    page_title: str = "LLaVA"
    """Heading of the page."""
    page_examples: str | None = None
    """JSON file of example questions for the model, ``[{"text": …, "image": path beside the file}, …]``; without it the
    page shows none."""
    page_root_path: str = ""
    """Path prefix that a proxy strips, such as "/llava". Serve's own route_prefix needs no setting."""
    page_log_dir: str | None = None
    """Folder for conversation logs of users who agree; without it there is no question and no log."""
    page_log_days: PositiveInt = 30
    """Days after which logs and their images are deleted."""
    mlflow_tracking_uri: str | None = None
    """MLflow server for one trace per request (times and counts, never texts); default: no traces."""

    @validator_of_whole(mode="after")
    def consistent(self) -> Self:
        """Check the settings against each other."""
        if not self.model:
            raise ValueError("model: no path given; expected model=PATH")
        check_quantization(self.engine, self.engine_quantization, on_gpu=self.num_gpus > 0)
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
            raise ValueError(f"two models have the same name: {', '.join(names)}; name them, NAME@PATH")
        return self

    @validator_of_whole(mode="after")
    def adapters_consistent(self) -> Self:
        """Check the settings of adapters that are loaded while the service runs."""
        for entry in self.allowed_adapter_urls:
            if not is_plain_url(entry):
                raise ValueError(
                    f"allowed_adapter_urls: {entry[:200]!r} is no address such as https://example.org/adapters/ "
                    "(without user, query and dots as parts of its path)"
                )
        if self.admin_keys and not (self.allowed_adapter_paths or self.allowed_adapter_urls):
            raise ValueError("admin_keys: set allowed_adapter_paths or allowed_adapter_urls too, or leave it out")
        return self

    @property
    def loads_adapters(self) -> bool:
        """Return whether adapters can be loaded while the service runs."""
        return bool(self.admin_keys and (self.allowed_adapter_paths or self.allowed_adapter_urls))

    @property
    def sharing_replicas(self) -> float:
        """Return how many replicas may share one machine's memory, or one GPU's."""
        if self.num_gpus:
            return max(1.0, 1 / self.num_gpus)
        return float(max(1, self.max_replicas) * len(self.model))

    @property
    def sources(self) -> tuple[ModelSource, ...]:
        """Return each model with the adapters that are served over it."""
        adapters = tuple(split_model_name(text) for text in self.adapters)
        return tuple(
            ModelSource(name=name, path=path, adapters=adapters if index == 0 else ())
            for index, (name, path) in enumerate(map(split_model_name, self.model))
        )


def spell_key(name: str, field: FieldInfo) -> str:
    """Return how a setting is written in a command or file."""
    alias = field.validation_alias
    return str(alias.choices[0]) if isinstance(alias, AliasChoices) else name

"""Metrics with vLLM's names and units, so that its dashboards work; collected from all replicas."""

from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llava_ray.generate.engine import EngineStats

# Seconds; vLLM's own buckets.
_FIRST_TOKEN = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
)
_BETWEEN_TOKENS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)

_LABELS = ("model_name",)

# Counted from zero, not from their first case: a rate needs a value before it, and alerts wait for these.
_REASONS = ("stop", "length")
_REPLICA_CODES = ("queue_full", "engine_failed")
_INGRESS_CODES = ("too_many_open_requests", "too_many_bytes_in_flight", "invalid_api_key", "internal_error")


class ReplicaMetrics:
    """The metrics of one replica of a model."""

    def __init__(self, model: str) -> None:
        """Initialise the metrics at zero."""
        self.model = model
        self.registry = CollectorRegistry()
        self.first_token = self.histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token", _FIRST_TOKEN
        )
        self.between_tokens = self.histogram("vllm:inter_token_latency_seconds", "Between two tokens", _BETWEEN_TOKENS)
        self.whole = self.histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token", _WHOLE)
        self.queue = self.histogram(
            "vllm:request_queue_time_seconds", "Waiting for a place in the running batch", _WHOLE
        )
        self.prompt_tokens = self.histogram(
            "vllm:request_prompt_tokens", "Tokens of a prompt, images included", _TOKENS
        )
        self.new_tokens = self.histogram("vllm:request_generation_tokens", "Tokens of an answer", _TOKENS)
        self.media = self.histogram(
            "llava_ray:media_read_seconds", "To fetch and check a request's images", _FIRST_TOKEN
        )
        labels = (*_LABELS, "finished_reason")
        self.success = Counter("vllm:request_success", "Complete answers", labels, registry=self.registry)
        labels = (*_LABELS, "code")
        self.refused = Counter("llava_ray:requests_refused", "Requests not answered", labels, registry=self.registry)
        for reason in _REASONS:
            self.success.labels(model, reason)
        for code in _REPLICA_CODES:
            self.refused.labels(model, code)

    def histogram(self, name: str, meaning: str, buckets: Sequence[float]) -> Histogram:
        """Create a histogram labelled with the model."""
        return Histogram(name, meaning, _LABELS, buckets=buckets, registry=self.registry).labels(self.model)

    def collect(self, stats: EngineStats) -> list[Metric]:
        """Return all current metrics, the engine's included."""
        return [*self.registry.collect(), *_engine_metrics(stats, self.model)]


def _engine_metrics(stats: EngineStats, model: str) -> list[Metric]:
    """Convert an engine's statistics to metrics with vLLM's names."""
    share = stats.kv_tokens_used / stats.kv_tokens_capacity if stats.kv_tokens_capacity else 0.0
    gauges: Mapping[str, tuple[str, float]] = {
        "vllm:num_requests_running": ("Answers being written", stats.num_running),
        "vllm:num_requests_waiting": ("Requests that the engine has not begun", stats.num_waiting),
        "vllm:kv_cache_usage_perc": ("Share of the KV memory in use, 0 to 1", share),
        "llava_ray:kv_cache_tokens": ("Tokens that the KV memory holds", stats.kv_tokens_capacity),
        "llava_ray:kv_cache_bytes": ("Bytes of the KV memory", stats.kv_bytes),
        "llava_ray:prefix_cache_tokens": ("Tokens of known text in the KV memory", stats.prefix_cache_tokens),
    }
    counters: Mapping[str, tuple[str, float]] = {
        "vllm:prompt_tokens": ("Tokens read", stats.prompt_tokens),
        "vllm:generation_tokens": ("Tokens written", stats.generation_tokens),
        "vllm:mm_cache_queries": ("Images asked about", stats.image_cache_queries),
        "vllm:mm_cache_hits": ("Images whose features were still known", stats.image_cache_hits),
        "vllm:prefix_cache_queries": ("Tokens of prompts", stats.prefix_cache_queries),
        "vllm:prefix_cache_hits": ("Of them, those that were still in the KV memory", stats.prefix_cache_hits),
        "vllm:spec_decode_num_draft_tokens": ("Tokens that were guessed", stats.draft_tokens),
        "vllm:spec_decode_num_accepted_tokens": ("Of them, those that were right", stats.accepted_tokens),
        "llava_ray:requests_cancelled": ("Requests whose client left", stats.num_cancelled),
    }
    families: list[Metric] = []
    for kind, table in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
        for name, (meaning, value) in table.items():
            family = kind(name, meaning, labels=_LABELS)
            family.add_metric([model], value)
            families.append(family)
    return families


class IngressMetrics:
    """The metrics of one ingress process."""

    def __init__(self) -> None:
        """Initialise the metrics at zero."""
        self.registry = CollectorRegistry()
        self.refused = Counter(
            "llava_ray:http_refused", "Requests refused by the API's front", ("code",), registry=self.registry
        )
        self.votes = Counter(
            "llava_ray:votes", "Votes of the page's users", ("model_name", "vote"), registry=self.registry
        )
        self.responses = Counter(
            "llava_ray:http_responses", "Responses by route and status", ("route", "status"), registry=self.registry
        )
        self.min_replicas = Gauge("llava_ray:min_replicas", "Fewest replicas, as set", _LABELS, registry=self.registry)
        self.max_replicas = Gauge("llava_ray:max_replicas", "Most replicas, as set", _LABELS, registry=self.registry)
        for code in _INGRESS_CODES:
            self.refused.labels(code)

    def set_replicas(self, models: Iterable[str], minimum: int, maximum: int) -> None:
        """Set the bounds of each model's number of replicas."""
        for model in models:
            self.min_replicas.labels(model).set(minimum)
            self.max_replicas.labels(model).set(maximum)

    def collect(self) -> list[Metric]:
        """Return all current metrics."""
        return list(self.registry.collect())


class CombinedMetrics(Collector):
    """The metrics of several processes, distinguished by the label ``engine``."""

    def __init__(self, parts: Mapping[str, Iterable[Metric]]) -> None:
        """Initialise with each process's metric families."""
        self.parts = parts

    def collect(self) -> Iterable[Metric]:
        """Return each family once, with the samples of all processes."""
        families: dict[str, Metric] = {}
        for process, metrics in self.parts.items():
            for metric in metrics:
                family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    family.add_sample(sample.name, {**sample.labels, "engine": process}, sample.value)
        return families.values()


def render_metrics(parts: Mapping[str, Iterable[Metric]]) -> bytes:
    """Format metrics in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(CombinedMetrics(parts))
    return generate_latest(registry)

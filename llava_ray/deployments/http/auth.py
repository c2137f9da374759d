"""API keys from a file or the environment, stored as hashes, each with its own rate limit."""

import hashlib
import hmac
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ray.config.toml_files import read_toml_file
from llava_ray.deployments.refusal import Refused
from llava_ray.errors import ConfigError
from llava_ray.reading import MAX_SHOWN

ENVIRONMENT = "LLAVA_RAY_API_KEYS"
_MIN_KEY_CHARS = 16
_DIGEST_CHARS = 64

_EXPECTED = """expected
[keys.alice]
key = "…"                 # or sha256 = "…", its hexadecimal SHA-256
requests_per_minute = 60  # optional"""


@dataclass(frozen=True)
class ApiKey:
    """A named key, stored as a hash, so that settings and memory dumps do not hold the key."""

    name: str
    sha256: str
    requests_per_minute: int | None = None


ANYBODY = ApiKey("anybody", "")


def digest(key: str) -> str:
    """Return the hexadecimal SHA-256 of a key. Keys are random and long, so that no slower hash is needed."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_api_keys(file: str | None, environment: Mapping[str, str] = os.environ) -> tuple[ApiKey, ...]:
    """Load the keys of a TOML file and of LLAVA_RAY_API_KEYS. Raises ConfigError without repeating a key."""
    keys = [*_keys_of_file(Path(file))] if file else []
    for number, entry in enumerate(filter(None, environment.get(ENVIRONMENT, "").split(",")), start=1):
        name, equals, key = entry.strip().partition("=")
        if not equals:
            raise ConfigError(f"{ENVIRONMENT}: entry {number} is not NAME=KEY")
        keys.append(ApiKey(name, digest(_long_enough(key, name))))
    names = [key.name for key in keys]
    if len(set(names)) < len(names):
        raise ConfigError(f"two API keys have one name: {', '.join(sorted(names))}")
    return tuple(keys)


def check_admin_keys(names: Sequence[str], keys: Sequence[ApiKey]) -> None:
    """Check that the admins' keys exist. Raises ConfigError."""
    missing = sorted(set(names) - {key.name for key in keys})
    if missing:
        raise ConfigError(
            f"admin_keys: there is no API key of the name {missing[0][:MAX_SHOWN]!r}; add it to api_keys_file or "
            f"{ENVIRONMENT}"
        )


def _keys_of_file(path: Path) -> list[ApiKey]:
    """Read ``[keys.NAME]`` tables. Raises ConfigError."""
    tables = read_toml_file(path, "api_keys_file").get("keys")
    if not isinstance(tables, dict):
        raise ConfigError(f"api_keys_file {path}: {_EXPECTED}")
    return [_key_of_table(name, table) for name, table in tables.items()]


def _key_of_table(name: str, table: Any) -> ApiKey:
    """Read one table. Raises ConfigError."""
    label = name[:MAX_SHOWN]
    if not isinstance(table, dict) or table.keys() - {"key", "sha256", "requests_per_minute"}:
        raise ConfigError(f"api_keys_file: keys.{label} is invalid; {_EXPECTED}")
    rate, value = table.get("requests_per_minute"), table.get("key", table.get("sha256"))
    one = ("key" in table) != ("sha256" in table)
    if not one or not isinstance(value, str) or (rate is not None and not _positive(rate)):
        raise ConfigError(f"api_keys_file: keys.{label} is invalid; {_EXPECTED}")
    if "key" in table:
        return ApiKey(name, digest(_long_enough(value, label)), rate)
    sha256 = value.lower()
    if len(sha256) != _DIGEST_CHARS:
        raise ConfigError(f"api_keys_file: keys.{label}.sha256 has {len(sha256)} characters, expected {_DIGEST_CHARS}")
    if not set(sha256) <= set("0123456789abcdef"):
        raise ConfigError(f"api_keys_file: keys.{label}.sha256 has other characters than hexadecimal digits")
    return ApiKey(name, sha256, rate)


def _positive(value: object) -> bool:
    """Return whether a value is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _long_enough(key: str, name: str) -> str:
    """Return the key if it is long enough. Raises ConfigError."""
    if len(key) < _MIN_KEY_CHARS:
        raise ConfigError(
            f"API key {name!r} has {len(key)} characters, expected at least {_MIN_KEY_CHARS}; make one with "
            "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return key


class Guard:
    """Authentication and rate limits of one ingress process."""

    def __init__(
        self,
        keys: Sequence[ApiKey],
        requests_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Initialise; without keys everybody is admitted; ``requests_per_minute`` is the keys' default."""
        self.keys = tuple(keys)
        self.requests_per_minute = requests_per_minute
        self.clock = clock
        self.buckets: dict[str, Bucket] = {}

    def find(self, key: str) -> ApiKey | None:
        """Return the entry of a key, in constant time over all keys."""
        found = None
        wanted = digest(key)
        for candidate in self.keys:
            if hmac.compare_digest(candidate.sha256, wanted):
                found = candidate
        return found

    def identify(self, authorization: str) -> ApiKey | Refused:
        """Return the key of an Authorization header, or a refusal."""
        if not self.keys:
            return ANYBODY
        scheme, _, key = authorization.partition(" ")
        found = self.find(key.strip()) if scheme.lower() == "bearer" and key.strip() else None
        return found or Refused(401, "no valid API key; expected a header Authorization: Bearer KEY", "invalid_api_key")

    def admit(self, api_key: ApiKey) -> Refused | None:
        """Count one request of a key; return a refusal if it exceeds the rate."""
        rate = api_key.requests_per_minute or self.requests_per_minute
        if rate is None:
            return None
        bucket = self.buckets.setdefault(api_key.name, Bucket(rate, self.clock()))
        wait = bucket.take(self.clock())
        if wait <= 0:
            return None
        message = f"more than {rate} requests a minute with key {api_key.name!r}; wait {wait:.0f} s"
        return Refused(429, message, "rate_limit_exceeded", retry_after_s=max(1, round(wait + 0.5)))


class Bucket:
    """A token bucket of so many requests per minute, with bursts of a quarter of them."""

    def __init__(self, per_minute: int, now: float) -> None:
        """Initialise a full bucket."""
        self.per_second = per_minute / 60
        self.size = max(1.0, per_minute / 4)
        self.level = self.size
        self.last = now

    def take(self, now: float) -> float:
        """Take a token and return 0, or return the seconds until there is one."""
        self.level = min(self.size, self.level + (now - self.last) * self.per_second)
        self.last = now
        if self.level < 1:
            return (1 - self.level) / self.per_second
        self.level -= 1
        return 0.0

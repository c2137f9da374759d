"""Rate limits in an endpoint's headers: ``Retry-After``, ``retry-after-ms`` and ``x-ratelimit-*``."""

import email.utils
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True)
class Quota:
    """One limit as the endpoint reports it; None for absent values."""

    limit: float | None = None
    remaining: float | None = None
    reset_s: float | None = None


@dataclass(frozen=True)
class Reported:
    """The limits in a reply's headers."""

    requests: Quota = Quota()
    tokens: Quota = Quota()
    retry_after_s: float | None = None


def read_headers(headers: Mapping[str, str], now: datetime | None = None) -> Reported:
    """Parse a reply's headers (lower-case names); ignore invalid values."""
    return Reported(
        _quota(headers, "requests"), _quota(headers, "tokens"), parse_retry_after(headers, now or datetime.now(UTC))
    )


def parse_retry_after(headers: Mapping[str, str], now: datetime) -> float | None:
    """Parse the seconds to wait: ``retry-after-ms``, or ``Retry-After`` in seconds or as a date."""
    precise = _number(headers.get("retry-after-ms"))
    if precise is not None and precise >= 0:
        return precise / 1000
    value = headers.get("retry-after")
    seconds = _number(value)
    if value is None or (seconds is not None and seconds < 0):
        return None
    if seconds is not None:
        return seconds
    try:
        until = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (until.replace(tzinfo=until.tzinfo or UTC) - now).total_seconds())


def parse_duration(text: str | None) -> float | None:
    """Parse the seconds of ``6m0s``, ``1s``, ``20ms`` or plain ``12.5``; None for anything else."""
    if text is None:
        return None
    plain = _number(text)
    if plain is not None:
        return plain if plain >= 0 else None
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text.replace(" ", ""):
        return None
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def _quota(headers: Mapping[str, str], what: str) -> Quota:
    limit = _number(headers.get(f"x-ratelimit-limit-{what}"))
    remaining = _number(headers.get(f"x-ratelimit-remaining-{what}"))
    if limit is not None and limit <= 0:  # Azure sends -1 or 0 for unknown
        limit = remaining = None
    if remaining is not None and remaining < 0:
        remaining = None
    return Quota(limit, remaining, parse_duration(headers.get(f"x-ratelimit-reset-{what}")))


def _number(text: str | None) -> float | None:
    if text is None or not re.fullmatch(r"-?\d+(\.\d+)?", text.strip()):
        return None
    return float(text)

"""When a failed request is asked again: the boundary between a network's faults and our errors.

Transient: timeouts, resets, bodies cut short, 408, 425, 429 and 5xx. Everything else is final.
"""

from __future__ import annotations

import errno
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TypeVar

from distmerge.checkpoints.storage_options import quoted
from distmerge.credentials import redact
from distmerge.errors import DistmergeError, ReadFailed

Answer = TypeVar("Answer")
Explain = Callable[[Exception], DistmergeError | None]
"""Turns a store's own exception into the error that a person should see, if it is final."""

_LOG = logging.getLogger(__name__)
_WORTH_SAYING = 10.0
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 522, 524, 529})
_TRANSIENT_ERRNO = frozenset(
    {errno.EAGAIN, errno.ETIMEDOUT, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN}
)
# By name, because most of these packages are optional and none should be imported for a test.
_TRANSIENT_CLASSES = frozenset(
    {
        "ClientConnectionError",  # aiohttp
        "ClientPayloadError",
        "ConnectionError",  # botocore, requests
        "HTTPClientError",  # botocore
        "IncompleteReadError",
        "ResponseParserError",
        "TransportError",  # httpx: timeouts, network and protocol errors
        "ProtocolError",  # urllib3
        "TimeoutError",
        "NewConnectionError",
        "IncompleteRead",  # http.client
        "gaierror",
    }
)


_UNREACHED_CLASSES = frozenset(
    {
        "ClientConnectorError",  # aiohttp
        "ConnectError",  # httpx
        "ConnectTimeout",
        "ConnectTimeoutError",  # botocore, urllib3
        "ConnectionRefusedError",
        "EndpointConnectionError",  # botocore
        "NewConnectionError",  # urllib3
        "gaierror",
    }
)


class ShortRead(OSError):
    """A response's body ended before the range did."""


class HttpStatus(OSError):
    """A response that is not the bytes that were asked for."""

    def __init__(self, status: int, headers: Mapping[str, str], url: str) -> None:
        super().__init__(f"HTTP {status} from {redact(url)}")
        self.status = status
        self.headers = headers


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how patiently."""

    attempts: int = 6
    """Requests in all, the first one included."""
    base: float = 0.5
    """Seconds: the longest wait after the first failure; it doubles with each one more."""
    cap: float = 20.0
    """Seconds: the longest wait that is chosen here."""
    patience: float = 300.0
    """Seconds: the longest wait that a server may ask for."""

    def wait(self, failures: int, error: Exception) -> float:
        """Seconds to sleep after that many failures: what the server asks for, else jitter."""
        asked = retry_after(error)
        spread = random.uniform(0, min(self.cap, self.base * 2 ** (failures - 1)))
        return spread if asked is None else min(asked, self.patience) + spread


DEFAULT_POLICY = RetryPolicy()


class _Counter:
    """Counts, for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0

    def add(self) -> None:
        with self._lock:
            self._count += 1

    def so_far(self) -> int:
        with self._lock:
            return self._count


_AGAIN = _Counter()


def requests_again() -> int:
    """How many requests this process has made that an earlier failure made necessary."""
    return _AGAIN.so_far()


def retrying(
    action: Callable[[], Answer],
    *,
    what: str,
    explain: Explain,
    policy: RetryPolicy = DEFAULT_POLICY,
    secrets: Sequence[str] = (),
) -> Answer:
    """The answer of `action`, which is called again as long as its failures are transient.

    secrets: what is taken out of failures that are quoted.

    Raises whatever `explain` says of a failure, and ReadFailed naming `what`, the number of
    attempts and the cause otherwise.
    """
    failures = 0
    while True:
        try:
            return action()
        except DistmergeError:
            raise
        except Exception as error:
            failures += 1
            known = explain(error)
            if known is not None:
                raise known from error
            if not is_transient(error) or failures >= policy.attempts:
                raise _failed(what, failures, error, secrets) from error
            delay = policy.wait(failures, error)
            if delay >= _WORTH_SAYING:
                reason = redact(quoted(error, secrets))
                _LOG.warning("Waiting %.0f s to read %s: %s", delay, what, reason)
        time.sleep(delay)
        _AGAIN.add()


def is_transient(error: BaseException) -> bool:
    """Whether asking again may help."""
    for link in _chain(error):
        if _looks_transient(link):
            return True
        status = _status(link)
        if status is not None:
            return status in _TRANSIENT_STATUS
    return False


def is_unreachable(error: BaseException) -> bool:
    """Whether no connection came about: a wrong address, a server or a network that is down."""
    return any(map(_is_unreached, _chain(error)))


def _is_unreached(error: BaseException) -> bool:
    return any(kind.__name__ in _UNREACHED_CLASSES for kind in type(error).__mro__)


def http_status(error: BaseException) -> int | None:
    """The HTTP status behind an exception of botocore, httpx, aiohttp, urllib3 or gcsfs."""
    return next((s for s in map(_status, _chain(error)) if s is not None), None)


def retry_after(error: BaseException) -> float | None:
    """Seconds that the server asks to be left alone, from Retry-After or RateLimit."""
    for link in _chain(error):
        headers = _headers(link)
        asked = headers.get("retry-after")
        if asked is not None:
            return _seconds(asked)
        limit = re.search(r"\br=0\b.*\bt=(\d+)", headers.get("ratelimit", ""))
        if limit:
            return float(limit[1])
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and what it was raised from."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(response, "status_code", None)
    for status in (found, getattr(error, "status", None), getattr(error, "code", None)):
        if isinstance(status, int) and 100 <= status < 600:
            return status
    return None


def _looks_transient(error: BaseException) -> bool:
    if isinstance(error, (TimeoutError, ConnectionError, ShortRead)):
        return True
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO:
        return True
    return any(kind.__name__ in _TRANSIENT_CLASSES for kind in type(error).__mro__)


def _headers(error: BaseException) -> dict[str, str]:
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):
        headers = response.get("ResponseMetadata", {}).get("HTTPHeaders")
    else:
        headers = getattr(response, "headers", None) or getattr(error, "headers", None)
    return {str(k).lower(): str(v) for k, v in dict(headers or {}).items()}


def _seconds(asked: str) -> float | None:
    if asked.strip().isdigit():
        return float(asked)
    try:
        return max(0.0, parsedate_to_datetime(asked).timestamp() - time.time())
    except ValueError:
        return None


def _failed(what: str, attempts: int, error: BaseException, secrets: Sequence[str]) -> ReadFailed:
    times = f"{attempts} attempts" if attempts > 1 else "1 attempt"
    goes_on = "a merge that was interrupted goes on where it was"
    ending, fix = ".", f"try again in a while; {goes_on}"
    if is_unreachable(error):
        ending = ": its server could not be reached."
        fix = f"check the address and the network, or try again in a while; {goes_on}"
        error = next(link for link in _chain(error) if _is_unreached(link))
    elif not is_transient(error):
        fix = f"check the address, the credentials and the storage options; {goes_on}"
    return ReadFailed(
        f"Could not read {what}{ending}",
        f"{times}, the last: {type(error).__name__}: {quoted(error, secrets)}",
        fix=fix,
    )

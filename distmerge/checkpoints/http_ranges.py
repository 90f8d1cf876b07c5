"""The boundary between a byte range and an HTTP response. Knows nothing of the Hub or of models."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from distmerge.checkpoints.parallel import IN_FLIGHT
from distmerge.checkpoints.retry import HttpStatus, ShortRead
from distmerge.errors import SourceChanged

if TYPE_CHECKING:
    import urllib3

CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 60.0
"""The longest wait for the next bytes of a response."""
_PIECE = 2**20


class RangeClient:
    """Pooled connections that fill buffers. Thread-safe; heeds the proxy variables."""

    def __init__(self) -> None:
        self._pools: dict[str, urllib3.PoolManager] = {}
        self._lock = threading.Lock()

    def fill(
        self, url: str, start: int, view: memoryview, *, size: int, headers: Mapping[str, str]
    ) -> None:
        """Fill `view` with the bytes of `url` from `start` on; the whole has `size` bytes.

        An Authorization header is dropped when a redirect leaves the host.

        Raises
            HttpStatus: the answer is neither 200 nor 206.
            SourceChanged: what is there has another size.
            ShortRead: the body ended early. urllib3's errors come as they are.
        """
        response = self._pool(url).request(
            "GET",
            url,
            headers={
                **headers,
                "Range": f"bytes={start}-{start + len(view) - 1}",
                "Accept-Encoding": "identity",
            },
            preload_content=False,
            retries=_only_redirects(),
        )
        try:
            skip = _bytes_before(response, url, start, size)
            _drain(response, skip)
            _receive(response, view)
            if skip:
                response.close()
        except BaseException:
            response.close()  # what is left of the body must not be read as the next response
            raise
        finally:
            response.release_conn()

    def close(self) -> None:
        """Close every idle connection."""
        with self._lock:
            for pool in self._pools.values():
                pool.clear()
            self._pools.clear()

    def _pool(self, url: str) -> urllib3.PoolManager:
        parts = urlsplit(url)
        proxy = getproxies().get(parts.scheme, "")
        if proxy and proxy_bypass(parts.hostname or ""):
            proxy = ""
        with self._lock:
            if proxy not in self._pools:
                self._pools[proxy] = _new_pool(proxy)
            return self._pools[proxy]


def _only_redirects() -> urllib3.Retry:
    """Failures are retried by the caller, Retry-After included."""
    import urllib3

    return urllib3.Retry(
        connect=0, read=0, redirect=5, status=0, other=0, respect_retry_after_header=False
    )


def _new_pool(proxy: str) -> urllib3.PoolManager:
    import urllib3

    settings: dict[str, Any] = {
        "maxsize": IN_FLIGHT,
        "timeout": urllib3.Timeout(connect=CONNECT_SECONDS, read=SILENCE_SECONDS),
        "ca_certs": os.environ.get("REQUESTS_CA_BUNDLE"),
    }
    if proxy:
        return urllib3.ProxyManager(proxy, **settings)
    return urllib3.PoolManager(**settings)


def _bytes_before(response: urllib3.BaseHTTPResponse, url: str, start: int, size: int) -> int:
    """How many bytes of the body come before the range: 0 unless the range was ignored."""
    if response.status == 206:
        whole = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if whole and int(whole[1]) != size:
            raise SourceChanged(
                "A file on the server has another size than when the model was opened.",
                f"{size} bytes then, {whole[1]} now",
            )
        return 0
    if response.status == 200:
        return start
    raise HttpStatus(response.status, response.headers, url)


def _drain(response: urllib3.BaseHTTPResponse, count: int) -> None:
    while count:
        got = len(response.read(min(count, _PIECE)))
        if not got:
            raise ShortRead(f"the body ended {count} bytes before the range")
        count -= got


def _receive(response: urllib3.BaseHTTPResponse, view: memoryview) -> None:
    done = 0
    while done < len(view):
        got = response.read(min(_PIECE, len(view) - done))
        if not got:
            raise ShortRead(f"{done} bytes came instead of {len(view)}")
        view[done : done + len(got)] = got
        done += len(got)

"""What is asked again, how long it is waited, and what is said in the end."""

from __future__ import annotations

import socket
import time
from email.utils import formatdate

import pytest

from distmerge.checkpoints.fsspec_store import FsspecStore
from distmerge.checkpoints.retry import (
    HttpStatus,
    RetryPolicy,
    ShortRead,
    is_transient,
    retry_after,
    retrying,
)
from distmerge.errors import AccessDenied, ReadFailed, SourceChanged

QUICK = RetryPolicy(attempts=4, base=0.001, cap=0.002)


def status(code: int, **headers: str) -> HttpStatus:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return HttpStatus(code, named, "https://cdn/x?Signature=abcdef&b=1")


def caused(cause: Exception) -> Exception:
    error = RuntimeError("wrapped")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        *(status(code) for code in (408, 425, 429, 500, 502, 503, 504)),
        TimeoutError(),
        ConnectionResetError(),
        ShortRead(),
        OSError(110, "timed out"),
        caused(ConnectionResetError()),
        caused(status(503)),
    ],
    ids=repr,
)
def test_transient(error):
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        *(status(code) for code in (400, 401, 403, 404, 412, 416, 501)),
        PermissionError(),
        FileNotFoundError(),
        ValueError(),
        caused(status(404)),
    ],
    ids=repr,
)
def test_final(error):
    assert not is_transient(error)


def test_other_libraries_are_recognised():
    import aiohttp
    import botocore.exceptions
    import urllib3

    assert is_transient(aiohttp.ClientPayloadError())
    assert is_transient(aiohttp.ServerDisconnectedError())
    assert is_transient(botocore.exceptions.ReadTimeoutError(endpoint_url="x"))
    assert is_transient(botocore.exceptions.EndpointConnectionError(endpoint_url="x"))
    assert is_transient(urllib3.exceptions.ReadTimeoutError(None, "x", "y"))
    assert is_transient(urllib3.exceptions.ProtocolError("x"))
    for code, expected in ((503, True), (500, True), (403, False), (404, False)):
        answer = {"Error": {"Code": "X"}, "ResponseMetadata": {"HTTPStatusCode": code}}
        assert is_transient(botocore.exceptions.ClientError(answer, "GetObject")) is expected


@pytest.mark.parametrize("package", ["httpx", "httpx2"])
def test_what_the_hub_client_raises_is_recognised(package):
    httpx = pytest.importorskip(package)
    assert is_transient(httpx.ConnectTimeout("x"))
    assert is_transient(httpx.ReadError("x"))
    assert not is_transient(httpx.InvalidURL("x"))


def test_what_the_server_asks_for():
    assert retry_after(status(429, Retry_After="7")) == 7
    assert retry_after(status(429, RateLimit='"resolvers";r=0;t=42')) == 42
    assert retry_after(status(429, RateLimit='"resolvers";r=12;t=42')) is None
    assert retry_after(status(503)) is None
    assert retry_after(status(503, Retry_After="soon")) is None
    in_a_minute = formatdate(time.time() + 60, usegmt=True)
    assert retry_after(caused(status(503, Retry_After=in_a_minute))) == pytest.approx(60, abs=2)


def test_waits_grow_are_jittered_capped_and_at_least_what_was_asked():
    policy = RetryPolicy(base=1.0, cap=5.0, patience=100.0)
    for failures, longest in ((1, 1), (2, 2), (3, 4), (4, 5), (60, 5)):
        waits = [policy.wait(failures, status(503)) for _ in range(200)]
        assert 0 <= min(waits) < longest / 4
        assert longest * 3 / 4 < max(waits) <= longest
    assert 7 <= policy.wait(1, status(429, Retry_After="7")) <= 8
    assert policy.wait(1, status(429, Retry_After="9999")) <= 101


def calls(*outcomes):
    """An action that raises or returns each outcome in turn, and the list of what is left."""
    left = list(outcomes)

    def action():
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return action, left


def nothing_known(error: Exception) -> None:
    return None


def test_it_is_asked_again_until_it_works():
    action, left = calls(status(503), TimeoutError(), ShortRead(), "bytes", "unused")
    assert retrying(action, what="x", explain=nothing_known, policy=QUICK) == "bytes"
    assert left == ["unused"]


def test_attempts_end_and_the_error_keeps_secrets():
    action, left = calls(*(status(503) for _ in range(5)))
    with pytest.raises(ReadFailed) as caught:
        retrying(action, what="model.bin, bytes 3:9", explain=nothing_known, policy=QUICK)
    assert len(left) == 1
    text = str(caught.value)
    assert "model.bin, bytes 3:9" in text
    assert "4 attempts" in text
    assert "HTTP 503" in text
    assert "abcdef" not in text


@pytest.mark.parametrize("error", [status(404), ValueError("x")], ids=repr)
def test_final_failures_are_not_asked_again(error):
    action, left = calls(error, "unused")
    with pytest.raises(ReadFailed, match="1 attempt"):
        retrying(action, what="x", explain=nothing_known, policy=QUICK)
    assert left == ["unused"]


@pytest.mark.parametrize(
    ("error", "says", "fix"),
    [
        (status(400), "Could not read it.", "check the address, the credentials"),
        (status(503), "Could not read it.", "try again in a while"),
        (ConnectionResetError(), "Could not read it.", "try again in a while"),
        (ConnectionRefusedError(), "its server could not be reached", "check the address and the"),
        (caused(socket.gaierror()), "its server could not be reached", "check the address and the"),
    ],
)
def test_only_what_may_pass_is_to_be_tried_again(error, says, fix):
    def fail():
        raise error

    with pytest.raises(ReadFailed) as raised:
        retrying(fail, what="it", explain=lambda error: None, policy=QUICK)
    assert says in raised.value.headline
    assert str(raised.value.fix).startswith(fix)


@pytest.mark.parametrize("host", ["127.0.0.1:1", "nosuch.invalid"])
def test_a_server_that_is_not_reached_is_no_missing_file(host):
    store = FsspecStore(f"http://{host}/m", {}, only="model.safetensors", policy=QUICK)
    with pytest.raises(ReadFailed, match="its server could not be reached"):
        store.files()
    store.close()


def test_known_and_own_errors_pass_at_once():
    action, left = calls(status(503), "unused")
    with pytest.raises(AccessDenied):
        retrying(action, what="x", explain=lambda e: AccessDenied("no"), policy=QUICK)
    action, left = calls(SourceChanged("changed"), "unused")
    with pytest.raises(SourceChanged):
        retrying(action, what="x", explain=nothing_known, policy=QUICK)
    assert left == ["unused"]

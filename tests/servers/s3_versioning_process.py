"""The process of an S3 that keeps versions and honours conditions: moto's server.

Started by `servers.s3.VersioningS3`. It keeps objects in memory and asks for no credentials.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from pathlib import Path

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from servers.child import run_child, serve_calls
from werkzeug.serving import make_server


class QuietHandler(MotoRequestHandler):
    """Without a line for every request, and with connections that stay open."""

    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: object) -> None:
        """Say nothing."""


async def serve(sockets: list[socket.socket], folder: Path, arguments: list[str]) -> None:
    """Run moto in threads until the parent process is done."""
    (listener,) = sockets
    host, port = listener.getsockname()
    app = DomainDispatcherApplication(create_backend_app)
    listener.listen(128)
    server = make_server(
        host, port, app, threaded=True, request_handler=QuietHandler, fd=listener.fileno()
    )
    serving = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    serving.start()
    await serve_calls(object())
    await asyncio.to_thread(server.shutdown)


if __name__ == "__main__":
    run_child(serve)

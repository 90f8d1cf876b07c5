"""The process of an S3 that is far away: hadro's server, which shapes and spoils its answers.

Started by `servers.s3.DistantS3`, with hadro's settings as JSON.
"""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import uvicorn
from hadro.app import create_app
from hadro.config import Config
from servers.child import run_child, serve_calls


async def serve(sockets: list[socket.socket], folder: Path, arguments: list[str]) -> None:
    """Run hadro until the parent process is done."""
    app = create_app(Config(**json.loads(arguments[0])))
    server = uvicorn.Server(
        uvicorn.Config(
            app, access_log=False, log_level="warning", lifespan="off", timeout_graceful_shutdown=1
        )
    )
    running = asyncio.create_task(server.serve(sockets=sockets))
    while not server.started:
        await asyncio.sleep(0.005)
    await serve_calls(object())
    server.should_exit = True
    await running


if __name__ == "__main__":
    run_child(serve)

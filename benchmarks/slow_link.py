"""A long way to a server: a relay on loopback with a delay each way and a cap on what comes back.

Run as a program, in a process of its own: HOST:PORT of the server, milliseconds of delay there and
back, bytes per second. It prints the port to connect to, ends when its input does, and then prints
how many bytes came back, and the seconds in which the middle nine tenths of them did.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable

CHUNK = 64 << 10
AHEAD = 8 << 20
"""Bytes on their way in one connection, at most: what a long link's buffers hold."""


class Cap:
    """So many bytes a second, over all connections together."""

    def __init__(self, bytes_per_second: float) -> None:
        self._rate = bytes_per_second
        self._free = 0.0
        self._passed: list[tuple[float, int]] = []

    def arrival(self, nbytes: int) -> float:
        """When bytes that are sent now have all passed."""
        self._free = max(self._free, time.monotonic()) + nbytes / self._rate
        before = self._passed[-1][1] if self._passed else 0
        self._passed.append((self._free, before + nbytes))
        return self._free

    def told(self) -> str:
        """Bytes, and the seconds between the first twentieth and the last."""
        total = self._passed[-1][1] if self._passed else 0
        middle = [when for when, so_far in self._passed if 0.05 <= so_far / total <= 0.95]
        return f"{total} {middle[-1] - middle[0]:.3f}" if middle else "0 0"


async def _carry(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    arrival: Callable[[int], float],
    delay: float,
) -> None:
    """One direction: every piece arrives later than it was sent, and none waits for another."""
    way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(AHEAD // CHUNK)

    async def deliver() -> None:
        while True:
            when, piece = await way.get()
            await asyncio.sleep(when - time.monotonic())
            if not piece:
                writer.close()
                return
            writer.write(piece)
            await writer.drain()

    async def send() -> None:
        while True:
            piece = await reader.read(CHUNK)
            await way.put((arrival(len(piece)) + delay, piece))
            if not piece:
                return

    try:
        await asyncio.gather(send(), deliver())
    except ConnectionError:
        writer.close()


def _relay(address: str, cap: Cap, delay: float) -> Callable[..., Awaitable[None]]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = address.rpartition(":")
        there, back = await asyncio.open_connection(host, int(port))
        await asyncio.gather(
            _carry(reader, back, lambda nbytes: time.monotonic(), delay / 2),
            _carry(there, writer, cap.arrival, delay / 2),
            return_exceptions=True,
        )

    return serve


async def _main(address: str, delay: float, rate: float) -> None:
    cap = Cap(rate)
    server = await asyncio.start_server(_relay(address, cap, delay), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    print(cap.told(), flush=True)
    os._exit(0)  # connections may still be open, and there is nothing to tidy up


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], float(sys.argv[2]) / 1000, float(sys.argv[3])))

"""Random bits as a function of position alone.

Bit pattern number `i` of a stream is SplitMix64's output after `i + 1` steps from the stream's
seed (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), so any
range of a stream can be drawn anywhere, in any order, on any device: the draw for an element
depends on the run's seed, the random node's place in the expression, the model, the output key and
the element's row-major index, and on nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distmerge.methods.difference import Bits


def _signed(value: int) -> int:
    """The int64 with the bits of this unsigned 64-bit number: torch has no wrapping uint64."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


# Each of a key's blocks asks for the same. `typed`, as 1, 1.0 and True are equal, but not as text.
@functools.lru_cache(maxsize=4096, typed=True)
def stream_seed(seed: int, *place: object) -> int:
    """64 bits for the stream at `place`: node ordinal, key, model ordinal and the like."""
    text = "\0".join(map(str, (seed, *place))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def random_bits(stream: int, index: Tensor) -> Tensor:
    """The 64 bits at each position. `index` is int64, so is the result (any bit may be set)."""
    z = (index + 1).mul_(_GOLDEN).add_(_signed(stream))
    z ^= (z >> 30) & ((1 << 34) - 1)
    z.mul_(_MIX_1)
    z ^= (z >> 27) & ((1 << 37) - 1)
    z.mul_(_MIX_2)
    z ^= (z >> 31) & ((1 << 33) - 1)
    return z


REMEMBERED = 16 << 20
"""Bytes that an evaluation remembers at most. A bit is a sixteenth of a bfloat16 element, so that
only the largest tensors come to more."""


class Remembered:
    """What was marked at random in one round over a key's blocks, for the next: a bit for each
    element is less to read than its number takes to draw. What has no room is drawn again."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._bits: dict[Hashable, Bits] = {}
        self._lock = threading.Lock()

    def once(self, what: Hashable, make: Callable[[], Bits]) -> Bits:
        """What `make` returned when it was first asked for this, if that is remembered."""
        found = self._bits.get(what)
        if found is None:
            found = make()
            with self._lock:
                if found.nbytes <= self._room:
                    self._room -= found.nbytes
                    self._bits[what] = found
        return found


@dataclass(frozen=True, slots=True)
class Draw:
    """Random numbers for one block of one tensor: what a method's `rng` parameter receives."""

    seed: int
    place: tuple[object, ...]
    start: int
    """Row-major index, in the whole tensor, of the block's first element."""
    remembered: Remembered | None = field(default=None, compare=False, repr=False)

    def uniform(self, like: Tensor, model: int = 0) -> Tensor:
        """Uniform numbers in [0, 1), multiples of 2**-24, in the shape of the block `like`.

        `model` is the model's ordinal in the node: each has a stream of its own.
        """
        index = torch.arange(self.start, self.start + like.numel(), device=like.device)
        bits = random_bits(self.stream(model), index)
        return uniform(bits).view(like.shape)

    def uniform_at(self, positions: Tensor, model: int = 0) -> Tensor:
        """The numbers that `uniform` would give at these int64 offsets into the block."""
        return uniform(random_bits(self.stream(model), positions + self.start))

    def marks(self, what: Hashable, make: Callable[[], Bits]) -> Bits:
        """What `make` returns, which depends on this block, on `what` and on nothing else."""
        if self.remembered is None:
            return make()
        return self.remembered.once((self.place, self.start, what), make)

    def stream(self, model: int = 0) -> int:
        """The seed of a model's stream: 64 bits, unsigned."""
        return stream_seed(self.seed, *self.place, model)


def uniform(bits: Tensor) -> Tensor:
    """Top 24 of 64 bits as float32 in [0, 1)."""
    return ((bits >> 40) & 0xFFFFFF).float().mul_(2.0**-24)

"""What the tests of the run share: one family of models on disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from run.family import Family, make_family
from run.places import place as place

from distmerge.checkpoints.local_store import LocalStore


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A base and four fine-tunes, as directories; nobody changes them."""
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def no_reads(monkeypatch) -> list[str]:
    """Which weight files were read beyond their headers."""
    read: list[str] = []
    original = LocalStore.read_into

    def noting(self: Any, file: Any, start: int, buffer: memoryview) -> None:
        if file.path.endswith(".safetensors") and start > 8 and len(buffer) > 1000:
            read.append(file.path)
        original(self, file, start, buffer)

    monkeypatch.setattr(LocalStore, "read_into", noting)
    return read


@pytest.fixture
def fixed_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans don't depend on what this process holds at the moment."""
    monkeypatch.setattr("distmerge.plan.plan.bare_process", lambda: 200 << 20)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray cluster of this machine, with room for three workers."""
    import ray

    ray.init(
        "local",
        num_cpus=3,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=80 << 20,
    )
    yield
    ray.shutdown()

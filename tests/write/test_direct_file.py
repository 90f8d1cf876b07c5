"""Files written past the page cache hold what plain ones would."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distmerge.errors import OutputError
from distmerge.write.local_output import LocalOutput

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="O_DIRECT is Linux's")
if sys.platform == "linux":
    from distmerge.write.direct_file import BUFFER, DirectFile

    SIZES = st.lists(
        st.one_of(
            st.integers(0, 9000),
            st.sampled_from([4096, BUFFER - 1, BUFFER, BUFFER + 1, 2 * BUFFER + 513]),
        ),
        max_size=5,
    )
    PLACES = [Path("/dev/shm"), None]
    """A file system in memory, which may not know direct writes, and where tests have their own."""


def written(path: Path, parts: list[bytes]) -> bytes:
    file = DirectFile(str(path))
    try:
        for part in parts:
            file.write(memoryview(part))
        file.sync()
    finally:
        file.close()
    return path.read_bytes()


@pytest.mark.parametrize("place", PLACES)
@settings(deadline=None, max_examples=30)
@given(sizes=SIZES, odd=st.integers(0, 255))
def test_holds_what_was_written(place, sizes, odd, tmp_path_factory):
    parts = [bytes([odd ^ i]) * size for i, size in enumerate(sizes)]
    folder = place or tmp_path_factory.getbasetemp()
    path = folder / f"direct-{os.getpid()}"
    try:
        assert written(path, parts) == b"".join(parts)
    finally:
        path.unlink(missing_ok=True)


def test_takes_no_file_that_is_there(tmp_path):
    (tmp_path / "x").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        DirectFile(str(tmp_path / "x"))
    assert (tmp_path / "x").read_bytes() == b"mine"


def test_is_made_with_the_rights_of_any_file(tmp_path):
    written(tmp_path / "direct", [b"x"])
    (tmp_path / "plain").write_bytes(b"x")
    assert (tmp_path / "direct").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    import resource

    output = LocalOutput(tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    pending = output.open_write("model.safetensors")
    resource.setrlimit(resource.RLIMIT_FSIZE, (BUFFER, hard))
    try:
        with pytest.raises(OutputError):
            pending.write(memoryview(bytes(3 * BUFFER)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        pending.discard()
    assert list((tmp_path / "out").iterdir()) == []

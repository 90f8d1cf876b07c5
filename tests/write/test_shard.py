"""A shard is published only if as many bytes came as its header speaks of."""

from __future__ import annotations

import pytest
import torch

from distmerge.errors import OutputError
from distmerge.write.output import open_output
from distmerge.write.shard import ShardWriter


@pytest.mark.parametrize(("filled", "whole"), [(7, True), (6, False), (8, False), (0, False)])
def test_more_or_fewer_bytes_are_a_fault_and_leave_nothing(tmp_path, filled, whole):
    output = open_output(str(tmp_path / "out"))
    windows = [torch.zeros(16, dtype=torch.uint8) for _ in range(2)]
    writer = ShardWriter(output.open_write("a.safetensors"), b"head", windows, 4 + 7)
    writer.write(writer.buffer(), filled)
    if whole:
        writer.commit()
        assert (tmp_path / "out/a.safetensors").read_bytes() == b"head" + bytes(7)
        return
    with pytest.raises(OutputError, match=f"{4 + filled} bytes, .* of 11"):
        writer.commit()
    writer.discard()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]

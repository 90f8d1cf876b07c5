"""A corpus of files that lie: each is refused by one error that says why, and nothing is run."""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import re
import struct
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from formats.ranged_file import RangedFile
from formats.torch_files import (
    Call,
    Pid,
    legacy_file,
    one_tensor,
    pickled,
    rebuilt,
    storage,
    zip_file,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from distmerge.checkpoints import pickle_machine, torch_legacy, torch_zip
from distmerge.checkpoints.safetensors_header import MAX_HEADER, read_header
from distmerge.checkpoints.tensors import DTYPE_BYTES, TensorInfo
from distmerge.checkpoints.torch_objects import GLOBALS
from distmerge.errors import MalformedCheckpoint

FILE = "weights.any"


def read_safetensors(data: bytes) -> dict[str, TensorInfo]:
    file = RangedFile(data)
    return read_header(file.read, file.size, FILE)[0]


def read_zip(data: bytes) -> dict[str, TensorInfo]:
    file = RangedFile(data)
    return torch_zip.read_catalogue(file.read, file.size, FILE).tensors


def read_legacy(data: bytes) -> dict[str, TensorInfo]:
    file = RangedFile(data)
    return torch_legacy.read_catalogue(file.read, file.size, FILE).tensors


def refusal(read: Callable[[bytes], object], data: bytes) -> str:
    """The message that `data` is refused with; it names the file and a way out."""
    with pytest.raises(MalformedCheckpoint) as refused:
        read(data)
    message = str(refused.value)
    assert FILE in refused.value.headline
    assert "\nFix: " in message
    assert len(message) < 2000
    return message


def short(value: object) -> str:
    """A test's name: what is said, not the megabytes it is said of."""
    return value if isinstance(value, str) else ""


def in_bounds(infos: dict[str, TensorInfo], size: int) -> bool:
    return all(
        0 <= info.start <= info.stop <= size
        and info.dtype in DTYPE_BYTES
        and (info.strides is not None or info.stop - info.start == info.nbytes)
        for info in infos.values()
    )


# --- safetensors -----------------------------------------------------------------------------


def head(header: object, data: int = 0, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


TWO = {"a": entry(), "b": entry(offsets=(8, 16))}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "has 0 bytes"),
        (b"\x10\0\0", "cut short"),
        (head({"a": entry()}, 8)[:30], "cut short"),
        (head({"a": entry()}, 7), "cut short"),
        (head(TWO, 9), "'b' ends at byte"),
        (head({"a": entry()}, 9), "goes on after its last tensor"),
        (head({}, 1), "the header ends at byte 10"),
        (head(b"", 0), "not valid JSON"),
        (head({"a": entry()}, 8, length=MAX_HEADER + 1), "100,000,001"),
        (head({"a": entry()}, 8, length=2**64 - 1), "18,446,744,073,709,551,615"),
        (head({"a": entry()}, 8, length=0), "not valid JSON"),
        (b"PK\x03\x04" + bytes(60), "like a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (head(b"[1, 2]"), "it is a list"),
        (head(b"null"), "it is a NoneType"),
        (head(b"3"), "it is a int"),
        (head(b"\xff\xfe{}"), "not valid JSON"),
        (head(b"{}".decode().encode("utf-16")), "not valid JSON"),
        (head(b'{"a": NaN}'), "NaN is no JSON number"),
        (head(b'{"a": -Infinity}'), "-Infinity is no JSON number"),
        (head(b"[" * 200_000), "not valid JSON"),
        (head(b'{"a":' * 200_000), "not valid JSON"),
        (head(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
        (head(b'{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}'), "twice"),
        (head(json.dumps({"a": entry()})[:-1].encode() + b',"a":{}}', 8), "'a' comes twice"),
        (head(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8), "surrogates"),
        (head({"a": 3}), "its entry is 3"),
        (head({"a": {}}), "its entry is {}"),
        (head({"a": entry(None)}), "readable: BOOL"),
        (head({"a": entry("F4")}, 8), "'F4'"),
        (head({"a": entry("F8_E8M0")}, 8), "'F8_E8M0'"),
        (head({"a": entry(["F32"])}, 8), r"\['F32'\]"),
        (head({"a": entry("f32")}, 8), "'f32'"),
        (head({"a": entry(shape=None)}, 8), "a list as its shape"),
        (head({"a": entry(shape=2)}, 8), "a list as its shape"),
        (head({"a": entry(shape=[2.0])}, 8), r"its shape is \[2.0\]"),
        (head({"a": entry(shape=[True, 2])}, 8), r"its shape is \[True, 2\]"),
        (head({"a": entry(shape=[-2])}, 8), r"its shape is \[-2\]"),
        (head({"a": entry(shape=["2"])}, 8), r"its shape is \['2'\]"),
        (head({"a": entry(shape=[2**32, 2**32])}, 8), "too large to exist"),
        (head({"a": entry(shape=[2**62] * 60)}, 8), "too large to exist"),
        (head({"a": entry(shape=[2**62] * 100_000)}, 8), "100,000 dimensions"),
        (head({"a": entry(shape=[1] * 65 + [2])}, 8), "66 dimensions"),
        (head({"a": entry(shape=[0, 2**62, 2**62])}, 8), "too large to exist"),
        (head({"a": entry(shape=[10**4000])}, 8), "not of whole numbers"),
        (head({"a": entry(shape=[3])}, 8), "takes 12 bytes"),
        (head({"a": entry(offsets=None)}, 8), "two data_offsets"),
        (head({"a": entry(offsets=[0])}, 8), "two data_offsets"),
        (head({"a": entry(offsets=[0, 8, 8])}, 8), "two data_offsets"),
        (head({"a": entry(offsets=[0.0, 8])}, 8), "not whole numbers"),
        (head({"a": entry(offsets=[False, 8])}, 8), "not whole numbers"),
        (head({"a": entry(offsets=[-8, 0])}, 8), "not whole numbers"),
        (head({"a": entry(offsets=[10**4000, 8])}, 8), "not whole numbers"),
        (head({"a": entry(offsets=[8, 0])}, 8), "hold -8 bytes"),
        (head({"a": entry(offsets=[2**62, 2**62 + 8])}, 8), "leaves a hole after the header"),
        (head({"a": entry(offsets=[8, 16])}, 16), "leaves a hole after the header"),
        (head({"a": entry(), "b": entry(offsets=[12, 20])}, 20), "leaves a hole after 'a'"),
        (head({"a": entry(), "b": entry(offsets=[4, 12])}, 12), "'b' begins at byte"),
        (head({"a": entry(), "b": entry()}, 8), "overlaps 'a'"),
        (head({"__metadata__": {"a": 1}}), "strings to strings"),
        (head({"__metadata__": ["a"]}), "strings to strings"),
        (head({"__metadata__": entry()}), "strings to strings"),
        (head(entry(), 8), "it is a tuple"),
        (head({"__metadata__": {"a": {"b": "c"}}}), "strings to strings"),
    ],
    ids=short,
)
def test_safetensors_headers_that_lie_are_refused(data, says):
    assert re.search(says, refusal(read_safetensors, data))


def test_control_characters_in_names_do_not_reach_the_terminal():
    message = refusal(read_safetensors, head({"\x1b[2J\r" + "x" * 10_000: entry(shape=[3])}, 8))
    assert "\x1b" not in message
    assert "\r" not in message


def test_a_safetensors_file_cut_short_anywhere_is_refused():
    data = save({"a": torch.ones(4), "b": torch.ones(3, dtype=torch.int8)})
    for size in range(len(data)):
        assert "cut short" in refusal(read_safetensors, data[:size])


# --- pickles ---------------------------------------------------------------------------------


class Marker:
    """Something that must never happen."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def in_both_formats(body: bytes) -> list[str]:
    """How a pickle is refused in a zip and in a file from before."""
    return [refusal(read_zip, zip_file(body)), refusal(read_legacy, legacy_file(body, {}))]


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_runs_a_command_does_not_run_it(tmp_path, protocol):
    marker = tmp_path / "ran"
    for value in (Marker(str(marker)), {"w": [Marker(str(marker))]}):
        for message in in_both_formats(pickle.dumps(value, protocol)):
            assert "posix.system" in message
            assert "safetensors" in message
    assert not marker.exists()
    pickle.loads(pickle.dumps(Marker(str(marker))))
    assert marker.exists(), "an ordinary load would have run it"


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (builtins.eval, ("1",)),
        (builtins.exec, ("",)),
        (builtins.getattr, (1, "real")),
        (builtins.__import__, ("os",)),
        (builtins.print, ()),
        (builtins.dict, ()),
        (torch.load, ("x",)),
        (torch.hub.load, ("x",)),
        (torch.nn.Linear, (1, 1)),
        (torch.storage._load_from_bytes, (b"",)),
        (torch._utils._rebuild_wrapper_subclass, ()),
    ],
)
def test_no_other_function_is_ever_called(function, arguments):
    for message in in_both_formats(pickled({"w": Call(function, arguments)})):
        assert function.__name__ in message


def test_the_vocabulary_holds_nothing_of_pythons_or_torchs():
    ours = "distmerge.checkpoints.torch_objects"
    for stands_for in GLOBALS.values():
        assert type(stands_for).__module__ == ours
        build = getattr(stands_for, "build", None)
        assert build is None or build.__module__ == ours


def test_a_whole_module_is_refused_with_the_way_out():
    body = pickled(Pid(("module", torch.nn.Linear, None, None)))
    for message in in_both_formats(body):
        assert "torch.nn.modules.linear.Linear" in message
    body = pickled(Pid(("module", torch.float32, None, None)))
    for message in in_both_formats(body):
        assert "state_dict()" in message


P = b"\x80\x02"
FLOAT = storage(torch.FloatStorage, "0", 4)


def vector(offset: object = 0, shape: object = (4,), strides: object = (1,), ref: object = FLOAT):
    return {"w": rebuilt(ref, offset, shape, strides)}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "stops before its end|cut short"),
        (P, "stops before its end|cut short"),
        (P + b".", "empty list"),
        (P + b"}", "stops before its end|cut short"),
        (b"\x80\xff}.", "protocol 255"),
        (P + b"0.", "empty list"),
        (P + b"N\x86.", "more items than there are"),
        (P + b"Nt.", "empty list"),
        (P + b"h\x05.", "remembers no object 5"),
        (P + b"Nr\xff\xff\xff\xff.", "number 4,294,967,295"),
        (P + b"q\x00.", "index out of range"),
        (P + b"NNs.", "empty list|index out of range"),
        (P + b"}(NNNu.", "sets 3 keys"),
        (P + b"N(Na.", "empty list|index out of range"),
        (P + b"NNa.", "appends to None"),
        (P + b"\x8a\xff", "stops before its end|cut short"),
        (P + b"\x8b\xff\xff\xff\x7f", "integer of 2,147,483,647 bytes"),
        (P + b"\x8b\xff\xff\xff\xff", "integer of 4,294,967,295 bytes"),
        (P + b"X\xff\xff\xff\xff", "stops before its end|cut short"),
        (P + b"T\xff\xff\xff\xff", "stops before its end|cut short"),
        (b"\x80\x04\x8d" + b"\xff" * 8, "stops before its end|cut short"),
        (b"\x80\x04\x8e" + b"\xff" * 8, "stops before its end|cut short"),
        (b"\x80\x05\x96" + b"\xff" * 8, "stops before its end|cut short"),
        (b"\x80\x04\x95" + b"\xff" * 8 + b"}.", "a frame of"),
        (P + b"X\x01\x00\x00\x00\xff.", "utf-8"),
        (P + b"X\x03\x00\x00\x00\xed\xa0\x80.", "utf-8"),
        (P + b"c", "stops before its end|cut short"),
        (P + b"cos\n", "stops before its end|cut short"),
        (P + b"cos\nsystem\n.", "os.system"),
        (P + b"c\n\n.", "holds more than tensors"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
        (b"\x80\x04NN\x93.", "None.None"),
        (P + b"(ios\nsystem\n.", "instruction b'i'"),
        (P + b"(cos\nsystem\no.", "os.system"),
        (P + b"Pos.system\n.", "instruction b'P'"),
        (P + b"\x82\x01.", r"instruction b'\\x82'"),
        (b"I1\n.", "instruction b'I'"),
        (b"\x80\x05\x97.", "instruction"),
        (P + b"N)R.", "it calls None"),
        (P + b"])R.", "it calls"),
        (P + b"X\x01\x00\x00\x00a)R.", "it calls 'a'"),
        (P + b"ctorch\nFloatStorage\n)R.", "it calls"),
        (P + b"ccollections\nOrderedDict\nNR.", "it calls"),
        (P + b"ccollections\nOrderedDict\n)R)R.", "it calls {}"),
        (P + b"ccollections\nOrderedDict\nN\x85R.", "no list"),
        (P + b"ccollections\nOrderedDict\n]Na\x85R.", "no pairs"),
        (P + b"ccollections\nOrderedDict\n}b.", "sets attributes"),
        (P + b"ctorch\nSize\nN\x85R.", "no tuple"),
        (P + b"(" * 10_001, "10,000 containers within one another"),
        (P + b"NQ.", "reference None"),
        (P + b")Q.", r"reference \(\)"),
        (P + b"})Ns.", r"key \(\)|single|no tensors"),
        (P + b"}}Ns.", "the key {}"),
        (P + b"]" * 2, "stops before its end|cut short"),
        (pickled([1]), "single list"),
        (pickled("text"), "single str"),
        (pickled(7), "single int"),
        (pickled({}), "its entries: none"),
        (pickled({"a": 1, "b": {"c": "d"}}), r"'a' \(int\), 'b' \(dict\)"),
        (pickled(dict.fromkeys(range(20), 0)), "12 more"),
    ],
    ids=short,
)
def test_pickles_that_are_damaged_or_no_state_dicts_are_refused(body, says):
    for message in in_both_formats(body):
        assert re.search(says, message), message


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (vector(offset=1), "reaches past its storage"),
        (vector(offset=-1), "offset -1"),
        (vector(offset=2**62), "offset 4611686018427387904"),
        (vector(offset=2**59), "reaches past its storage"),
        (vector(offset=True), "of the wrong type"),
        (vector(offset="0"), "of the wrong type"),
        (vector(shape=(5,)), "reaches past its storage"),
        (vector(shape=(2,), strides=(4,)), "reaches past its storage"),
        (vector(shape=(2**40, 2**40), strides=(0, 0)), "too large to exist"),
        (vector(shape=(0, 2**59, 2**59), strides=(0, 0, 0)), "too large to exist"),
        (vector(shape=(2,), strides=(-1,)), r"strides \(-1,\)"),
        (vector(shape=(-2,)), r"shape \(-2,\)"),
        (vector(shape=(2.0,)), r"shape \(2.0,\)"),
        (vector(shape=(True,)), r"shape \(True,\)"),
        (vector(shape=[4]), "of the wrong type"),
        (vector(shape=(2, 2)), r"strides \(1,\)"),
        (vector(shape=(1,) * 65, strides=(1,) * 65), "65 dimensions"),
        (vector(ref=7), "no storage"),
        (vector(ref={}), "no storage"),
        (vector(ref=storage("FloatStorage", "0", 4)), "makes no sense"),
        (vector(ref=storage(torch.float32, "0", 4)), "makes no sense"),
        (vector(ref=storage(torch.FloatStorage, 0, 4)), "makes no sense"),
        (vector(ref=storage(torch.FloatStorage, "0", -4)), "makes no sense"),
        (vector(ref=storage(torch.FloatStorage, "0", True)), "makes no sense"),
        (vector(ref=storage(torch.FloatStorage, "0", 2**63)), "makes no sense"),
        (vector(ref=Pid(("stowage", torch.FloatStorage, "0", "cpu", 4))), "not to a storage"),
        (vector(ref=Pid(("storage", torch.FloatStorage))), "not to a storage"),
        ({"w": Call(torch._utils._rebuild_tensor_v2, (FLOAT,))}, "missing 3 required"),
        ({"w": Call(torch._utils._rebuild_tensor_v2, (FLOAT, 0, (4,), (1,), *range(9)))}, "takes"),
        ({"w": Call(torch._utils._rebuild_parameter, (3, True, OrderedDict()))}, "no tensor"),
        ({3: vector()["w"]}, "name is no text: 3"),
        ({("a", "b"): vector()["w"]}, "name is no text"),
        (vector()["w"], "single tensor"),
        ([vector()["w"]], "single list"),
        ({"a": {"b": vector()}}, r"'a' \(dict\)"),
        (
            {
                "a": vector()["w"],
                "b": vector(ref=storage(torch.DoubleStorage, "0", 4))["w"],
            },
            "16 bytes at first, then 32",
        ),
    ],
    ids=short,
)
def test_tensors_that_make_no_sense_are_refused(value, says):
    body = pickled(value)
    message = refusal(read_zip, zip_file(body, {"0": bytes(16)}))
    assert re.search(says, message), message


def test_a_tensor_of_no_elements_lies_within_its_storage_wherever_it_points():
    body = pickled(vector(offset=10**9, shape=(0, 3), strides=(3, 1)))
    data = zip_file(body, {"0": bytes(16)})
    (info,) = read_zip(data).values()
    assert info.start == info.stop <= len(data)
    assert info.strides is None


DEEP = 200_000  # far beyond what the C stack holds, were any step to recurse
BOMBS = {
    "deep lists": P + b"]" * DEEP + b"a" * (DEEP - 1) + b".",
    "deep tuples": P + b")" + b"\x85" * DEEP + b".",
    "a deep tuple as a key": P + b"})" + b"\x85" * DEEP + b"Ns.",
    "a deep tuple in a key": P + b"})" + b"\x85" * DEEP + b"K\x01\x86Ns.",
    "a deep tuple as a reference": P + b")" + b"\x85" * DEEP + b"Q.",
    "a deep tuple as a shape": P
    + b"ctorch._utils\n_rebuild_tensor\n(NK\x00)"
    + b"\x85" * DEEP
    + b")tR.",
    "deep marks": P + b"(" * DEEP + b".",
    "colliding keys": P
    + b"}("
    + b"".join(
        b"\x8a\x10" + (k * (2**61 - 1)).to_bytes(16, "little") + b"N" for k in range(1, 50_000)
    )
    + b"u.",
    "laughs": P + b"]q\x00" + b"h\x00h\x00\x86q\x00" * 10_000 + b".",
    "one list made into many dictionaries": P
    + b"]("
    + b"X\x01\x00\x00\x00bN\x86" * 20_000
    + b"eq\x000ccollections\nOrderedDict\nq\x01"
    + b"h\x01h\x00\x85R0" * 20_000
    + b".",
    "one shape given to many tensors": P
    + pickled((1,) * 20_000)[2:-1]
    + b"r\x00\x01\x00\x000ctorch._utils\n_rebuild_tensor\nq\xf1"
    + b"h\xf1(NK\x00j\x00\x01\x00\x00j\x00\x01\x00\x00tR0" * 20_000
    + b".",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", BOMBS)
def test_pickles_built_to_eat_time_or_stack_are_refused(name):
    began = time.process_time()
    refusal(read_zip, zip_file(BOMBS[name]))
    assert time.process_time() - began < 10


def test_pickles_of_too_many_instructions_are_refused(monkeypatch):
    assert pickle_machine.MAX_STEPS <= 5_000_000, "with 100 bytes each: 500 MB"
    monkeypatch.setattr(pickle_machine, "MAX_STEPS", 1000)
    assert "more than 1,000 instructions" in refusal(read_zip, zip_file(P + b"}" * 1001 + b"."))
    assert "single list" in refusal(read_zip, zip_file(P + b"]" * 998 + b"."))


@pytest.mark.parametrize(
    "body",
    [
        P + b"X\xff\xff\xff\xff",
        P + b"\x8b\xff\xff\xff\x7f",
        P + b"Nr\xff\xff\xff\xff.",
        b"\x80\x04\x8d" + (2**62).to_bytes(8, "little"),
        b"\x80\x05\x96" + (2**40).to_bytes(8, "little"),
        b"\x80\x04\x95" + (2**40).to_bytes(8, "little") + b"}.",
    ],
    ids=short,
)
def test_announced_lengths_are_not_believed(body):
    tracemalloc.start()
    try:
        in_both_formats(body)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


# --- zip archives ----------------------------------------------------------------------------


def torch_saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


SAVED = torch_saved({"a": torch.arange(5.0), "b": torch.ones(3, dtype=torch.int8)})
PLAIN = zip_file(pickled(one_tensor(4)), {"0": bytes(16)})


@pytest.mark.parametrize("data", [SAVED, PLAIN], ids=["torch", "plain"])
def test_a_zip_cut_short_anywhere_is_refused(data):
    for size in range(4, len(data)):
        assert "cut short" in refusal(read_zip, data[:size])


def patched(data: bytes, mark: bytes, offset: int, form: str, value: int, which: int = 0) -> bytes:
    """`data` with the field at `offset` after the given `mark` overwritten."""
    at = -1
    for _ in range(which + 1):
        at = data.index(mark, at + 1)
    changed = bytearray(data)
    struct.pack_into(form, changed, at + offset, value)
    return bytes(changed)


ENTRY, END, END64, LOCATOR = b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
DATA = 2  # the third entry of PLAIN is data/0


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (zip_file(pickled(one_tensor(4)), {"0": bytes(16)}, byteorder=b"big"), "big-endian"),
        (zip_file(pickled(one_tensor(4)), {"0": bytes(16)}, byteorder=b""), "big-endian"),
        (zip_file(pickled(one_tensor(4)), {}), "data/0' is missing"),
        (zip_file(pickled(one_tensor(4)), {"0": bytes(15)}), "has 15 bytes"),
        (
            zip_file(pickled(one_tensor(4)), {"0": bytes(16)}, compression=zipfile.ZIP_DEFLATED),
            "compressed or encrypted",
        ),
        (zip_file(b"\x80\x02]." + bytes(40 << 20)), "data.pkl has 41,943,044 bytes"),
        (patched(PLAIN, ENTRY, 8, "<H", 1, DATA), "compressed or encrypted"),
        (patched(PLAIN, ENTRY, 20, "<L", 15, DATA), "compressed or encrypted"),
        (patched(PLAIN, ENTRY, 42, "<L", 0, DATA), "damaged zip archive"),
        (patched(PLAIN, ENTRY, 42, "<L", 2**31, DATA), "damaged zip archive"),
        (patched(PLAIN, ENTRY, 42, "<L", 2**32 - 1, DATA), "lacks its size or offset"),
        (patched(PLAIN, ENTRY, 28, "<H", 999, DATA), "directory is broken"),
        (patched(PLAIN, ENTRY, 30, "<H", 999, DATA), "directory is broken"),
        (patched(PLAIN, ENTRY, 0, "<L", 0, DATA), "directory is broken"),
        (patched(PLAIN, b"PK\x03\x04", 0, "<L", 0), "not what the directory says"),
        (patched(PLAIN, b"PK\x03\x04", 26, "<H", 3), "not what the directory says"),
        (patched(PLAIN, b"PK\x03\x04", 28, "<H", 60_000), "not what the directory says"),
        (patched(PLAIN, END, 10, "<H", 3), "of them used"),
        (patched(PLAIN, END, 10, "<H", 5), "directory is broken|lists 5 entries"),
        (patched(PLAIN, END, 10, "<H", 65535), "lists 65,535 entries"),
        (patched(PLAIN, END, 12, "<L", 2**31), "its directory at byte"),
        (patched(PLAIN, END, 16, "<L", 2**31), "its directory at byte"),
        (patched(PLAIN, END, 16, "<L", 0), "its directory at byte"),
        (patched(PLAIN, END, 20, "<H", 7), "cut short"),
        (patched(SAVED, END64, 32, "<Q", 2**63), "entries in"),
        (patched(SAVED, END64, 40, "<Q", 2**63), "its directory at byte"),
        (patched(SAVED, END64, 48, "<Q", 2**63), "its directory at byte"),
        (patched(SAVED, LOCATOR, 8, "<Q", 2**63), "zip64 record is not at byte"),
        (patched(SAVED, LOCATOR, 8, "<Q", 0), "zip64 record is not at byte"),
    ],
    ids=short,
)
def test_zip_archives_that_lie_are_refused(data, says):
    assert re.search(says, refusal(read_zip, data))


def archive(names: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as written:
        for name, data in names.items():
            written.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({}, "no data.pkl"),
        ({"word/document.xml": b"<x/>"}, "no data.pkl"),
        ({"a/data.pkl": b"", "b/data.pkl": b""}, "holds no state dict"),
        ({"m/data.pkl": b"", "m/constants.pkl": b""}, "TorchScript"),
    ],
    ids=short,
)
def test_archives_of_something_else_are_refused(names, says):
    assert says in refusal(read_zip, archive(names))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_overlapping_and_repeated_entries_are_refused():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as written:
        written.writestr("m/data.pkl", pickled(one_tensor(4)))
        written.writestr("m/data.pkl", pickled(one_tensor(4)))
    assert "comes twice" in refusal(read_zip, buffer.getvalue())
    # A zip bomb's trick: every entry claims the bytes of all that follow.
    size = PLAIN.index(ENTRY) - PLAIN.index(b"PK\x03\x04")
    grown = patched(patched(PLAIN, ENTRY, 20, "<L", size, DATA), ENTRY, 24, "<L", size, DATA)
    assert "what follows it begins at byte" in refusal(read_zip, grown)


edits = st.lists(st.tuples(st.integers(0, 5000), st.binary(max_size=4)), min_size=1, max_size=3)
LEGACY = legacy_file(one_tensor(4, ("v", 1, 3)) | {"x": 3}, {"0": (4, bytes(16))})


@settings(deadline=None, max_examples=300)
@given(st.sampled_from([(read_zip, SAVED), (read_zip, PLAIN), (read_legacy, LEGACY)]), edits)
def test_damage_anywhere_is_refused_or_leaves_tensors_within_the_file(case, edits):
    read, data = case
    for at, put in edits:
        at %= len(data)
        data = (data[:at] + put + data[at + len(put) :])[: len(data)]
    with suppress(MalformedCheckpoint):
        assert in_bounds(read(data), len(data))


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from([
    b"}", b"]", b")", b"(", b"t", b"u", b"s", b"a", b"e", b"0", b"1", b"N", b"R", b"b", b"Q",
    b"\x81", b"\x85", b"\x86", b"\x87", b"\x88", b"\x94", b"\x8f", b"\x90", b"\x91", b"q\x00",
    b"h\x00", b"K\x04", b"X\x01\x00\x00\x000", b"X\x07\x00\x00\x00storage",
    b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nSize\n",
    b"ccollections\nOrderedDict\n", b"ctorch._tensor\n_rebuild_from_type_v2\n",
    b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nTensor\n", b"c_codecs\nencode\n",
    pickled(one_tensor(4))[2:-1], pickled(vector()["w"])[2:-1],
]), max_size=12))  # fmt: skip
def test_any_sequence_of_instructions_is_refused_or_leaves_tensors_within_the_file(steps):
    data = zip_file(P + b"".join(steps) + b".", {"0": bytes(16)})
    with suppress(MalformedCheckpoint):
        assert in_bounds(read_zip(data), len(data))

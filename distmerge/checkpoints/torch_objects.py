"""Between the names a PyTorch pickle may use and the plain descriptions they stand for.

Nothing is imported by name and nothing of the file is called: GLOBALS is the whole vocabulary.
Builders raise ValueError on arguments that make no sense; the unpickler says where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from distmerge.checkpoints.malformed import LARGEST, MAX_DIMENSIONS, quoted
from distmerge.checkpoints.tensors import DTYPE_BYTES


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage that tensors lie in, or a part of one."""

    key: str
    """The file's name for the whole storage."""
    dtype: str
    """safetensors' name; U8 where the storage has no type of its own."""
    nbytes: int
    """Bytes of the whole storage."""
    start: int
    """First byte of the part, within the storage."""
    stop: int
    """One past the last byte of the part."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor as a walk through a storage."""

    storage: StorageRef
    dtype: str
    """safetensors' name; not always the storage's."""
    offset: int
    """First element, in elements from the storage's start."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements."""


@dataclass(frozen=True, slots=True)
class StorageKind:
    """A class of storages, such as torch.FloatStorage."""

    dtype: str


@dataclass(frozen=True, slots=True)
class Dtype:
    """A torch.dtype."""

    name: str
    """safetensors' name."""


@dataclass(frozen=True, slots=True)
class Opaque:
    """A harmless value that is no tensor and is not looked into."""

    kind: str


@dataclass(frozen=True, slots=True)
class Builder:
    """What may be called; everything else in a pickle is data."""

    build: Callable[..., object]


def checked_key(key: object) -> object:
    """A dictionary key that is cheap to hash and compare.

    Deep tuples would overflow the C stack when hashed, and huge integers can be made to collide.
    """
    for part in key if type(key) is tuple and len(key) <= 8 else (key,):
        small = type(part) is not int or abs(part) <= LARGEST
        if type(part) not in (str, bytes, int, float, bool, type(None)) or not small:
            raise ValueError(f"a dictionary has the key {quoted(key)}")
    return key


def storage_ref(pid: object) -> StorageRef:
    """The storage behind a persistent id.

    ("storage", kind, key, device, elements), in files from before the zip format followed by None
    or, for a part of a storage, (key of the part, first element, elements).
    """
    if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
        raise ValueError(f"the reference {quoted(pid)} is not to a storage")
    _, kind, key, _, elements, *rest = pid
    if type(kind) is not StorageKind or type(key) is not str or not _are_whole((elements,)):
        raise ValueError(f"the storage {quoted(pid)} makes no sense")
    width = DTYPE_BYTES[kind.dtype]
    first, count = 0, elements
    if rest and rest[0] is not None:
        if type(rest[0]) is not tuple or len(rest[0]) != 3 or not _are_whole(rest[0][1:]):
            raise ValueError(f"the part {quoted(rest[0])} of storage {quoted(key)} makes no sense")
        _, first, count = rest[0]
    if first + count > elements:
        raise ValueError(
            f"a part of storage {quoted(key)} ends at element {first + count:,} of {elements:,}"
        )
    return StorageRef(key, kind.dtype, elements * width, first * width, (first + count) * width)


def _are_whole(values: Iterable[object]) -> bool:
    return all(type(value) is int and 0 <= value <= LARGEST // 8 for value in values)


def _tensor(
    storage: object, dtype: object, offset: object, shape: object, strides: object
) -> TensorRef:
    if type(storage) is not StorageRef or type(dtype) is not Dtype:
        raise ValueError("a tensor is built from something that is no storage or no dtype")
    if type(shape) is not tuple or type(strides) is not tuple or type(offset) is not int:
        raise ValueError("a tensor's offset, shape or strides are of the wrong type")
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor has {len(shape):,} dimensions; torch knows {MAX_DIMENSIONS}")
    if len(shape) != len(strides) or not _are_whole((offset, *shape, *strides)):
        raise ValueError(
            f"a tensor has shape {quoted(shape)}, strides {quoted(strides)}, offset {offset}"
        )
    bound = 1
    for extent in shape:
        bound *= extent or 1
        if bound > LARGEST // 8:
            raise ValueError(f"a tensor's shape {quoted(shape)} is too large to exist")
    return TensorRef(storage, dtype.name, offset, shape, strides)


def _rebuild_tensor(storage: object, offset: object, shape: object, strides: object) -> TensorRef:
    dtype = Dtype(storage.dtype) if type(storage) is StorageRef else None
    return _tensor(storage, dtype, offset, shape, strides)


def _rebuild_tensor_v2(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    requires_grad: object = False,
    hooks: object = None,
    metadata: object = None,
) -> TensorRef:
    _check_metadata(metadata)
    return _rebuild_tensor(storage, offset, shape, strides)


def _rebuild_tensor_v3(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    requires_grad: object,
    hooks: object,
    dtype: object,
    metadata: object = None,
) -> TensorRef:
    _check_metadata(metadata)
    return _tensor(storage, dtype, offset, shape, strides)


def _check_metadata(metadata: object) -> None:
    """The bits that say "negated" and "conjugated": the bytes are then not the values."""
    if metadata is not None and (
        type(metadata) is not dict or len(metadata) > 2 or any(metadata.values())
    ):
        raise ValueError(
            f"a tensor is stored with {quoted(metadata)}; "
            "save tensor.resolve_conj().resolve_neg() instead"
        )


def _rebuild_parameter(
    data: object, requires_grad: object, hooks: object, state: object = None
) -> TensorRef:
    if type(data) is not TensorRef:
        raise ValueError("a parameter is built from something that is no tensor")
    return data


def _rebuild_from_type(
    function: object, kind: object, arguments: object, state: object
) -> TensorRef:
    """A tensor with attributes of its own, which are left out."""
    if type(function) is not Builder or function.build not in _TENSOR_BUILDERS:
        raise ValueError("a tensor subclass is built by something other than a tensor's builder")
    if kind not in (_TENSOR, _PARAMETER) or type(arguments) is not tuple:
        raise ValueError("a tensor subclass makes no sense")
    tensor = function.build(*arguments)
    assert type(tensor) is TensorRef
    return tensor


def _size(extents: object = ()) -> tuple[object, ...]:
    if type(extents) is not tuple:
        raise ValueError("a torch.Size is built from something that is no tuple")
    return extents


def _ordered_dict(items: object = ()) -> dict[object, object]:
    """Python 2 pickled the items as an argument; Python 3 sets them one by one."""
    found: dict[object, object] = {}
    if items == ():
        return found
    if type(items) is not list:
        raise ValueError("an OrderedDict is built from something that is no list")
    for item in items:
        if type(item) not in (list, tuple) or len(item) != 2:
            raise ValueError("an OrderedDict is built from items that are no pairs")
        found[checked_key(item[0])] = item[1]
    # Used up, so that a list remembered once can't be made into a million dictionaries.
    items.clear()
    return found


def _opaque(kind: str) -> Builder:
    return Builder(lambda *arguments: Opaque(kind))


_TENSOR = Opaque("torch.Tensor")
_PARAMETER = Opaque("torch.nn.Parameter")
_TENSOR_BUILDERS = (_rebuild_tensor, _rebuild_tensor_v2, _rebuild_tensor_v3, _rebuild_parameter)

_STORAGES = {
    "Double": "F64",
    "Float": "F32",
    "Half": "F16",
    "BFloat16": "BF16",
    "Long": "I64",
    "Int": "I32",
    "Short": "I16",
    "Char": "I8",
    "Byte": "U8",
    "Bool": "BOOL",
    "ComplexFloat": "C64",
    "Untyped": "U8",
}

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
}

GLOBALS: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): Builder(_ordered_dict),
    ("torch", "Size"): Builder(_size),
    ("torch", "Tensor"): _TENSOR,
    ("torch.nn.parameter", "Parameter"): _PARAMETER,
    ("torch", "device"): _opaque("device"),
    ("torch._utils", "_rebuild_tensor"): Builder(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Builder(_rebuild_tensor_v2),
    ("torch._utils", "_rebuild_tensor_v3"): Builder(_rebuild_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): Builder(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Builder(_rebuild_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): Builder(_rebuild_from_type),
    ("torch.storage", "UntypedStorage"): StorageKind("U8"),
    ("_codecs", "encode"): _opaque("bytes"),
    **{
        (module, kind): _opaque(kind)
        for module in ("__builtin__", "builtins")
        for kind in ("set", "frozenset", "complex", "bytearray")
    },
    **{("torch", f"{kind}Storage"): StorageKind(dtype) for kind, dtype in _STORAGES.items()},
    **{("torch", name): Dtype(dtype) for name, dtype in _DTYPES.items()},
}
"""(module, name) in the pickle -> what it stands for."""

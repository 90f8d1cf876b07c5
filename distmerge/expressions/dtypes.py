"""The boundary between dtypes as recipes spell them and safetensors' names."""

from __future__ import annotations

from distmerge.errors import RecipeError

_OUTPUT_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
_SPELLINGS = {
    **_OUTPUT_DTYPES,
    **{name.lower(): name for name in _OUTPUT_DTYPES.values()},
    "fp16": "F16",
    "half": "F16",
    "fp32": "F32",
    "float": "F32",
    "fp64": "F64",
    "double": "F64",
}
_EIGHT_BITS = {"float8_e4m3fn": "F8_E4M3", "f8_e4m3": "F8_E4M3"}
_REFUSED = {
    "float8_e4m3fn": "FP8 is what can be written, with out_dtype; it can't be merged in.",
    "float8_e5m2": "Of 8-bit floats only float8_e4m3fn is written.",
    "int64": "Merged weights are fractions, which an integer dtype can't hold.",
}


def parse_dtype(name: str, *, eight_bits: bool = False) -> str:
    """safetensors' name of an output dtype: `bfloat16`, `torch.bfloat16` and `BF16` are BF16.

    eight_bits: take float8_e4m3fn too.

    Raises
        RecipeError: no such dtype, or one that a merge isn't written in.
    """
    spelling = name.strip().lower().removeprefix("torch.") if isinstance(name, str) else ""
    if spelling in _SPELLINGS:
        return _SPELLINGS[spelling]
    if eight_bits and spelling in _EIGHT_BITS:
        return _EIGHT_BITS[spelling]
    known = ", ".join(_OUTPUT_DTYPES)
    reason = [_REFUSED[spelling]] if spelling in _REFUSED else []
    raise RecipeError(
        f"A merge can't be written in dtype {name!r}.", *reason, fix=f"choose one of {known}"
    )

"""The boundary between the donor's config.json and the tensors that were really written.

Loaders believe the config: the dtype in it is the dtype they allocate, a quantization section
makes them look for scales, a tied head is never read. So it must say what the output holds.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from distmerge.checkpoints.tensors import FLOAT_DTYPES

TORCH_NAMES: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
"""safetensors' name of a float dtype -> the name that a config.json uses."""

_SPELLINGS = ("dtype", "torch_dtype")
_QUANTIZATION = ("quantization_config", "compression_config")
_LANGUAGE_PARTS = {"text_config", "language_config", "llm_config", "decoder"}


def edit_config(
    config: Mapping[str, Any],
    *,
    dtypes: Mapping[str, str],
    nbytes: Mapping[str, int] | None = None,
    tied: bool | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The donor's config as it holds for the output; the one given is left alone.

    Args
        dtypes: tensor's key -> safetensors dtype that was written for it.
        nbytes: tensor's key -> bytes, to weigh the dtypes by; without it every tensor counts one.
        tied: sets `tie_word_embeddings`; None leaves it as it is.
        quantization: the section that describes the output's quantised tensors, if there are any.
    """
    edited = copy.deepcopy(dict(config))
    edited.pop("_name_or_path", None)
    written = written_dtype(dtypes, nbytes)
    if written is not None:
        _set_dtype(edited, written)
        among = {TORCH_NAMES[dtype] for dtype in dtypes.values() if dtype in FLOAT_DTYPES}
        _set_nested_dtypes(edited, written, among)
    if tied is not None:
        edited["tie_word_embeddings"] = tied
        _set_nested_tied(edited, tied)
    _drop_quantization(edited)
    if quantization is not None:
        edited["quantization_config"] = dict(quantization)
    return edited


def eight_bit_section(
    config: Mapping[str, Any], block: Sequence[int], kept: Sequence[str]
) -> dict[str, Any]:
    """The section for codes with a scale for each block: the donor's, where it speaks of such.

    kept: modules with matrices that are not in 8 bits.
    """
    own = config.get("quantization_config")
    same = isinstance(own, Mapping) and own.get("quant_method") == "fp8"
    section = dict(own) if same and isinstance(own, Mapping) else {}
    section.pop("scale_fmt", None)  # these scales are no powers of two
    given = {"quant_method": "fp8", "weight_block_size": list(block)}
    section = {"activation_scheme": "dynamic", **section, **given}
    return section if same else {**section, "modules_to_not_convert": list(kept)}


def written_dtype(dtypes: Mapping[str, str], nbytes: Mapping[str, int] | None = None) -> str | None:
    """The float dtype that most bytes have, by its name in a config; None without floats.

    Equal shares go to the name that sorts first, so that the answer never depends on order. Beside
    other floats, 8-bit codes and their scales don't count: the dtype is that of what isn't
    quantised.
    """
    shares: Counter[str] = Counter()
    coded = {key for key, dtype in dtypes.items() if dtype.startswith("F8_")}
    coded |= {key for key in dtypes if key.removesuffix("_scale_inv") in coded}
    plain = {k: d for k, d in dtypes.items() if k not in coded and d in FLOAT_DTYPES}
    for key, dtype in (plain or dtypes).items():
        if dtype in FLOAT_DTYPES:
            shares[TORCH_NAMES[dtype]] += 1 if nbytes is None else nbytes[key]
    return min(shares, key=lambda name: (-shares[name], name), default=None)


def config_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that a config names, in either spelling."""
    named = [config[spelling] for spelling in _SPELLINGS if isinstance(config.get(spelling), str)]
    return named[0].removeprefix("torch.") if named else None


def _set_dtype(config: dict[str, Any], written: str) -> None:
    spellings = [spelling for spelling in _SPELLINGS if spelling in config]
    for spelling in spellings or [_spelling_of(config)]:
        config[spelling] = written


def _spelling_of(config: Mapping[str, Any]) -> str:
    """transformers 5 writes `dtype`; every version reads `torch_dtype`."""
    major = str(config.get("transformers_version", "")).partition(".")[0]
    return "dtype" if major.isdecimal() and int(major) >= 5 else "torch_dtype"


def _set_nested_dtypes(config: Mapping[str, Any], written: str, among: set[str]) -> None:
    """Other towers may well be of another dtype: theirs stays while it is one that was written."""
    for name, part in _parts(config):
        for spelling in _SPELLINGS:
            named = part.get(spelling)
            if isinstance(named, str) and (name in _LANGUAGE_PARTS or named not in among):
                part[spelling] = written
        _set_nested_dtypes(part, written, among)


def _set_nested_tied(config: Mapping[str, Any], tied: bool) -> None:
    for name, part in _parts(config):
        if name in _LANGUAGE_PARTS and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = tied
        _set_nested_tied(part, tied)


def _drop_quantization(config: dict[str, Any]) -> None:
    for section in _QUANTIZATION:
        config.pop(section, None)
    for _, part in _parts(config):
        _drop_quantization(part)


def _parts(config: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The nested sections that configure a part of the model."""
    return [
        (name, value)
        for name, value in config.items()
        if isinstance(value, dict) and name not in _QUANTIZATION
    ]

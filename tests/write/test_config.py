"""That config.json says what was written, in words that transformers reads."""

import copy
import json

import pytest
import torch
from transformers import AutoConfig

from distmerge.write.config import config_dtype, edit_config, written_dtype

LLAMA = {
    "_name_or_path": "/home/someone/base",
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "float32",
    "transformers_version": "4.44.0",
    "tie_word_embeddings": True,
    "rope_scaling": {"factor": 8.0, "rope_type": "llama3"},
}


def test_the_dtype_written_is_named_and_all_else_stays():
    given = copy.deepcopy(LLAMA)
    edited = edit_config(given, dtypes={"a": "BF16", "b": "BF16", "n": "F32", "ids": "I64"})
    expected = {**LLAMA, "torch_dtype": "bfloat16"}
    del expected["_name_or_path"]
    assert edited == expected
    assert list(edited) == list(expected)
    assert given == LLAMA


def test_bytes_decide_where_they_are_known():
    dtypes = {"norm.1": "F32", "norm.2": "F32", "mlp": "BF16"}
    sizes = {"norm.1": 16, "norm.2": 16, "mlp": 4096}
    assert written_dtype(dtypes) == "float32"
    assert written_dtype(dtypes, sizes) == "bfloat16"
    assert edit_config(LLAMA, dtypes=dtypes, nbytes=sizes)["torch_dtype"] == "bfloat16"


def test_equal_shares_do_not_depend_on_order():
    assert written_dtype({"a": "F16", "b": "BF16"}) == written_dtype({"b": "BF16", "a": "F16"})


def test_without_float_tensors_the_dtype_stays():
    assert written_dtype({"ids": "I64", "on": "BOOL"}) is None
    assert edit_config(LLAMA, dtypes={"ids": "I64"})["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    ("config", "spelling"),
    [
        ({"dtype": "float32"}, "dtype"),
        ({"torch_dtype": "float32"}, "torch_dtype"),
        ({"transformers_version": "5.2.0"}, "dtype"),
        ({"transformers_version": "4.40.1"}, "torch_dtype"),
        ({}, "torch_dtype"),
    ],
)
def test_the_donors_spelling_is_kept(config, spelling):
    edited = edit_config(config, dtypes={"a": "F16"})
    assert {name for name in edited if "dtype" in name} == {spelling}
    assert edited[spelling] == "float16"
    assert config_dtype(edited) == "float16"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("F64", torch.float64),
        ("F32", torch.float32),
        ("F16", torch.float16),
        ("BF16", torch.bfloat16),
        ("F8_E4M3", torch.float8_e4m3fn),
        ("F8_E5M2", torch.float8_e5m2),
    ],
)
@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
def test_transformers_reads_the_dtype(tmp_path, written, expected, spelling):
    config = {"model_type": "gpt2", spelling: "float32"}
    edited = edit_config(config, dtypes={"a": written})
    (tmp_path / "config.json").write_text(json.dumps(edited))
    assert AutoConfig.from_pretrained(tmp_path).dtype == expected


def test_nested_parts_follow_unless_what_they_say_was_written_too():
    config = {
        "torch_dtype": "float32",
        "text_config": {"torch_dtype": "float32", "hidden_size": 8},
        "vision_config": {"torch_dtype": "float32"},
        "audio_config": {"dtype": "float16"},
        "projector_config": {"torch_dtype": None},
    }
    sizes = {"text": 1000, "vision": 10}
    edited = edit_config(config, dtypes={"text": "BF16", "vision": "F32"}, nbytes=sizes)
    assert edited == {
        "torch_dtype": "bfloat16",
        "text_config": {"torch_dtype": "bfloat16", "hidden_size": 8},
        "vision_config": {"torch_dtype": "float32"},
        "audio_config": {"dtype": "bfloat16"},
        "projector_config": {"torch_dtype": None},
    }


def test_nested_parts_of_nested_parts():
    config = {"thinker_config": {"text_config": {"dtype": "float32"}}}
    edited = edit_config(config, dtypes={"a": "BF16"})
    assert edited["thinker_config"]["text_config"]["dtype"] == "bfloat16"


def test_tied_heads():
    nested = {
        "tie_word_embeddings": True,
        "text_config": {"tie_word_embeddings": True},
        "vision_config": {"hidden_size": 2},
    }
    assert edit_config(nested, dtypes={})["tie_word_embeddings"] is True
    edited = edit_config(nested, dtypes={}, tied=False)
    assert edited["tie_word_embeddings"] is False
    assert edited["text_config"] == {"tie_word_embeddings": False}
    assert edited["vision_config"] == {"hidden_size": 2}
    assert edit_config({}, dtypes={}, tied=False) == {"tie_word_embeddings": False}


def test_quantization_stays_only_when_told():
    section = {"quant_method": "fp8", "torch_dtype": "float8_e4m3fn"}
    config = {"quantization_config": section, "text_config": {"quantization_config": section}}
    assert edit_config(config, dtypes={}) == {"text_config": {}}
    kept = edit_config(config, dtypes={"a": "BF16"}, quantization=section)
    assert kept["quantization_config"] == section
    assert kept["text_config"] == {"dtype": "bfloat16"} or kept["text_config"] == {}

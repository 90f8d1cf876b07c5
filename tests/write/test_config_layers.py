"""That a config counts and describes the layers that were written."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from distmerge.write.config_layers import Origin, edit_layers


def origins(*pairs):
    return [Origin(config, layer) for config, layer in pairs]


def test_counts_and_lists_follow_the_layers():
    donor = {
        "num_hidden_layers": 3,
        "hidden_size": 3,
        "layer_types": ["x", "y", "z"],
        "mlp_only_layers": [1],
        "max_window_layers": 3,
        "architectures": ["OneForCausalLM"],
        "eos_token_id": [7, 8, 9],
        "num_attention_heads": [4, 2, 1],
    }
    other = {
        "num_hidden_layers": 2,
        "layer_types": ["p", "q"],
        "mlp_only_layers": [0],
        "num_attention_heads": [8, 16],
    }
    edited = edit_layers(
        donor, "model.layers", origins((donor, 1), (donor, 1), (other, 0), (other, 1), (None, 2))
    )
    assert edited == {
        "num_hidden_layers": 5,
        "hidden_size": 3,
        "layer_types": ["y", "y", "p", "q", "z"],
        "mlp_only_layers": [0, 1, 2],
        "max_window_layers": 5,
        "architectures": ["OneForCausalLM"],
        "eos_token_id": [7, 8, 9],
        "num_attention_heads": [2, 2, 8, 16, 1],
    }
    assert donor["num_hidden_layers"] == 3


@pytest.mark.parametrize(
    ("config", "family", "changed"),
    [
        ({"n_layer": 2, "n_head": 2}, "transformer.h", {"n_layer": 4}),
        ({"num_layers": 2, "num_decoder_layers": 2}, "encoder.block", {"num_layers": 4}),
        ({"num_layers": 2, "num_decoder_layers": 2}, "decoder.block", {"num_decoder_layers": 4}),
        (
            {"encoder_layers": 2, "num_hidden_layers": 2, "decoder_layers": 2},
            "model.decoder.layers",
            {"decoder_layers": 4},
        ),
        ({"num_hidden_layers": 2}, "model.decoder.layers", {"num_hidden_layers": 4}),
        ({"hidden_size": 2}, "model.layers", {}),
    ],
)
def test_each_familys_own_field_counts_it(config, family, changed):
    assert edit_layers(config, family, origins(*[(config, 0)] * 4)) == {**config, **changed}


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("model.language_model.layers", "text_config"),
        ("model.vision_tower.encoder.layers", "vision_config"),
        ("visual.blocks", "vision_config"),
    ],
)
def test_the_right_part_of_a_config_with_towers_is_changed(family, part):
    config = {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 2}}
    edited = edit_layers(config, family, origins(*[(config, 1)] * 3))
    assert edited == {**config, part: {"num_hidden_layers": 3}}


def test_transformers_takes_the_result():
    donor = AutoConfig.for_model("qwen2", num_hidden_layers=4, max_window_layers=4).to_dict()
    edited = edit_layers(donor, "model.layers", origins(*[(donor, n % 4) for n in range(6)]))
    assert AutoConfig.for_model(**edited).num_hidden_layers == 6
    assert len(edited["layer_types"]) == 6

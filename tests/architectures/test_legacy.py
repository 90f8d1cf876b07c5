"""Layouts of the real Hub: what older versions wrote merges with what today's write, either way
round, as whole as `from_pretrained` loads it."""

from __future__ import annotations

import json

import pytest
import torch
from architectures.tiny import load, tiny_model, wrong
from run.merging import assert_covered
from safetensors.torch import load_file, save_file

import distmerge
from distmerge.run.merge import plan


def without(prefix):
    """The base model's weights saved alone, as most old checkpoints are."""
    return lambda tensors, model: {k.removeprefix(prefix): t for k, t in tensors.items()}


def with_prefix(prefix):
    return lambda tensors, model: {prefix + k: t for k, t in tensors.items()}


def respelt(*pairs):
    def change(tensors, model):
        for new, old in pairs:
            tensors = {key.replace(new, old): tensor for key, tensor in tensors.items()}
        return tensors

    return change


def with_buffers(after, **buffers):
    """Beside each tensor whose key ends so, what models' code rebuilds."""

    def add(tensors, model):
        made = {}
        for key in tensors:
            if key.endswith(after):
                made |= {key.removesuffix(after) + name: make() for name, make in buffers.items()}
        return tensors | made

    return add


def all_names(tensors, model):
    """A whole state dict as torch.save writes it: tied tensors under each of their names."""
    return dict(model.state_dict())


def copies(tensors, model):
    """The same in a file that can't share: tied tensors once for each name."""
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def in_turn(*changes):
    def change(tensors, model):
        for one in changes:
            tensors = one(tensors, model)
        return tensors

    return change


MASKS = {"bias": lambda: torch.ones(1, 1, 32, 32).tril(), "masked_bias": lambda: torch.tensor(-1e4)}
BYTES = {**MASKS, "bias": lambda: torch.ones(1, 1, 32, 32).tril().to(torch.uint8)}
IDS = {"position_ids": lambda: torch.arange(32).view(1, 32)}
ROTARY = {"rotary_emb.inv_freq": lambda: torch.rand(4)}
GAMMA = respelt(("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
WEIGHT_NORM = respelt(
    ("parametrizations.weight.original0", "weight_g"),
    ("parametrizations.weight.original1", "weight_v"),
)
LLAVA = respelt(
    ("language_model.model", "model.language_model"),
    ("language_model.lm_head", "lm_head"),
    ("vision_tower", "model.vision_tower"),
    ("multi_modal_projector", "model.multi_modal_projector"),
)
SMALL_WAVES = {"conv_dim": [8] * 7, "num_conv_pos_embeddings": 4}

LAYOUTS = {
    "gpt2, bare": ("GPT2LMHeadModel", {}, without("transformer.")),
    "gpt2, bare with masks": (
        "GPT2LMHeadModel",
        {},
        in_turn(with_buffers("attn.c_attn.weight", **{f"attn.{k}": m for k, m in MASKS.items()}),
                without("transformer.")),
    ),
    "gpt2, byte masks": (
        "GPT2LMHeadModel",
        {},
        with_buffers("attn.c_attn.weight", **{f"attn.{k}": m for k, m in BYTES.items()}),
    ),
    "gpt2, all names": ("GPT2LMHeadModel", {}, all_names),
    "gpt2, copies": ("GPT2LMHeadModel", {}, copies),
    "bert, gamma": ("BertForMaskedLM", {}, GAMMA),
    "bert, gamma and all names": ("BertForMaskedLM", {}, in_turn(all_names, GAMMA)),
    "bert, bare": ("BertModel", {}, with_prefix("bert.")),
    "bert, indices": (
        "BertForSequenceClassification",
        {},
        with_buffers("position_embeddings.weight", **IDS),
    ),
    "roberta, indices": (
        "RobertaForMaskedLM",
        {},
        in_turn(all_names, with_buffers("position_embeddings.weight", **IDS)),
    ),
    "llama, rotary": (
        "LlamaForCausalLM",
        {},
        with_buffers("q_proj.weight", **ROTARY),
    ),
    "llama, compiled": ("LlamaForCausalLM", {}, with_prefix("_orig_mod.")),
    "llama, data parallel": ("LlamaForCausalLM", {}, with_prefix("module.")),
    "llama, tied, all names": ("LlamaForCausalLM", {"tie_word_embeddings": True}, all_names),
    "neox, masks": (
        "GPTNeoXForCausalLM",
        {},
        with_buffers("query_key_value.weight", **MASKS, **ROTARY),
    ),
    "bloom, bare": ("BloomForCausalLM", {}, without("transformer.")),
    "opt, bare": ("OPTForCausalLM", {}, without("model.")),
    "opt, all names": ("OPTForCausalLM", {}, all_names),
    "gptj, masks": (
        "GPTJForCausalLM",
        {},
        with_buffers("q_proj.weight", **BYTES),
    ),
    "t5, all names": ("T5ForConditionalGeneration", {}, all_names),
    "bart, all names": ("BartForConditionalGeneration", {}, all_names),
    "blenderbot, all names": ("BlenderbotForConditionalGeneration", {}, all_names),
    "electra, all names": ("ElectraForMaskedLM", {}, all_names),
    "albert, all names": ("AlbertForMaskedLM", {}, all_names),
    "mt5, all names": ("MT5ForConditionalGeneration", {}, all_names),
    "whisper, all names": ("WhisperForConditionalGeneration", {}, all_names),
    "xlnet, all names": ("XLNetLMHeadModel", {"d_inner": 24}, all_names),
    "xlm, all names": ("XLMWithLMHeadModel", {"emb_dim": 16, "n_words": 40}, all_names),
    "ctrl, all names": ("CTRLLMHeadModel", {"dff": 24}, all_names),
    "flaubert, all names": ("FlaubertWithLMHeadModel", {"emb_dim": 16, "n_words": 40}, all_names),
    "modernbert, all names": ("ModernBertForMaskedLM", {}, all_names),
    "mpnet, all names": ("MPNetForMaskedLM", {}, all_names),
    "deberta, all names": ("DebertaV2ForMaskedLM", {}, all_names),
    "funnel, all names": ("FunnelForMaskedLM", {"block_sizes": [1, 1], "d_inner": 24}, all_names),
    "esm, all names": ("EsmForMaskedLM", {"vocab_size": 40}, all_names),
    "distilbert, all names": ("DistilBertForMaskedLM", {}, all_names),
    "wav2vec2, weight norm": ("Wav2Vec2ForCTC", SMALL_WAVES, WEIGHT_NORM),
    "llava, of 2025": ("LlavaForConditionalGeneration", {}, LLAVA),
}  # fmt: skip
NOT_AS_LOADED = {"llama, compiled", "llama, data parallel"}
"""Layouts that transformers itself doesn't load: training left its wrappers in the names."""
NOT_BRIDGED = {"llava, of 2025"}
"""Layouts that load, and whose parts have other places than in today's."""
FORMATS = ("safetensors", "bin", "old bin")


def write_old(folder, model, change, form):
    """The model in an older layout and file format."""
    model.save_pretrained(folder)
    modern = load_file(folder / "model.safetensors")
    tensors = change(modern, model)
    (folder / "model.safetensors").unlink()
    if form == "safetensors":
        solid = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
        save_file(solid, folder / "model.safetensors", {"format": "pt"})
    else:
        torch.save(
            tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin"
        )
    config = json.loads((folder / "config.json").read_text())
    config["transformers_version"] = "4.11.3"
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.full
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_old_layouts_merge_with_todays(layout, form, tmp_path):
    name, own, change = LAYOUTS[layout]
    models = {"new": tiny_model(name, 1, **own), "old": tiny_model(name, 2, **own)}
    models["older"] = tiny_model(name, 3, **own)
    parents = {}
    for which, model in models.items():
        model.save_pretrained(tmp_path / which)
        parents[which], _ = load(name, tmp_path / which)
        if which != "new":
            write_old(tmp_path / which, model, change, form)
        if layout not in NOT_AS_LOADED:
            reread, _ = load(name, tmp_path / which)
            assert not wrong(reread, [parents[which]]), "the layout is one that transformers reads"
    pairs = [["new", "old"], ["old", "new"], ["old", "older"]]
    for pair in pairs[2:] if layout in NOT_BRIDGED else pairs:
        recipe = {
            "merge_method": "linear",
            "models": [str(tmp_path / which) for which in pair],
            "parameters": {"weight": 0.5},
        }
        assert_covered(plan(recipe))
        out = tmp_path / "-".join(pair)
        distmerge.merge(recipe, str(out))
        if layout in NOT_AS_LOADED and pair[0] != "new":
            continue
        found, complaints = load(name, out)
        assert not [c for c in complaints if "missing" in c or "mismatched" in c], pair
        assert not wrong(found, [parents[which] for which in pair]), pair

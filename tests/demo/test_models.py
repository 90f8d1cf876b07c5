"""The trained models: they load in every layout, and merging them pays."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from demo.layouts import bare_tensors, causal_mask
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from distmerge.demo import corpus, training
from distmerge.demo.perplexity import PerplexityRow, merge_margin, perplexity_table
from distmerge.demo.training import DemoModels

pytestmark = pytest.mark.full

NAMES = ("base", *corpus.DOMAINS)


class TestTrainedModels:
    def test_they_load_and_their_tokenizer_takes_any_text(self, trained_models):
        for name in NAMES:
            model = AutoModelForCausalLM.from_pretrained(getattr(trained_models, name))
            tokenizer = AutoTokenizer.from_pretrained(getattr(trained_models, name))
            assert type(model) is GPT2LMHeadModel
            assert model.lm_head.weight is model.transformer.wte.weight
            assert len(tokenizer) == model.config.vocab_size == training.VOCABULARY
            text = "Section 7 of the naïve 条約 \n\tAct."
            assert tokenizer.decode(tokenizer(text).input_ids) == text
            assert tokenizer.eos_token_id == model.config.eos_token_id

    def test_fine_tunes_know_their_domain_better_and_the_other_one_worse(self, measured):
        nats = {row.name: row.nats for row in measured}
        for domain, other in itertools.permutations(corpus.DOMAINS):
            assert nats[domain][domain] < nats["base"][domain] - 0.2
            assert nats[domain][other] > nats["base"][other]

    def test_the_best_merge_beats_the_base_and_both_parents(self, measured):
        assert merge_margin(measured, ["average", "ties"]) > 0.05

    @pytest.mark.parametrize("merge", ["average", "ties"])
    def test_so_does_each_merge(self, measured, merge):
        alone = [row for row in measured if row.name in (*NAMES, merge)]
        assert merge_margin(alone, [merge]) > 0.02

    @pytest.mark.parametrize("parent", NAMES)
    def test_a_parent_in_the_place_of_the_merges_does_not(self, measured, parent):
        nats = {row.name: row.nats for row in measured}
        swapped = [
            PerplexityRow(row.name, nats[parent] if row.name in ("average", "ties") else row.nats)
            for row in measured
        ]
        assert merge_margin(swapped, ["average", "ties"]) <= 0

    @pytest.mark.parametrize("seed", [1, 2])
    def test_with_other_seeds_too(self, train_cached, seed):
        table = measure(train_cached(seed))
        assert merge_margin(table, ["average", "ties"]) > 0.05
        assert merge_margin([row for row in table if row.name != "average"], ["ties"]) > 0.02


@pytest.fixture(scope="module")
def measured(trained_models: DemoModels) -> list[PerplexityRow]:
    return measure(trained_models)


def measure(models: DemoModels) -> list[PerplexityRow]:
    tokenizer = AutoTokenizer.from_pretrained(models.base)
    tensors = {name: load_file(getattr(models, name) / "model.safetensors") for name in NAMES}
    base, parents = tensors["base"], [tensors[domain] for domain in corpus.DOMAINS]
    rows = {name: getattr(models, name) for name in NAMES}
    rows["average"] = with_tensors(models.base, average(parents))
    rows["ties"] = with_tensors(models.base, ties(base, parents, density=0.2))
    return perplexity_table(rows, models.held_out, tokenizer=tokenizer)


def with_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    left_over = model.load_state_dict(tensors, strict=False)
    assert left_over.missing_keys == ["lm_head.weight"]
    assert not left_over.unexpected_keys
    return model


def average(models):
    return {key: torch.stack([m[key].double() for m in models]).mean(0) for key in models[0]}


def ties(base, models, *, density):
    """TIES with one cut per tensor and model, election by sum, disjoint mean, lambda 1."""
    merged = {}
    for key, start in base.items():
        kept = []
        for model in models:
            delta = model[key].double() - start.double()
            keep = max(1, int(density * delta.numel()))
            cut = delta.abs().flatten().topk(keep).values[-1]
            kept.append(delta * (delta.abs() >= cut))
        deltas = torch.stack(kept)
        elected = deltas.sum(0).sign()
        agree = (deltas.sign() == elected) & (deltas != 0)
        merged[key] = start.double() + (deltas * agree).sum(0) / agree.sum(0).clamp(min=1)
    return merged


class TestLayouts:
    def test_the_base_is_bare_and_has_masks(self, trained_models, hub_layouts):
        written = load_file(hub_layouts["base"] / "model.safetensors")
        original = load_file(trained_models.base / "model.safetensors")
        masks = {key for key in written if key.endswith(".attn.bias")}
        assert masks == {f"h.{layer}.attn.bias" for layer in range(4)}
        assert {f"transformer.{key}" for key in set(written) - masks} == set(original)
        assert torch.equal(written["h.3.attn.bias"], causal_mask(torch.float32))
        assert written.keys() == bare_tensors(trained_models.base).keys()

    def test_law_is_a_torch_file_with_an_aliased_head(self, hub_layouts):
        assert not list(hub_layouts["law"].glob("*.safetensors"))
        written = torch.load(hub_layouts["law"] / "pytorch_model.bin", weights_only=True)
        head, embedding = written["lm_head.weight"], written["transformer.wte.weight"]
        assert head.untyped_storage().data_ptr() == embedding.untyped_storage().data_ptr()
        assert written["transformer.h.0.attn.masked_bias"].shape == ()
        assert written["transformer.h.0.attn.bias"].dtype == torch.uint8
        assert next(iter(written)) == "transformer.wte.weight"

    @pytest.mark.parametrize("name", NAMES)
    def test_logits_are_those_of_the_trained_model(self, trained_models, hub_layouts, name):
        tokenizer = AutoTokenizer.from_pretrained(hub_layouts[name])
        prompt = tokenizer("The court may order the party to", return_tensors="pt")
        with torch.no_grad():
            logits = [
                AutoModelForCausalLM.from_pretrained(folder)(**prompt).logits
                for folder in (getattr(trained_models, name), hub_layouts[name])
            ]
        assert torch.equal(*logits)

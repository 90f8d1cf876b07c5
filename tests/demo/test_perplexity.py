"""Perplexity: against transformers' own loss, and token by token."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from distmerge.demo.perplexity import PerplexityRow, merge_margin
from distmerge.errors import ParameterError
from distmerge.huggingface.perplexity import log_perplexity


@pytest.fixture(scope="module")
def small():
    """An untrained model and a tokenizer of one token per byte."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5
    )
    return GPT2LMHeadModel(config).eval(), ByteTokenizer()


class ByteTokenizer:
    def __call__(self, text):
        return type("Encoding", (), {"input_ids": list(text.encode())})


class TestPerplexity:
    def test_equals_the_loss_of_transformers(self, trained_models):
        model = AutoModelForCausalLM.from_pretrained(trained_models.base)
        tokenizer = AutoTokenizer.from_pretrained(trained_models.base)
        texts = trained_models.held_out["law"][:12]
        total = predicted = 0
        for text in texts:
            encoded = tokenizer(text, return_tensors="pt")
            length = encoded.input_ids.shape[1]
            assert length <= 128
            with torch.no_grad():
                total += model(**encoded, labels=encoded.input_ids).loss.item() * (length - 1)
            predicted += length - 1
        ours = log_perplexity(model, tokenizer, texts, batch=5)
        assert ours == pytest.approx(total / predicted, abs=1e-5)

    @pytest.mark.parametrize(
        ("context", "stride", "batch"), [(16, 8, 4), (16, 15, 1), (16, 1, 3), (5, None, 2)]
    )
    def test_long_texts_predict_each_token_once(self, small, context, stride, batch):
        model, tokenizer = small
        texts = ["x", "A text of thirty-one characters.", "", "short", "0" * 16]
        step = stride or context // 2
        losses = []
        for text in texts:
            tokens = list(text.encode())
            for place in range(1, len(tokens)):
                start = max(0, math.ceil((place + 1 - context) / step)) * step
                with torch.no_grad():
                    logits = model(torch.tensor([tokens[start:place]])).logits[0, -1]
                losses.append(-logits.double().log_softmax(0)[tokens[place]].item())
        ours = log_perplexity(model, tokenizer, texts, context=context, stride=stride, batch=batch)
        assert ours == pytest.approx(sum(losses) / len(losses), rel=1e-5)

    def test_takes_texts_as_needed_and_records_no_gradients(self, small):
        model, tokenizer = small
        taken = 0
        seen = []

        def texts():
            nonlocal taken
            for _ in range(12):
                taken += 1
                yield "ten bytes!"

        model = copy.deepcopy(model)
        model.register_forward_hook(
            lambda module, args, output: seen.append((taken, output.logits.requires_grad))
        )
        log_perplexity(model, tokenizer, texts(), context=16, batch=4)
        assert seen == [(4, False), (8, False), (12, False)]

    @pytest.mark.parametrize("stride", [0, 16])
    def test_refuses_a_stride_that_would_leave_tokens_out(self, small, stride):
        with pytest.raises(ParameterError, match=r"(?s)stride of .*Fix: stride=8"):
            log_perplexity(*small, ["some text"], context=16, stride=stride)

    def test_refuses_texts_without_a_token_to_predict(self, small):
        with pytest.raises(ParameterError, match="no token to predict"):
            log_perplexity(*small, ["a", ""], context=16)

    def test_the_margin_is_to_the_best_of_the_others(self):
        table = [
            PerplexityRow("base", {"law": 3.0, "cooking": 3.0}),
            PerplexityRow("law", {"law": 1.0, "cooking": 4.5}),
            PerplexityRow("first", {"law": 2.0, "cooking": 2.25}),
            PerplexityRow("second", {"law": 9.0, "cooking": 9.0}),
        ]
        assert [row.mean for row in table] == [3.0, 2.75, 2.125, 9.0]
        assert merge_margin(table, ["first", "second"]) == 0.625
        assert merge_margin(table, ["second"]) == 2.125 - 9.0

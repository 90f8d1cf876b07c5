"""The diagonal Fisher information, against formulas written out again."""

import itertools

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F

from distmerge.errors import CheckpointNotFound, OutputError, ParameterError
from distmerge.importance import estimate_fisher, save_importance

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "hill", "and", "then", "slept"]
TEXTS = ["the cat sat on the mat", "a dog ran", "the dog and the cat slept"]


def tokenizer():
    vocab = {word: i for i, word in enumerate(["[UNK]", "[PAD]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]"
    )


def lively(model):
    """Weights far from their initialisation, dropout on: what a fine-tuned model is like."""
    torch.manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.4)
    return model.train()


def generator():
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=20, n_positions=8, bos_token_id=1, eos_token_id=1
    )
    model = lively(transformers.GPT2LMHeadModel(config))
    return transformers.TextGenerationPipeline(model=model, tokenizer=tokenizer(), device="cpu")


def classifier(labels=3, **options):
    config = transformers.BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        vocab_size=20,
        max_position_embeddings=16,
        num_labels=labels,
        **options,
    )
    model = lively(transformers.BertForSequenceClassification(config))
    return transformers.TextClassificationPipeline(
        model=model, tokenizer=tokenizer(), device="cpu", task="text-classification"
    )


def jacobian(pipe, text):
    """(logits, parameter name -> d logits / d parameter) of one text, without dropout."""
    pipe.model.eval()
    ids = pipe.tokenizer(text, return_tensors="pt")
    logits = pipe.model(**ids).logits[0]
    rows = {name: [] for name, _ in pipe.model.named_parameters()}
    for logit in logits:
        pipe.model.zero_grad(set_to_none=False)
        logit.backward(retain_graph=True)
        for name, param in pipe.model.named_parameters():
            grad = torch.zeros_like(param) if param.grad is None else param.grad
            rows[name].append(grad.double().clone())
    pipe.model.zero_grad(set_to_none=True)
    return logits.detach().double(), {name: torch.stack(grads) for name, grads in rows.items()}


def assert_close(found, expected):
    assert list(found) == list(expected)
    assert any(tensor.max() > 1e-3 for tensor in found.values())
    for name, tensor in found.items():
        assert tensor.dtype is torch.float32
        torch.testing.assert_close(tensor.double(), expected[name].double(), rtol=1e-4, atol=1e-7)


def test_a_language_models_is_that_of_its_texts():
    pipe = generator()
    found = estimate_fisher(pipe, TEXTS)

    pipe.model.eval()
    expected = {name: torch.zeros_like(p) for name, p in pipe.model.named_parameters()}
    for text in TEXTS:
        ids = pipe.tokenizer(text, return_tensors="pt")["input_ids"]
        pipe.model.zero_grad()
        loss = pipe.model(ids, labels=ids).loss  # the mean over the predicted tokens
        (-loss * (ids.shape[1] - 1)).backward()
        for name, param in pipe.model.named_parameters():
            expected[name] += param.grad**2 / len(TEXTS)
    assert_close(found, expected)


def test_a_name_is_loaded(tmp_path):
    pipe = generator()
    pipe.save_pretrained(tmp_path / "model")
    expected = estimate_fisher(pipe, TEXTS)
    for name in (str(tmp_path / "model"), tmp_path / "model"):
        for task in (None, "text-generation"):
            found = estimate_fisher(name, TEXTS, task)
            assert list(found) == list(expected)
            assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_what_is_no_model_or_no_importances(tmp_path):
    with pytest.raises(CheckpointNotFound, match="no-such-model"):
        estimate_fisher(tmp_path / "no-such-model", TEXTS)
    with pytest.raises(ParameterError, match="GPT2LMHeadModel alone"):
        estimate_fisher(generator().model, TEXTS)
    with pytest.raises(ParameterError, match="A str is no importances") as raised:
        save_importance("law", tmp_path / "importance")
    assert "estimate_fisher" in raised.value.fix
    assert not list(tmp_path.iterdir())


def test_a_classifiers_is_the_expectation_over_its_labels():
    pipe = classifier(labels=3)
    found = estimate_fisher(pipe, TEXTS)

    expected = {}
    for text in TEXTS:
        logits, rows = jacobian(pipe, text)
        p = logits.softmax(0)
        for name, grads in rows.items():
            mean = torch.einsum("c,c...->...", p, grads)
            part = torch.einsum("c,c...->...", p, (grads - mean) ** 2) / len(TEXTS)
            expected[name] = expected.get(name, 0) + part
    assert_close(found, expected)


def test_independent_labels():
    pipe = classifier(labels=3, problem_type="multi_label_classification")
    found = estimate_fisher(pipe, TEXTS[:1])

    logits, rows = jacobian(pipe, TEXTS[0])
    expected = dict.fromkeys(rows, 0)
    for outcome in itertools.product((0.0, 1.0), repeat=3):
        y = torch.tensor(outcome, dtype=torch.float64)
        chance = torch.exp(-F.binary_cross_entropy_with_logits(logits, y, reduction="sum"))
        for name, grads in rows.items():
            slope = torch.einsum("c,c...->...", y - logits.sigmoid(), grads)
            expected[name] = expected[name] + chance * slope**2
    assert_close(found, expected)


def test_regression():
    pipe = classifier(labels=1)
    _, rows = jacobian(pipe, TEXTS[0])
    assert_close(estimate_fisher(pipe, TEXTS[:1]), {name: g[0] ** 2 for name, g in rows.items()})


class OnePixelArray(transformers.Pipeline):
    """A pipeline of the user's own, for arrays of pixels."""

    def _sanitize_parameters(self, **kwargs):
        return {}, {}, {}

    def preprocess(self, pixels):
        return {"pixel_values": torch.from_numpy(pixels)[None], "source": "an array"}

    def _forward(self, inputs):
        return self.model(pixel_values=inputs["pixel_values"])

    def postprocess(self, outputs):
        return outputs.logits


def test_inputs_without_a_tokenizer():
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
        num_labels=2,
    )
    model = lively(transformers.ViTForImageClassification(config))
    pixels = np.random.default_rng(0).random((3, 8, 8), dtype=np.float32)
    found = estimate_fisher(OnePixelArray(model=model, device="cpu"), [pixels, pixels])

    # of two labels: p (1 - p) times the squared gradient of the difference of their logits
    model.eval()
    logits = model(pixel_values=torch.from_numpy(pixels)[None]).logits[0]
    names, params = zip(*model.named_parameters(), strict=True)
    slopes = torch.autograd.grad(logits[0] - logits[1], params)
    p = logits.softmax(0).prod().detach()
    assert_close(found, {n: p * slope**2 for n, slope in zip(names, slopes, strict=True)})


@pytest.mark.parametrize("make", [generator, classifier])
def test_the_model_is_left_as_it_was(make):
    pipe = make()
    model = pipe.model
    frozen, with_grad = list(model.parameters())[:2]
    frozen.requires_grad_(False)
    with_grad.grad = torch.ones_like(with_grad)
    next(model.children()).eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]

    with torch.no_grad():
        fisher = estimate_fisher(pipe, TEXTS)
    with pytest.raises(ParameterError):
        estimate_fisher(pipe, [TEXTS[0], ""])

    assert [module.training for module in model.modules()] == modes
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in model.parameters() if p is not frozen)
    assert torch.equal(with_grad.grad, torch.ones_like(with_grad))
    assert all(p.grad is None for p in model.parameters() if p is not with_grad)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    name = next(name for name, p in model.named_parameters() if p is frozen)
    assert fisher[name].max() > 0  # frozen parameters count too


def test_rows_of_a_dataset():
    pipe = generator()
    rows = [{"text": text, "label": 1} for text in TEXTS]
    found, plain = estimate_fisher(pipe, rows), estimate_fisher(pipe, TEXTS)
    assert all(torch.equal(found[name], plain[name]) for name in plain)

    pair = [{"text": "the cat sat", "text_pair": "a dog ran", "label": 0}]
    pipe = classifier()
    differs = estimate_fisher(pipe, pair), estimate_fisher(pipe, ["the cat sat"])
    assert not torch.equal(*(d["classifier.weight"] for d in differs))


def test_a_text_counts_up_to_the_models_window():
    pipe = generator()
    words = "the cat sat on a mat and the"
    longer = estimate_fisher(pipe, [words + " dog slept on the hill"])
    window = estimate_fisher(pipe, [words])
    assert all(torch.equal(longer[name], window[name]) for name in window)


def test_half_precision_models_are_summed_in_single():
    pipe = classifier()
    single = estimate_fisher(pipe, TEXTS)
    pipe.model.to(torch.bfloat16)
    found = estimate_fisher(pipe, TEXTS)
    assert {t.dtype for t in found.values()} == {torch.float32}
    scale = single["classifier.weight"].max()
    assert (found["classifier.weight"] - single["classifier.weight"]).abs().max() < 0.2 * scale


@pytest.mark.parametrize(
    ("dataset", "words"),
    [([], "no examples"), ("the cat sat", "one text"), ([{"sentence": "a"}], "'sentence'")],
)
def test_unusable_data(dataset, words):
    with pytest.raises(ParameterError, match=words):
        estimate_fisher(generator(), dataset)


def test_another_kind_of_model():
    config = transformers.BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        vocab_size=20,
        max_position_embeddings=16,
    )
    pipe = transformers.TokenClassificationPipeline(
        model=transformers.BertForTokenClassification(config), tokenizer=tokenizer(), device="cpu"
    )
    with pytest.raises(ParameterError, match="BertForTokenClassification"):
        estimate_fisher(pipe, TEXTS)


def test_an_importance_checkpoint_is_plain_safetensors(tmp_path):
    fisher = estimate_fisher(generator(), TEXTS[:1])
    path = save_importance(fisher, tmp_path / "made" / "importance")
    assert path == str(tmp_path / "made" / "importance" / "importance.safetensors")
    read = load_file(path)
    assert set(read) == set(fisher)
    assert all(torch.equal(read[name], fisher[name]) for name in fisher)
    assert [p.name for p in (tmp_path / "made" / "importance").iterdir()] == [
        "importance.safetensors"
    ]

    named = save_importance({"w": torch.ones(2, 3).t()}, f"file://{tmp_path}/w.safetensors")
    assert torch.equal(load_file(named)["w"], torch.ones(3, 2))


def test_an_importance_checkpoint_needs_a_writable_local_place(tmp_path):
    with pytest.raises(OutputError, match="local"):
        save_importance({"w": torch.ones(2)}, "s3://bucket/importance")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="written"):
        save_importance({"w": torch.ones(2)}, tmp_path / "file" / "below")

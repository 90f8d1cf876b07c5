"""Real architectures with random weights, small enough to be made anew for a test."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "hill", "and", "then", "slept"]


def tokenizer():
    """Words apart, twenty ids at most."""
    vocab = {word: i for i, word in enumerate(["[UNK]", "[PAD]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]"
    )


def gpt2(seed: int, near: nn.Module | None = None, *, width: int = 8) -> nn.Module:
    """A GPT-2 with tied embeddings; `near` another one, as a fine-tune is."""
    config = transformers.GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=width,
        vocab_size=20,
        n_positions=16,
        bos_token_id=1,
        eos_token_id=1,
    )
    return _filled(transformers.GPT2LMHeadModel(config), seed, near)


def bert(seed: int, near: nn.Module | None = None, *, kind: str = "ForSequenceClassification"):
    """A BERT with two labels, or with another head."""
    config = transformers.BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        vocab_size=20,
        max_position_embeddings=16,
        num_labels=2,
        pad_token_id=1,
    )
    return _filled(getattr(transformers, f"Bert{kind}")(config), seed, near)


def save(model: nn.Module, folder: Path) -> str:
    """A directory that pipelines load."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters, tied ones once."""
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def _filled(model: nn.Module, seed: int, near: nn.Module | None) -> nn.Module:
    draw = torch.Generator().manual_seed(seed)
    given = {} if near is None else dict(near.named_parameters())
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=draw)
            if name in given:
                param.copy_(given[name] + 0.05 * noise)
            else:
                param.copy_(0.5 * noise)
    return model.eval()

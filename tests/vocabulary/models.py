"""Tiny llamas with byte-level tokenizers of their own, trained on different texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

TEXTS = {
    "prose": "the cat sat on the mat and the dog lay near the cat " * 20,
    "law": "the party of the first part shall indemnify the second party " * 20,
    "code": "def main(argument): return argument + 1\nfor index in range(9): print(index)\n" * 20,
}
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def tokenizer(text: str, size: int, added: Sequence[str | AddedToken] = (), **special: str) -> Any:
    """One that splits bytes, trained on a text; `added` come behind."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=ALPHABET, special_tokens=["<s>", "</s>"]
    )
    words.train_from_iterator([text], trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", **special}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    made.add_tokens(list(added))
    return made


def save(
    folder: Path,
    words: Any,
    seed: int,
    *,
    rows: int | None = None,
    tied: bool = False,
    **config: Any,
) -> str:
    """A random model with that tokenizer."""
    torch.manual_seed(seed)
    made = transformers.LlamaConfig(
        vocab_size=len(words) if rows is None else rows,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        tie_word_embeddings=tied,
        **config,
    )
    transformers.LlamaForCausalLM(made).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def vocabulary(folder: str | Path) -> dict[str, int]:
    """Tokens and ids, by transformers."""
    found: dict[str, int] = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    return found


def aligned(
    matrices: Sequence[Tensor],
    vocabularies: Sequence[dict[str, int]],
    out: dict[str, int],
    rules: dict[str, tuple[Tensor, bool]] | None = None,
    multiple: int = 1,
) -> list[Tensor]:
    """Every model's matrix in the vocabulary `out`, one token after the other, as mergekit's
    documentation has it. The base is the first. rules: an embedding, and whether it is forced."""
    width, size = matrices[0].shape[1], len(out)
    made = [torch.zeros(size, width) for _ in matrices]
    for token, row in out.items():
        held = [
            matrix[ids[token]] if token in ids and ids[token] < len(matrix) else None
            for matrix, ids in zip(matrices, vocabularies, strict=True)
        ]
        have = [one for one in held if one is not None]
        rule, forced = (rules or {}).get(token, (None, False))
        if rule is None and held[0] is not None:
            rule = held[0]
        elif rule is None:
            rule = sum(have) / len(have) if have else torch.zeros(width)
        for one, own in zip(made, held, strict=True):
            one[row] = rule if own is None or forced else own
    padding = -size % multiple
    return [torch.cat([one, one.mean(0, keepdim=True).expand(padding, -1)]) for one in made]

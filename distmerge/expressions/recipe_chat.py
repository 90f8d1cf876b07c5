"""The boundary between what a recipe says of the chat template and the models that it opened."""

from __future__ import annotations

from collections.abc import Sequence

from distmerge.checkpoints.store import StorageOptions
from distmerge.errors import RecipeError
from distmerge.expressions.chat_templates import (
    most_common,
    named_template,
    template_in,
    with_template,
)
from distmerge.expressions.nodes import Leaf
from distmerge.expressions.tokenizer_files import CONFIG, NAMES, TokenizerFiles
from distmerge.expressions.vocabularies import read_files


def in_one_template(
    given: str,
    where: str,
    tokenizer: TokenizerFiles | None,
    *,
    merged: Sequence[Leaf],
    donor: Leaf,
    options: StorageOptions,
) -> tuple[TokenizerFiles | None, tuple[str, ...]]:
    """The output's tokenizer with the chat template that is asked for, and warnings.

    tokenizer: the output's, where it isn't copied from the donor.
    where: in the recipe it is asked for.

    Raises
        RecipeError: there is no tokenizer to go with it; a file that should be JSON isn't.
    """
    template = named_template(given)
    if template is None:
        held = (template_in(read_files(m, NAMES, options), str(m)) for m in merged)
        template = most_common(held)
    if template is None:
        return tokenizer, (f"{where}: none of the models has a chat template to take.",)
    if tokenizer is None:
        files = read_files(donor, NAMES, options)
        if not files:
            raise RecipeError(
                f"{where}: {donor} has no tokenizer that could have a chat template.",
                fix="leave 'chat_template:' out, or say whose tokenizer it is: config_from: ...",
            )
        kept = {CONFIG: files[CONFIG]} if CONFIG in files else {}
        tokenizer = TokenizerFiles(kept, frozenset())
    return with_template(template, tokenizer, donor.checkpoint.files, str(donor)), ()

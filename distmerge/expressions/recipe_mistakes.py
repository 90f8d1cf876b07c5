"""The boundary between what pydantic says of a recipe and what its author can do about it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from distmerge.checkpoints.renaming import FORM
from distmerge.credentials import redact
from distmerge.errors import DistmergeError, RecipeError
from distmerge.expressions.recipe_text import Document, dotted
from distmerge.expressions.recipe_words import MERGEKIT_METHODS, MERGEKIT_MOE
from distmerge.methods.method import MergeMethod
from distmerge.methods.registry import find_method

EXAMPLES = {
    "merge_method": "merge_method: linear",
    "models": "models: [{model: org/name, parameters: {weight: 1.0}}]",
    "slices": "slices: [{sources: [{model: org/name, layer_range: [0, 16]}]}]",
    "sources": "sources: [{model: org/name, layer_range: [0, 16]}]",
    "layer_range": "layer_range: [0, 16], the first layer and the one after the last",
    "modules": "modules: {text_decoder: {models: [...]}, vision_tower: {models: [...]}}",
    "name": "name: intermediate",
    "model": "model: org/name, or model: {path: org/name, revision: main}",
    "base_model": "base_model: org/name",
    "config_from": "config_from: org/name",
    "parameters": "parameters: {weight: 1.0}",
    "dtype": "dtype: bfloat16",
    "out_dtype": "out_dtype: bfloat16",
    "seed": "seed: 0",
    "over": "over: tensor, or over: model",
    "on_missing": "on_missing: error, common, base or average",
    "on_unequal": "on_unequal: error, or base",
    "on_shape_mismatch": "on_shape_mismatch: error, base or skip",
    "tokenizer": "tokenizer: {source: union}",
    "tokenizer_source": "tokenizer_source: union, base or org/name",
    "chat_template": "chat_template: auto, chatml, or a template in Jinja",
    "tokens": "tokens: {'<|im_start|>': {source: org/name}}",
    "kind": "source: {kind: zero}, or {kind: model_token, model: org/name, token_id: 3}",
    "token_id": "token_id: 3",
    "pad_to_multiple_of": "pad_to_multiple_of: 64",
    "passthrough": "passthrough: [lm_head]",
    "storage_options": "storage_options: {'s3://bucket/': {endpoint_url: ...}}",
    "revision": "revision: 'main'; numbers need quotes",
    "rename": FORM,
    "path": "path: 'org/name'; numbers need quotes",
}
"""What a key looks like where it is right."""

_WANTED = {
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
}
"""pydantic's kinds of mistakes -> what a recipe should have there."""
_SHOULD = re.compile("^[A-Z][a-z]+ should")
_ALSO_NAMES = ("ModelRef", "Source")
"""Sections that may be a model's name alone."""


def explained(
    error: ValidationError,
    document: Document,
    *,
    examples: Mapping[str, str] = EXAMPLES,
    hidden: Collection[str] = (),
) -> RecipeError:
    """All mistakes in one error, each with its line.

    hidden: words that pydantic puts into places though the document has no such keys.
    """
    mistakes, fix = [], None
    for problem in error.errors(include_url=False):
        loc = (part for part in problem["loc"] if part not in hidden)
        path = tuple("models" if part == "names" else part for part in loc)
        names = [str(part) for part in path if isinstance(part, str)]
        raised = problem.get("ctx", {}).get("error")
        reason = raised.headline if isinstance(raised, DistmergeError) else _reason(problem)
        secret = path[:1] == ("storage_options",)
        shown = "" if secret else f", not {redact(repr(problem['input']))[:80]}"
        if problem["type"] == "too_short" and not problem["input"]:
            reason, shown = "it is empty, and holds one entry at least", ""
        if isinstance(raised, DistmergeError) or problem["type"] == "missing":
            shown = ""
        mistakes.append(f"{document.where(path)}: {dotted(path)}: {reason}{shown}")
        own = raised.fix if isinstance(raised, DistmergeError) else None
        example = next((examples[n] for n in reversed(names) if n in examples), None)
        fix = fix or own or example
    if len(mistakes) == 1:
        return RecipeError(mistakes[0].rstrip(".") + ".", fix=fix)
    return RecipeError(f"{document.origin} has {len(mistakes)} mistakes.", *mistakes, fix=fix)


def _reason(problem: ErrorDetails) -> str:
    """pydantic's, in the words of recipes."""
    kind = problem["type"]
    if kind == "missing":
        return "it is missing"
    wanted = _WANTED.get(kind.replace("dataclass_type", "model_type"))
    if problem.get("ctx", {}).get("class_name") in _ALSO_NAMES:
        wanted = "a model's name, or a mapping"
    return f"it has to be {wanted}" if wanted else _SHOULD.sub("it has to", problem["msg"])


def named_method(document: Document) -> MergeMethod:
    """The method that a recipe names. Raises RecipeError, UnknownMethod."""
    name = document.data.get("merge_method")
    if name is None:
        _refuse_moe(document)
    if name is not None and not isinstance(name, str):
        raise RecipeError(
            f"{document.where(('merge_method',))}: merge_method: it has to be a method's name, "
            f"not {name!r:.80}.",
            fix=EXAMPLES["merge_method"],
        )
    if name is None:
        near = difflib.get_close_matches("merge_method", list(document.data), 1)
        facts = [f"{document.where((near[0],))}: {near[0]!r} is no key of a recipe"] if near else []
        raise RecipeError(
            f"{document.origin} names no merge_method.", *facts, fix=EXAMPLES["merge_method"]
        )
    try:
        return find_method(name)
    except DistmergeError as error:
        facts, fix = [*error.facts, document.where(("merge_method",))], error.fix
        if name in MERGEKIT_METHODS:
            facts.append("mergekit's method of that name is not supported yet")
            fix = "choose one of the known ones; 'distmerge methods' describes them"
        raise type(error)(error.headline, *facts, fix=fix) from None


def _refuse_moe(document: Document) -> None:
    found = [key for key in MERGEKIT_MOE if key in document.data]
    if found:
        raise RecipeError(
            f"{document.origin} is a file for mergekit-moe, not a merge: it makes models the "
            "experts of a new one.",
            *(f"{document.where((key,))}: {key}" for key in found),
            fix="make the mixture with mergekit-moe (it can be merged here afterwards), or list "
            "the experts under 'models:' with a 'merge_method:'",
        )

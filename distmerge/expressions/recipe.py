"""The boundary between a recipe's text and a merge that can be planned.

    recipe = load_recipe("merge.yml", overrides=["parameters.density=0.3"])
    request = recipe.request()       # opens the models, reads headers only

The language is mergekit's.
Besides it has merge, seed, over, config_from, on_missing and its like, passthrough,
storage_options. A recipe of several documents is one merge, the others nested in it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
)

from distmerge.checkpoints.storage_options import check_storage_options
from distmerge.checkpoints.store import StorageOptions
from distmerge.errors import RecipeError, shown
from distmerge.expressions.chat_templates import check_template
from distmerge.expressions.dtypes import parse_dtype
from distmerge.expressions.model_ref import ModelRef
from distmerge.expressions.nodes import OnMissing, OnShapeMismatch, OnUnequal
from distmerge.expressions.recipe_documents import arranged, references, unused
from distmerge.expressions.recipe_formula import Formula, named_models, read_formula
from distmerge.expressions.recipe_formula_keys import check_formula_keys
from distmerge.expressions.recipe_keys import (
    Ignored,
    check_forms,
    check_keys,
    refuse_misplaced,
)
from distmerge.expressions.recipe_mistakes import explained, named_method
from distmerge.expressions.recipe_sources import (
    Modules,
    Parameters,
    Part,
    Slices,
    Sources,
    nothing_as,
    parts_of,
    with_inputs,
)
from distmerge.expressions.recipe_text import (
    Document,
    at_path,
    dump_text,
    override,
    read_documents,
)
from distmerge.expressions.recipe_tokenizer import FORMS, TokenizerSection, one_section
from distmerge.expressions.recipe_values import Values, read_values
from distmerge.expressions.request import MergeRequest
from distmerge.expressions.yaml_lines import KeyPath
from distmerge.methods.method import MergeMethod
from distmerge.methods.registry import find_method


class Recipe(BaseModel):
    """A validated recipe. Its repr and its `text` leave storage options out."""

    model_config = ConfigDict(frozen=True)

    merge_method: str = ""
    names: dict[str, ModelRef] = {}
    """What a formula calls its models."""
    base_model: ModelRef | None = None
    name: str | None = None
    """What other documents of the same recipe call this one."""
    models: Sources = ()
    slices: Slices = ()
    modules: Modules = {}
    parameters: Parameters = {}
    dtype: Annotated[str | None, BeforeValidator(lambda d: d and parse_dtype(d))] = None
    """safetensors' name. In mergekit also what is computed in; here that is float32."""
    out_dtype: Annotated[
        str | None, BeforeValidator(lambda d: d and parse_dtype(d, eight_bits=True))
    ] = None
    seed: int = Field(0, ge=0, lt=1 << 64)
    over: Literal["tensor", "model"] | None = None
    config_from: ModelRef | None = None
    tokenizer: TokenizerSection | None = None
    tokenizer_source: ModelRef | None = None
    chat_template: Annotated[str | None, AfterValidator(lambda t: t and check_template(t))] = None
    on_missing: OnMissing = "error"
    on_unequal: OnUnequal = "error"
    on_shape_mismatch: OnShapeMismatch = "error"
    passthrough: Annotated[
        tuple[str, ...], BeforeValidator(lambda keys: [keys] if isinstance(keys, str) else keys)
    ] = ()
    storage_options: Annotated[dict[str, Any], nothing_as(dict)] = Field({}, repr=False)

    _document: Document = PrivateAttr(default_factory=Document)
    _method: MergeMethod | None = PrivateAttr(default=None)
    _ignored: tuple[Ignored, ...] = PrivateAttr(default=())
    _levels: dict[KeyPath, Values] = PrivateAttr(default_factory=dict)
    _named: Mapping[str, Recipe] = PrivateAttr(default_factory=dict)
    _beside: tuple[str, ...] = PrivateAttr(default=())
    _formula: Formula | None = PrivateAttr(default=None)

    @property
    def document(self) -> Document:
        """Where each key stands, for messages."""
        return self._document

    @property
    def method(self) -> MergeMethod:
        """The merge method, found by its name."""
        return self._method or find_method(self.merge_method)

    @property
    def formula(self) -> Formula | None:
        """What `merge:` says, if the recipe has that instead of a method."""
        return self._formula

    def in_formula(self) -> list[ModelRef]:
        """The models of the formula, in the order in which they are met."""
        used = self._formula.models() if self._formula else []
        return [self.names.get(name) or ModelRef(path=name) for name in used]

    @property
    def ignored(self) -> tuple[Ignored, ...]:
        """Keys that have no effect."""
        return self._ignored

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences, each with the line of a key that is ignored or given twice."""
        ignored = (ignored.text for ignored in self._ignored)
        return tuple(map(shown, (*self._document.warnings, *ignored, *self._beside)))

    @property
    def text(self) -> str:
        """The recipe for the record: as written, unless it held secrets or was overridden. All
        documents that it needs are in it.
        """
        kept = self._document
        needed = [recipe for recipe in self._named.values() if recipe is not self]
        as_written = all(
            not r.document.overridden and "storage_options" not in r.document.data
            for r in (*needed, self)
        )
        if kept.text is not None and as_written:
            return kept.text
        return "---\n".join(recipe._plain_text() for recipe in (*needed, self))

    def _plain_text(self) -> str:
        # Keys that nobody reads may be where an alias's secret is written.
        ignored = {i.path[0] for i in self._ignored if len(i.path) == 1}
        hidden = {"storage_options", *ignored}
        return dump_text({k: v for k, v in self._document.data.items() if k not in hidden})

    @property
    def nested(self) -> Mapping[str, Recipe]:
        """The documents of the same recipe that this one names as models, by name."""
        paths = {ref.path for _, ref in references(self)}
        return {name: recipe for name, recipe in self._named.items() if name in paths}

    def may_name(self, documents: Mapping[str, Recipe]) -> None:
        """Let models of this document be other documents, by name."""
        self._named = documents

    @property
    def vocabulary(self) -> TokenizerSection | None:
        """What it says of the output's vocabulary. Raises RecipeError if it says it twice."""
        return one_section(self.tokenizer, self.tokenizer_source, self._document)

    def parts(self) -> list[Part]:
        """What is merged with what; nothing if a formula says it."""
        given = self.models, self.slices, self.modules, self.base_model
        return [] if self._formula is not None else parts_of(*given)

    def identity(self, ref: ModelRef) -> object:
        """Equal for two names of one model."""
        return ref.path if ref.path in self._named else ref.location

    def values(self, *place: str | int) -> Values:
        """Checked parameters of one level: `values()` are the recipe's own, those of
        `values("models", 0)` the first model's."""
        if place not in self._levels:
            given = at_path(self._document.data, (*place, "parameters")) or {}
            path = (*place, "parameters")
            self._levels[place] = read_values(given, path, self.method, self._document)
        return self._levels[place]

    def request(self, storage_options: StorageOptions | None = None) -> MergeRequest:
        """Open the models, reading headers only, and build the expression.

        Args
            storage_options: instead of the recipe's.

        Raises
            CheckpointError and its kinds: a model that can't be used.
            RecipeError: too few or too many models, one given twice, a base that is missing.
            ParameterError: a parameter that nothing gives.
        """
        from distmerge.expressions.recipe_build import build_request

        given = self.storage_options if storage_options is None else storage_options
        return build_request(self, given)


def load_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Document],
    *,
    overrides: Sequence[str] = (),
    storage_options: StorageOptions | None = None,
    strict: bool = False,
) -> Recipe:
    """Read and validate a recipe; no model is looked at.

    Args
        source: a path, "-" for standard input, YAML text, a mapping, or what has been read.
        overrides: `key.key=value`, values in YAML, list items by number.
        storage_options: instead of the recipe's.
        strict: keys that have no effect are an error.

    Raises
        RecipeError: not there, not YAML, a key that isn't supported, a value of the wrong kind.
        UnknownMethod, ParameterError: with the nearest name.
    """
    documents = override(read_documents(source), overrides)
    loaded = [_load(document, storage_options) for document in documents]
    final, named = arranged(loaded)
    final._beside = tuple(unused(final, named))
    facts = [text for recipe in loaded for text in recipe.warnings]
    if strict and facts:
        raise RecipeError(
            f"{final.document.origin} has keys without effect.",
            *dict.fromkeys(facts),
            fix="correct them, or leave --strict out",
        )
    return final


def _load(document: Document, storage_options: StorageOptions | None) -> Recipe:
    refuse_misplaced(document)
    if "merge" in document.data:
        return _load_formula(document, storage_options)
    method = named_method(document)
    ignored = check_keys(document, method)
    data = {**with_inputs(document.data, method.inputs[1:]), "names": {}}
    recipe = _validated(document, data, storage_options)
    recipe._method, recipe._ignored = method, tuple(ignored)
    check_forms(document)
    for part in recipe.parts():
        for section in part.sections:
            for place in (*section.levels, *section.places):
                recipe.values(*place)
    return recipe


def _load_formula(document: Document, storage_options: StorageOptions | None) -> Recipe:
    formula = read_formula(document)
    ignored = check_formula_keys(document, formula.models())
    data = {**document.data, "models": (), "names": named_models(document)}
    recipe = _validated(document, data, storage_options)
    recipe._formula, recipe._ignored = formula, tuple(ignored)
    return recipe


def _validated(
    document: Document, given: Mapping[str, Any], storage_options: StorageOptions | None
) -> Recipe:
    data = dict(given)
    if storage_options is not None:
        data["storage_options"] = dict(storage_options)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise explained(error, document, hidden=FORMS) from None
    check_storage_options(recipe.storage_options)
    recipe._document = document
    one_section(recipe.tokenizer, recipe.tokenizer_source, document)
    return recipe

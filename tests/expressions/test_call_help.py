"""help() and inspect.signature say of a call what it takes, no more and no less."""

from __future__ import annotations

import inspect
import pydoc
from dataclasses import fields

import pytest
import torch

import distmerge
from distmerge.expressions.call_arguments import CallOptions
from distmerge.expressions.call_help import SameAs
from distmerge.methods.method import MergeMethod
from distmerge.methods.registry import find_method, method_names

OPTIONS = [option.name for option in fields(CallOptions)]
VALUES = {"weight": 1.0, "t": 0.1}
"""Of parameters without a default."""


@distmerge.layer_merge
def faded(models, base, *, weight: distmerge.PerModel[float] = 0.5, seed: int = 3):
    """Towards the base."""
    return base + sum(w * (model - base) for w, model in zip(weight, models, strict=True))


@distmerge.dict_map(["models", "shares"])
def mixed(models, shares, power, floor=0.0):
    return sum(m * s**power for m, s in zip(models, shares, strict=True)) + floor


@distmerge.model_merge
def whole(models, *, factor: float = 1.0, **kw):
    """All of it."""
    return models[0] * factor


CALLED = [*map(find_method, method_names()), distmerge.fisher, faded, mixed, whole]


def keywords(call):
    return {
        name: parameter
        for name, parameter in inspect.signature(call).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


@pytest.mark.parametrize("call", CALLED, ids=lambda call: call.__name__)
def test_models_come_first_then_its_own_words_then_the_options(call):
    names = list(inspect.signature(call).parameters)
    assert names[0] == "models"
    assert set(OPTIONS) <= set(names)
    own = [name for name in names if name not in (*OPTIONS, "keywords")]
    assert names[: len(own)] == own or call in (faded, find_method("passthrough"))


def test_of_ties():
    shown = str(inspect.signature(distmerge.ties))
    assert shown.startswith(
        "(models, *, k=0.1, weights=None, scaling=1.0, over='tensor', weight=<weights>, "
        "density=<k>, normalize=True, rescale=False, lambda_=<scaling>, "
        "sign_weighting='weighted', base_index=0, task=None, "
    )
    assert "out=None, overwrite=False" in shown


def test_a_call_may_have_other_defaults_than_a_recipe():
    assert keywords(distmerge.dare)["rescale"].default == "density"
    assert find_method("dare_linear").parameters["rescale"].default is True


def test_of_methods_of_ones_own():
    assert keywords(faded)["weight"].default == 0.5
    assert keywords(faded)["seed"].default == 3, "its own, not that of every call"
    assert list(inspect.signature(mixed).parameters)[:4] == ["models", "shares", "power", "floor"]
    assert str(inspect.signature(mixed)).endswith("**keywords)")
    assert keywords(whole)["factor"].default == 1.0
    inspect.signature(whole).bind([], anything=1)


@pytest.mark.parametrize("name", method_names())
def test_every_keyword_is_taken_with_the_value_shown(name):
    method = find_method(name)
    most = method.models[1]
    count = 2 if method.counts_base else 1 + (most or 2) if method.takes_base else most or 2
    draw = torch.Generator().manual_seed(0)
    models = [distmerge.StateDict(w=torch.randn(4, 6, generator=draw)) for _ in range(count)]
    lists = [models for _ in method.inputs]
    shown = {
        key: VALUES[key] if parameter.default is parameter.empty else parameter.default
        for key, parameter in keywords(method).items()
        if key not in ("out", "storage_options") and not isinstance(parameter.default, SameAs)
    }
    alone = {
        k: v for k, v in shown.items() if keywords(method)[k].default is inspect.Parameter.empty
    }
    said, left_out = method(*lists, **shown), method(*lists, **alone)
    torch.testing.assert_close(said["w"], left_out["w"], rtol=0, atol=0)


@pytest.mark.parametrize("call", CALLED, ids=lambda call: call.__name__)
def test_help_names_every_keyword(call):
    text = pydoc.plain(pydoc.render_doc(call))
    for name in [*keywords(call), "models"]:
        assert f" {name}" in text, name
    assert "instance of" not in text


def test_help_begins_with_what_it_does():
    text = pydoc.plain(pydoc.render_doc(faded))
    assert "Towards the base." in text
    assert text.index("Towards") < text.index("Parameters") < text.index("Options of every call")
    assert "overwrite=False: replace what out holds" in text
    assert distmerge.ties.__doc__.startswith("Trim each task vector")


def test_the_classes_are_documented_as_such():
    assert MergeMethod.__doc__.startswith("A registered function")
    assert next(iter(inspect.signature(MergeMethod).parameters)) == "name"

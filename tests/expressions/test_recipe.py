"""The recipe language: what is read, warned of and refused before any model is looked at."""

from __future__ import annotations

import pytest
import yaml

from distmerge.errors import ParameterError, RecipeError, UnknownMethod
from distmerge.expressions.recipe import load_recipe
from distmerge.methods.parameters import Filtered, Gradient

MERGEKIT_MOE = """
base_model: org/base
gate_mode: hidden
experts:
  - source_model: org/law
    positive_prompts: [the court]
"""

TIES = """\
models:
  - model: org/one
    parameters:
      density: [1, 0.7, 1e-1]
      weight: 1.0
  - model: {path: org/two, revision: v2}
    parameters:
      density: 1e-1
      weight: [0, 0.3, 1]
  - model: {model: {path: ./three}}
    parameters:
      weight:
        - filter: mlp
          value: [0.5, 1]
        - value: 0
merge_method: ties
base_model: org/base@main
parameters:
  normalize: 1.0
  int8_mask: true
  density: {filter: mlp, value: 0.3}
dtype: torch.float16
"""


def test_a_recipe_of_every_form():
    recipe = load_recipe(TIES)
    assert recipe.warnings == ()
    assert [str(source.model) for source in recipe.models] == ["org/one", "org/two@v2", "./three"]
    assert str(recipe.base_model) == "org/base@main"
    assert recipe.values("models", 0) == {"density": Gradient((1.0, 0.7, 0.1)), "weight": 1.0}
    assert recipe.values("models", 1) == {"density": 0.1, "weight": Gradient((0.0, 0.3, 1.0))}
    filtered = Filtered((("mlp", Gradient((0.5, 1.0))), (None, 0.0)))
    assert recipe.values("models", 2) == {"weight": filtered}
    assert recipe.values() == {"normalize": True, "density": Filtered((("mlp", 0.3),))}
    assert (recipe.dtype, recipe.out_dtype, recipe.seed) == ("F16", None, 0)
    assert recipe.text == TIES


def test_our_own_keys():
    recipe = load_recipe(
        {
            "merge_method": "model_stock",
            "models": ["a", "b"],
            "base_model": "base",
            "seed": "7",
            "over": "model",
            "config_from": "b",
            "on_missing": "average",
            "passthrough": "lm_head",
            "out_dtype": "BF16",
            "parameters": None,
        }
    )
    assert recipe.seed == 7
    assert recipe.over == "model"
    assert str(recipe.config_from) == "b"
    assert recipe.on_missing == "average"
    assert recipe.passthrough == ("lm_head",)
    assert recipe.out_dtype == "BF16"
    assert yaml.safe_load(recipe.text)["models"] == ["a", "b"]


def linear(extra: str = "", *, parameters: str = "{weight: 1}", method: str = "linear") -> str:
    return (
        f"merge_method: {method}\n"  # line 1
        "models:\n"
        "  - model: a\n"
        f"    parameters: {parameters}\n"  # line 4
        "  - model: b\n"
        "    parameters: {weight: 1}\n" + extra  # line 7
    )


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        (linear("dype: float32"), "line 7: 'dype' is ignored here; write 'dtype'."),
        (linear("normalize: true"), "line 7: 'normalize' is ignored here; move it under 'param"),
        (linear("select_topk: 0.1"), "line 7: 'select_topk' is ignored here; move it under 'para"),
        (linear("int8_mask: true"), "line 7: 'int8_mask' is ignored here; move it under 'parame"),
        (linear("pad_to_multiple_of: 8"), "ignored here; write it under 'tokenizer:'."),
        (linear("zzz: 8"), "line 7: 'zzz' is ignored here; leave it out."),
        (linear("    weight: 2"), "line 7: 'weight' is ignored here; move it under this model's '"),
        (linear("    revision: v2"), "ignored here; write it in 'model: {path: ..., revision: ..."),
        (
            linear("    dtype: float16"),
            "line 7: 'dtype' is ignored here; move it to the top level.",
        ),
        (linear("    layer_range: [0, 4]"), "write it in an item of 'sources:', under 'slices:'."),
        (
            linear("    lora: x"),
            "ignored here; write it in 'model: {model: ..., lora: ...}', or in",
        ),
        (linear("    modle: x"), "line 7: 'modle' is ignored here; write 'model'."),
        (linear("parameters: {dtype: float16}"), "line 7: 'dtype' is ignored here; move it to the"),
        (linear("parameters: {t: 0.5}"), "line 7: linear has no parameter 't'; it is ignored."),
        (linear(parameters="{weight: 1, density: 1}"), "line 4: linear has no parameter 'density'"),
        (
            linear(parameters="{weight: 1, normalize: false}"),
            "line 4: linear has one 'normalize' for all models; move it under the recipe's own",
        ),
        (
            linear("base_model: {path: c, revison: v}"),
            "'revison' is ignored here; write 'revision'",
        ),
        (
            linear(parameters="{wieght: 1}"),
            "line 4: linear has no parameter 'wieght'; it is ignored. Did you mean 'weight'?",
        ),
        (
            linear("parameters: {normalise: 1}"),
            "line 7: linear has no parameter 'normalise'; it is ignored. Did you mean 'normalize'?",
        ),
        (
            linear(parameters="{zzz: 1}"),
            "line 4: linear has no parameter 'zzz'; it is ignored; it has: weight, normalize.",
        ),
        (
            linear(parameters="{weights: 1}"),
            "Did you mean 'weight' ('weights' is its name in Python calls)?",
        ),
        (
            linear(parameters="{layer_range: [0, 4]}"),
            "'layer_range' is ignored here; write it in an item of 'sources:', under 'slices:'.",
        ),
        (
            linear("tokenizer: {chat_template: auto}"),
            "'chat_template' is ignored here; move it to the top level.",
        ),
        (linear("grid: {dtype: [float16]}"), "'grid' is ignored here; use 'distmerge sweep'."),
        (linear("keep: best 1 by loss"), "'keep' is ignored here; use 'distmerge sweep'."),
        ("models: {a: x}\nmerge: a + 1\nzip: {seed: [1]}", "'zip' is ignored here; use 'distme"),
        (linear("tokenizer: {pad_to_multiple: 8}"), "write 'pad_to_multiple_of'."),
        (linear("chat_templates: auto"), "line 7: 'chat_templates' is ignored here; write 'chat_t"),
        (linear("dtype: float16\ndtype: float32"), "line 8: 'dtype' is given twice; the last one"),
    ],
)
def test_keys_without_effect_are_named_with_line_and_place(text, warning):
    (found,) = load_recipe(text).warnings
    assert found.startswith("the recipe, line ")
    assert warning in found
    with pytest.raises(RecipeError, match="has keys without effect") as raised:
        load_recipe(text, strict=True)
    assert raised.value.facts == (found,)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", "{int8_mask: true, rescale: false}"),
        ("task_arithmetic", "{int8_mask: false, density: 0.3, rescale: true}"),
        ("dare_linear", "{int8_mask: true}"),
    ],
)
def test_parameters_of_mergekit_that_change_nothing_pass_in_silence(method, parameters):
    text = linear(f"base_model: base\nparameters: {parameters}", method=method)
    assert load_recipe(text, strict=True).warnings == ()


def test_what_would_change_the_merge_elsewhere_is_refused():
    with pytest.raises(RecipeError) as raised:
        load_recipe(linear("rename: {a: b}"))
    assert raised.value.headline == "the recipe, line 7: rename holds for one model, not for all."
    assert raised.value.fix


def test_empty_keys_are_absent_ones():
    text = linear("    lora:\ntokenizer_source: null\nslices: []\nbase_model:\nname: mine\n")
    recipe = load_recipe(text)
    assert recipe.warnings == ()
    assert recipe.base_model is None


@pytest.mark.parametrize(
    ("text", "kind", "headline", "fix"),
    [
        (linear(method="tiess"), UnknownMethod, "no merge method 'tiess'", "did you mean 'ties'?"),
        (linear(method="nope.py:f"), UnknownMethod, "There is no file nope.py", "path that exists"),
        (linear(method="[ties]"), RecipeError, "has to be a method's name", "merge_method: linear"),
        ("models: [a]", RecipeError, "names no merge_method", "merge_method: linear"),
        (
            MERGEKIT_MOE,
            RecipeError,
            "a file for mergekit-moe",
            "make the mixture with mergekit-moe",
        ),
        ("method: ties\nmodels: [a]", RecipeError, "names no merge_method", "merge_method: linear"),
        (linear(parameters="{weight: abc}"), ParameterError, "weight can't be 'abc'", "weight:"),
        (linear(parameters="{weight: .nan}"), ParameterError, "weight can't be nan", "weight: 1.0"),
        (linear(parameters="{weight: [1, .inf]}"), ParameterError, "can't be inf", "weight: 1.0"),
        (linear(parameters="{weight: 1e308}"), ParameterError, "weight can't be 1e+308", "1.0"),
        (linear(parameters="{weight: -3.5e+38}"), ParameterError, "can't be -3.5e+38", "1.0"),
        (linear(parameters="{weight: [{value: 1e39}]}"), ParameterError, "can't be 1e+39", "1.0"),
        (
            linear(parameters="{weight: 1%s}" % ("0" * 400)),
            ParameterError,
            "weight can't",
            "weight:",
        ),
        (linear(parameters="{weight: []}"), ParameterError, "not of a form", "[{filter: mlp,"),
        (linear(parameters="{weight: [[1]]}"), ParameterError, "not of a form", "[{filter: mlp,"),
        (linear(parameters="{weight: [1, null]}"), ParameterError, "not of a form", "weight: 0.5"),
        (linear(parameters="{weight: {filter: x}}"), ParameterError, "not of a form", "value: 0.5"),
        (linear(parameters="{weight: {vaule: 1}}"), ParameterError, "not of a form", "value: 0.5"),
        (linear(parameters="{weight: [{filter: 3, value: 1}]}"), ParameterError, "form", "value"),
        (linear(parameters="{weight: [{value: 1}, 2]}"), ParameterError, "not of a form", "value"),
        (linear(parameters="3"), RecipeError, "line 4: models.0.parameters", "parameters: {"),
        (linear("dtype: int64"), RecipeError, "line 7: dtype: A merge can't be", "bfloat16"),
        (linear("out_dtype: float8_e5m2"), RecipeError, "line 7: out_dtype: A merge", "float32"),
        (linear("out_dtype: 16"), RecipeError, "line 7: out_dtype: A merge can't", "bfloat16"),
        (linear("seed: abc"), RecipeError, "line 7: seed: it has to be a whole", "seed: 0"),
        (linear("seed: -1"), RecipeError, "line 7: seed: it has to be greater", "seed: 0"),
        (linear("over: layer"), RecipeError, "line 7: over: it has to be 'tensor'", "over: "),
        (linear("on_missing: skip"), RecipeError, "line 7: on_missing: it has to be", "average"),
        (
            linear("base_model: 3"),
            RecipeError,
            "line 7: base_model: it",
            "base_model: org/name",
        ),
        (
            linear("base_model: ''"),
            RecipeError,
            "line 7: base_model.path: it has",
            "quotes",
        ),
        (
            linear("base_model: {path: a, revision: 12}"),
            RecipeError,
            "base_model.revision",
            "quote",
        ),
        (
            "merge_method: linear\nmodels: a\n",
            RecipeError,
            "models: it has to be a list",
            "models: [{",
        ),
        ("merge_method: linear\nmodels: [3]\n", RecipeError, "models.0: it has", "models: [{"),
        (
            "merge_method: linear\nmodels: [{}]\n",
            RecipeError,
            "models.0.model: it is missing",
            "model:",
        ),
    ],
)
def test_mistakes(text, kind, headline, fix):
    with pytest.raises(kind) as raised:
        load_recipe(text)
    assert headline in raised.value.headline
    assert fix in (raised.value.fix or "")
    assert "the recipe" in str(raised.value)


def test_values_out_of_range_name_the_line():
    text = linear("base_model: c\nparameters: {density: [1, 1.5]}", method="ties")
    with pytest.raises(ParameterError, match=r"ties: density can't be 1\.5") as raised:
        load_recipe(text)
    assert raised.value.facts[-1] == "the recipe, line 8"


def test_all_mistakes_are_told_together():
    with pytest.raises(RecipeError, match="has 3 mistakes") as raised:
        load_recipe(linear("seed: x\nover: y\ndtype: z\n"))
    assert [fact.split(": ")[1] for fact in raised.value.facts] == ["dtype", "seed", "over"]


def test_overrides_hold_and_must_have_an_effect():
    recipe = load_recipe(TIES, overrides=["models.0.parameters.weight=0.4", "seed=3"])
    assert recipe.values("models", 0)["weight"] == 0.4
    assert recipe.seed == 3
    recorded = yaml.safe_load(recipe.text)
    assert recorded["models"][0]["parameters"]["weight"] == 0.4
    assert recorded["seed"] == 3
    for wrong in ("lambda=2", "models.0.weight=2", "sed=3", "models.0.parameters.normalize=true"):
        with pytest.raises(RecipeError, match=f"--set {wrong.split('=')[0]}") as raised:
            load_recipe(TIES, overrides=[wrong])
        assert raised.value.fix
    with pytest.raises(ParameterError, match="density can't be 2") as raised:
        load_recipe(TIES, overrides=["parameters.density=2"])
    assert raised.value.facts[-1] == "--set parameters.density"


SECRET = "s3cr3t-k3y"


def test_storage_options_are_shown_nowhere():
    text = linear(
        "x-keys: &keys {'s3://bucket/': {secret: " + SECRET + "}}\nstorage_options: *keys\n"
    )
    recipe = load_recipe(text)
    assert recipe.storage_options == {"s3://bucket/": {"secret": SECRET}}
    for shown in (repr(recipe), str(recipe), recipe.text, repr(recipe.document)):
        assert SECRET not in shown
    assert yaml.safe_load(recipe.text) == {
        "merge_method": "linear",
        "models": [
            {"model": "a", "parameters": {"weight": 1}},
            {"model": "b", "parameters": {"weight": 1}},
        ],
    }


@pytest.mark.parametrize(
    "options",
    [f"[{SECRET}]", SECRET, f"{{'s3://b/': {SECRET}}}", f"{{'s3://b/': {{}}, secret: {SECRET}}}"],
)
def test_storage_options_of_the_wrong_form_are_refused_unseen(options):
    with pytest.raises(RecipeError, match="storage_options") as raised:
        load_recipe(linear(f"storage_options: {options}"))
    assert SECRET not in str(raised.value)
    assert "storage_options: {" in (raised.value.fix or "")


def test_credentials_in_addresses_are_not_shown():
    recipe = load_recipe(linear("base_model: s3://key:hidden@bucket/base"))
    assert "hidden" not in repr(recipe) + str(recipe.base_model)

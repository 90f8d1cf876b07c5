"""From recipes to expressions over real, tiny checkpoints: roles, parameters by key, donors."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from distmerge.errors import (
    CheckpointError,
    CheckpointNotFound,
    ParameterError,
    RecipeError,
)
from distmerge.expressions.alignment import align
from distmerge.expressions.compiler import Compiler
from distmerge.expressions.nodes import Apply
from distmerge.expressions.program import Call
from distmerge.expressions.recipe import load_recipe

LAYERS = 5


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Directories base, a, b, c and org/a in the working directory: five layers, one embedding."""
    monkeypatch.chdir(tmp_path)
    names = [f"model.layers.{i}.{part}.weight" for i in range(LAYERS) for part in ("attn", "mlp")]
    for seed, name in enumerate(("base", "a", "b", "c", "org/a")):
        torch.manual_seed(seed)
        folder = tmp_path / name
        folder.mkdir(parents=True)
        tensors = {key: torch.randn(2, 3) for key in ["model.embed.weight", *names]}
        save_file(tensors, folder / "model.safetensors")
    return tmp_path


def build(method: str, names: list, **keys):
    listed = [{"model": n} if isinstance(n, str) else n for n in names]
    return load_recipe({"merge_method": method, "models": listed, **keys}).request()


def weighted(name: str, weight=1.0, **parameters):
    return {"model": name, "parameters": {"weight": weight, **parameters}}


def root_of(request) -> Apply:
    assert isinstance(request.root, Apply)
    return request.root


def names_of(request) -> list[str]:
    return [str(model) for model in root_of(request).models]


def parameters_at(request, key: str):
    """What the planner resolves for one key."""
    compiler = Compiler(request.root, align(request.root))
    call = compiler.program(key).steps[-1]
    assert isinstance(call, Call)
    return call.parameters


@pytest.mark.parametrize(
    ("listed", "index"),
    [
        ([weighted("a"), weighted("b")], 0),
        (["base", weighted("a"), weighted("b")], 0),
        ([weighted("a"), "./base/", weighted("b")], 1),
        ([weighted("a"), weighted("b"), "org/../base"], 2),
    ],
)
def test_a_base_that_is_taken_apart_is_dropped_from_the_models(models, listed, index):
    request = build("ties", listed, base_model="base")
    assert names_of(request) == ["a", "b"]
    assert str(root_of(request).base) == "base"
    assert root_of(request).base_index == index
    assert request.donor == root_of(request).base
    assert request.warnings == ()


def test_parameters_of_a_base_are_ignored_with_a_word(models):
    request = build("dare_ties", [weighted("base", 0.2), weighted("a", 0.3)], base_model="base")
    assert names_of(request) == ["a"]
    assert dict(root_of(request).parameters)["weight"] == (0.3,)
    (warning,) = request.warnings
    assert "weight of base is ignored" in warning


@pytest.mark.parametrize("method", ["ties", "sce", "ram"])
def test_a_base_that_is_listed_alone_is_copied_with_a_word(models, method):
    request = build(method, ["base"], base_model="base")
    assert str(request.root) == "base"
    (warning,) = request.warnings
    assert warning.endswith("base, the base, has nothing beside it: it is copied.")
    with pytest.raises(RecipeError, match="merges 2 models"):
        build("nuslerp", ["base"], base_model="base")


def test_linear_merges_a_listed_base_as_one_of_the_models(models):
    request = build("linear", [weighted("a", 2), weighted("base", 3)], base_model="base")
    assert names_of(request) == ["a", "base"]
    assert root_of(request).base is None
    assert root_of(request).base_index == 1
    assert root_of(request).base_listed
    assert str(request.donor) == "base"
    assert parameters_at(request, "model.embed.weight")["weight"] == [2.0, 3.0]


def test_linear_takes_an_unlisted_base_as_donor_only(models):
    request = build("linear", [weighted("a"), weighted("b")], base_model="base")
    assert names_of(request) == ["a", "b"]
    assert str(request.donor) == "base"
    assert not root_of(request).base_listed
    (warning,) = request.warnings
    assert "base is not merged, since it is not listed with its weight" in warning


@pytest.mark.parametrize(("method", "parameters"), [("linear", {"weight": 0.5}), ("median", {})])
def test_an_unlisted_base_whose_parameters_are_known_is_merged_last(models, method, parameters):
    request = build(method, ["a", "b"], base_model="base", parameters=parameters)
    assert names_of(request) == ["a", "b", "base"]
    assert root_of(request).base_index == 2
    assert root_of(request).base_listed
    assert request.warnings == ()


def test_without_a_base_the_first_model_is_the_donor(models):
    request = build("linear", [weighted("b"), weighted("a")], config_from="c", dtype="float16")
    assert str(request.donor) == "b"
    assert str(request.config_from) == "c"
    assert request.out_dtype == "F16"
    request = build("linear", [weighted("b")], dtype="float32", out_dtype="bfloat16", seed=9)
    assert (request.out_dtype, request.seed) == ("BF16", 9)


@pytest.mark.parametrize("listed", [["base", "a"], ["a", "base"], ["a"]])
def test_slerp_starts_at_its_base(models, listed):
    request = build("slerp", listed, base_model="base", parameters={"t": 0.3})
    assert (str(root_of(request).base), names_of(request)) == ("base", ["a"])
    assert request.warnings == ()


def test_slerp_without_a_base_starts_at_the_first_model_and_says_so(models):
    request = build("slerp", ["b", "a"], parameters={"t": 0.3})
    assert root_of(request).base is None
    assert names_of(request) == ["b", "a"]
    (warning,) = request.warnings
    assert warning == "slerp has no base_model: b, the first, is at t = 0."


def expected_gradient(values: list[float], layer: int) -> float:
    """t = i / (L - 1), linear in between."""
    place = layer / (LAYERS - 1) * (len(values) - 1)
    left = min(int(place), len(values) - 2)
    return values[left] + (values[left + 1] - values[left]) * (place - left)


def test_gradients_run_over_the_layers_and_filters_over_the_names(models):
    filters = [{"filter": "mlp", "value": [1, 0, "5e-1"]}, {"value": 0.25}]
    request = build(
        "ties",
        [weighted("a", [0, 1]), weighted("b", filters), weighted("c", {"filter": "*", "value": 3})],
        base_model="base",
    )
    for layer in range(LAYERS):
        for part in ("attn", "mlp"):
            b = expected_gradient([1, 0, 0.5], layer) if part == "mlp" else 0.25
            found = parameters_at(request, f"model.layers.{layer}.{part}.weight")
            assert found["weight"] == pytest.approx([layer / (LAYERS - 1), b, 3.0])
    assert parameters_at(request, "model.embed.weight")["weight"] == [0.0, 0.25, 3.0]


def test_a_models_own_parameters_come_before_the_general_ones(models):
    listed = [
        weighted("a", {"filter": "mlp", "value": 1}, density=0.5),
        {"model": "b"},
        weighted("c", 3),
    ]
    request = build(
        "ties",
        listed,
        base_model="base",
        parameters={"weight": [10, 20], "density": {"filter": "attn", "value": 0.2}},
    )
    attn = parameters_at(request, "model.layers.4.attn.weight")
    mlp = parameters_at(request, "model.layers.0.mlp.weight")
    assert attn["weight"] == [20.0, 20.0, 3.0]
    assert mlp["weight"] == [1.0, 10.0, 3.0]
    assert attn["density"] == [0.5, 0.2, 0.2]
    assert mlp["density"] == [0.5, 1.0, 1.0], "the method's default where nothing matches"


def test_scope_policies_and_passthrough_reach_the_expression(models):
    request = build(
        "ties",
        [weighted("a")],
        base_model="base",
        over="model",
        on_missing="base",
        passthrough=["lm_head", "score"],
    )
    root = root_of(request)
    assert dict(root.parameters)["over"] == "model"
    assert root.on_missing == "base"
    assert root.passthrough == {"lm_head", "score"}


def test_models_of_the_same_name_are_told_apart(models):
    request = build("linear", [weighted("a"), weighted("org/a")])
    assert names_of(request) == ["a", "org/a"]


def test_a_method_that_takes_further_checkpoints(models):
    listed = [{"model": "a", "fishers": "b"}, {"model": "base", "fishers": {"path": "c"}}]
    root = root_of(build("fisher", listed))
    assert [(name, [*map(str, leaves)]) for name, leaves in root.inputs] == [
        ("models", ["a", "base"]),
        ("fishers", ["b", "c"]),
    ]
    with pytest.raises(RecipeError, match="fisher needs 'fishers' for each model") as raised:
        build("fisher", [listed[0], "base"])
    assert raised.value.facts == ("nothing gives it for base",)


def test_a_method_from_a_file_takes_any_parameter(models):
    (models / "mine.py").write_text(
        "from distmerge.methods.declare import layer_merge\n"
        "@layer_merge\n"
        "def scaled(models, base, *, by: float = 2.0, **kw):\n"
        "    return base + by * (models[0] - base) + kw.get('shift', 0)\n"
    )
    request = build(
        "mine.py:scaled", ["a"], base_model="base", parameters={"by": "3e-1", "shift": 1}
    )
    assert dict(root_of(request).parameters) == {"by": 0.3, "shift": 1}


TWO_ADAPTERS = {"model": {"model": "a+b", "lora": "c"}}
ONE_OF = {"model": {"path": "a"}, "parameters": {"weight": 1}}


@pytest.mark.parametrize(
    ("kind", "method", "names", "keys", "headline"),
    [
        (RecipeError, "ties", [weighted("a")], {}, "ties needs a base_model."),
        (RecipeError, "linear", [], {}, "the recipe names no models."),
        (RecipeError, "ties", [], {"base_model": "base"}, "at least 1 model besides its base, not"),
        (RecipeError, "model_stock", ["a"], {"base_model": "base"}, "at least 2 models besides"),
        (RecipeError, "slerp", ["a", "b", "c"], {}, "slerp merges 2 models, not 3."),
        (RecipeError, "slerp", ["a", "b"], {"base_model": "base"}, "slerp merges 2 models, not 3."),
        (RecipeError, "slerp", ["a"], {}, "slerp merges 2 models, not 1."),
        (RecipeError, "nuslerp", ["a", "b", "c"], {}, "nuslerp merges 2 models, not 3."),
        (
            RecipeError,
            "nuslerp",
            ["a"],
            {"base_model": "base"},
            "2 models besides its base, not 1.",
        ),
        (RecipeError, "passthrough", ["a"], {"base_model": "base"}, "merges 1 model, not 2."),
        (RecipeError, "arcee_fusion", ["a"], {}, "arcee_fusion needs a base_model."),
        (RecipeError, "slerp", ["base"], {"base_model": "base"}, "slerp merges 2 models, not 1."),
        (RecipeError, "linear", [weighted("a"), weighted("./a/")], {}, "./a/ is listed twice"),
        (RecipeError, "linear", [weighted("a"), ONE_OF], {}, "a is listed twice"),
        (RecipeError, "linear", [TWO_ADAPTERS], {}, "a+b+c names two adapters."),
        (ParameterError, "ties", ["a", weighted("b")], {"base_model": "base"}, "ties needs 'weigh"),
        (ParameterError, "slerp", ["a", "b"], {"over": "tensor"}, "slerp has no parameter 'over'"),
        (
            ParameterError,
            "dare_ties",
            [weighted("a")],
            {"base_model": "b", "over": "model"},
            "over",
        ),
        (CheckpointNotFound, "linear", [weighted("./nope")], {}, "no file or directory './nope'"),
        (CheckpointError, "linear", [weighted("a"), weighted("empty")], {}, "empty"),
        (CheckpointError, "linear", [weighted("s3://k:s3cret@b/x")], {}, "carry credentials"),
    ],
)
def test_what_makes_no_sense(models, kind, method, names, keys, headline):
    (models / "empty").mkdir()
    with pytest.raises(kind) as raised:
        build(method, names, **keys)
    assert headline in raised.value.headline
    assert raised.value.fix
    assert "s3cret" not in str(raised.value)


def test_a_missing_parameter_that_is_misspelt_is_explained(models):
    text = "merge_method: linear\nmodels:\n  - model: a\n    parameters: {wieght: 1}\n"
    with pytest.raises(ParameterError, match="linear needs 'weight'") as raised:
        load_recipe(text).request()
    assert raised.value.facts[0] == "nothing gives it for a"
    assert raised.value.facts[1].endswith("it is ignored. Did you mean 'weight'?")


def test_a_missing_parameter_that_stands_in_the_wrong_place_is_explained(models):
    text = "merge_method: linear\nmodels:\n  - model: a\n    weight: 1\n"
    with pytest.raises(ParameterError, match="linear needs 'weight'") as raised:
        load_recipe(text).request()
    assert raised.value.facts == (
        "nothing gives it for a",
        "the recipe, line 4: 'weight' is ignored here; move it under this model's 'parameters:'.",
    )


def test_over_given_twice_must_agree(models):
    keys = {"base_model": "base", "over": "model", "parameters": {"weight": 1, "over": "tensor"}}
    with pytest.raises(ParameterError, match="'over' is given twice"):
        build("ties", ["a"], **keys)
    keys["parameters"]["over"] = "model"
    assert dict(root_of(build("ties", ["a"], **keys)).parameters)["over"] == "model"


def test_how_numbers_are_spelt_does_not_change_the_expression(models):
    one = build("ties", ["./base", weighted("a", [0, 1])], base_model="base")
    two = build("ties", ["base", weighted("a", ["0", 1.0])], base_model="base")
    other = build("ties", ["base", weighted("a", [0, 2])], base_model="base")
    assert one.root == two.root
    assert hash(one.root) == hash(two.root)
    assert one.root != other.root

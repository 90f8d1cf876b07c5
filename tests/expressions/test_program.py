"""Expressions specialised key by key: policies, problems told together, parameters as numbers."""

import pickle
from dataclasses import dataclass

import pytest
import torch
from methods.trees import apply, leaf, merge, merged, programs, subset

from distmerge.checkpoints.tensors import Checkpoint, FileInfo, TensorInfo
from distmerge.errors import (
    DtypeMismatch,
    KeyMismatch,
    ParameterError,
    RecipeError,
    ShapeMismatch,
)
from distmerge.expressions.alignment import align
from distmerge.expressions.compiler import Compiler
from distmerge.expressions.nodes import Apply, Binary, Leaf
from distmerge.expressions.problems import SHOWN
from distmerge.expressions.program import Call, Compute, Read, Same
from distmerge.methods.declare import layer_merge
from distmerge.methods.parameters import Fallback, Filtered, Gradient
from distmerge.methods.registry import find_method


def state(**values):
    """Tensors of five equal numbers."""
    return {key.replace("__", "."): torch.full((5,), float(v)) for key, v in values.items()}


def numbers(result):
    return {key: value[0].item() for key, value in result.items()}


TASK = {"weight": [1.0, 1.0]}
BASE = state(shared=1, base_only=2, base_and_first=3)
FIRST = state(shared=11, base_and_first=13, first_only=14, models_only=15)
SECOND = state(shared=21, models_only=25)


def task(on_missing="error", **fields):
    """1 + 10 + 20 where all have the key."""
    return apply(
        "task_arithmetic", [FIRST, SECOND], BASE, parameters=TASK, on_missing=on_missing, **fields
    )


# --- keys that some models lack


def test_missing_keys_are_refused_all_together():
    with pytest.raises(KeyMismatch, match="Models disagree on 4 keys") as caught:
        programs(task())
    assert caught.value.facts == (
        "base_only: not in model0, model1",
        "base_and_first: not in model1",
        "first_only: not in model1, base",
        "models_only: not in base",
    )
    assert "on_missing" in caught.value.fix


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("common", {"shared": 31}),
        ("base", {"shared": 31, "base_only": 2, "base_and_first": 3}),
        (
            "average",
            {
                "shared": 31,
                "base_only": 2,
                "base_and_first": 13,
                "first_only": 14,
                "models_only": 20,
            },
        ),
    ],
)
def test_policies_for_missing_keys(policy, expected):
    assert numbers(merged(task(policy))) == expected


@pytest.mark.parametrize("listed", [True, False])
def test_the_base_among_the_models_is_the_one_that_base_says(listed):
    """For a method that doesn't take it apart; without one, the first model."""
    node = apply(
        "linear",
        [FIRST, SECOND, BASE],
        parameters={"weight": 1.0},
        on_missing="base",
        base_index=2 if listed else 0,
        base_listed=listed,
    )
    base = BASE if listed else FIRST
    expected = {key: value[0].item() for key, value in base.items() if key != "shared"}
    assert numbers(merged(node)) == {"shared": 11, **expected}


def test_a_list_that_lacks_a_key_counts_as_missing():
    fishers = [state(w=1, v=1), state(w=3)]
    models = [state(w=1, v=10), state(w=5, v=20)]
    with pytest.raises(KeyMismatch) as caught:
        programs(apply("fisher", models, fishers=fishers))
    assert caught.value.facts == ("v: not in fisher1",)
    found = merged(apply("fisher", models, fishers=fishers, on_missing="average"))
    assert numbers(found) == {"w": 4.0, "v": 15.0}


def test_arithmetic_on_missing():
    left, right = leaf(BASE, "left"), leaf(FIRST, "right")
    with pytest.raises(KeyMismatch, match="Models disagree on 3 keys") as caught:
        programs(Binary("+", left, right))
    assert caught.value.facts == (
        "base_only: not in right",
        "first_only: not in left",
        "models_only: not in left",
    )
    found = merged(Binary("+", left, right, "common"))
    assert numbers(found) == {"shared": 12, "base_and_first": 16}
    assert numbers(merged(Binary("*", left, 2.0))) == {k: 2 * v for k, v in numbers(BASE).items()}


def test_what_a_child_leaves_out_its_parent_lacks():
    common = Binary("-", leaf(FIRST, "a"), leaf(BASE, "b"), "common")
    with pytest.raises(KeyMismatch) as caught:
        programs(Binary("+", leaf(BASE, "b"), common))
    assert caught.value.facts == ("base_only: not in (a - b)",)
    found = merged(Binary("+", leaf(BASE, "b"), common, "common"))
    assert numbers(found) == {"shared": 11, "base_and_first": 13}


def test_many_missing_keys_are_counted():
    many = {f"k{i}": torch.ones(1) for i in range(SHOWN + 5)}
    with pytest.raises(KeyMismatch, match=f"{SHOWN + 5} keys") as caught:
        programs(apply("median", [many, {}]))
    assert len(caught.value.facts) == SHOWN + 1
    assert caught.value.facts[-1] == "... and 5 more"


def test_integers_follow_the_policies_too():
    with_steps = {**state(w=1), "steps": torch.tensor(3)}
    without = state(w=2)
    with pytest.raises(KeyMismatch, match="1 key"):
        programs(apply("median", [with_steps, without]))
    for policy, kept in (("common", False), ("base", True), ("average", True)):
        found = programs(apply("median", [with_steps, without], on_missing=policy))
        assert ("steps" in found) == kept
    turned = programs(apply("median", [without, with_steps], on_missing="base"))
    assert "steps" not in turned, "the base lacks it"


# --- passed through


def test_passthrough_is_the_mean_of_the_models():
    node = task(passthrough=frozenset({"shared", "base_only", "base_and_first", "first_only"}))
    with pytest.raises(KeyMismatch) as caught:
        programs(node)
    assert caught.value.facts == ("models_only: not in base",)
    found = merged(task("common", passthrough=node.passthrough))
    assert numbers(found) == {"shared": 16, "base_only": 2, "base_and_first": 13, "first_only": 14}


def test_passthrough_takes_names_of_modules():
    models = [state(head__w=1, header__w=2, head=3, my__head__w=4), state(head__w=3, header__w=4)]
    models[1].update(state(head=5, my__head__w=6))
    node = apply("max_magnitude", models, models[0], passthrough=frozenset({"head"}))
    assert numbers(merged(node)) == {"head.w": 2, "header.w": 4, "head": 4, "my.head.w": 6}
    steps = {key: program.steps for key, program in programs(node).items()}
    calls = {k: any(isinstance(s, Call) for s in found) for k, found in steps.items()}
    assert calls == {"head.w": False, "header.w": True, "head": False, "my.head.w": True}


@pytest.mark.parametrize(("listed", "expected"), [(True, 16.0), (False, 11.0)])
def test_passthrough_leaves_out_a_base_among_the_models(listed, expected):
    models = [{"shared": m["shared"]} for m in (BASE, FIRST, SECOND)]
    node = apply(
        "median", models, passthrough=frozenset({"shared"}), base_index=0, base_listed=listed
    )
    assert merged(node)["shared"][0] == expected


def test_a_base_alone_with_a_head_gives_it():
    node = apply(
        "median",
        [state(w=1, head=7), state(w=2)],
        passthrough=frozenset({"head"}),
        base_index=0,
        base_listed=True,
    )
    assert numbers(merged(node)) == {"w": 1, "head": 7}


def test_what_is_not_read_need_not_fit():
    """The base's head has another shape: it isn't used, and no problem."""
    base = {"w": torch.ones(2), "head": torch.ones(3, 3)}
    models = [{"w": torch.ones(2), "head": torch.full((7,), v)} for v in (1.0, 3.0)]
    node = apply("max_magnitude", models, base, passthrough=frozenset({"head"}))
    assert merged(node)["head"].tolist() == [2.0] * 7
    assert programs(node)["head"].leaves == (1, 2)


# --- shapes and dtypes


def test_shapes_that_disagree_are_reported_together():
    base = {"a": torch.ones(2, 3), "b": torch.ones(4), "c": torch.ones(()), "d": torch.ones(1)}
    model = {"a": torch.ones(3, 2), "b": torch.ones(4), "c": torch.ones(1), "d": torch.ones(1)}
    with pytest.raises(ShapeMismatch, match="the shape of 2 tensors") as caught:
        programs(apply("max_magnitude", [model], base))
    assert caught.value.facts == (
        "a: 2 x 3 in base, 3 x 2 in model0",
        "c: scalar in base, 1 in model0",
    )


def test_shapes_do_not_broadcast():
    with pytest.raises(ShapeMismatch):
        programs(Binary("+", leaf(torch.ones(2, 3)), leaf(torch.ones(3))))


def test_floats_and_integers_are_reported_together():
    base = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.arange(2), "d": torch.arange(2)}
    model = {
        "a": torch.ones(2).half(),
        "b": torch.arange(2),
        "c": torch.ones(2),
        "d": torch.arange(2).int(),
    }
    with pytest.raises(DtypeMismatch, match="the kind of 3 tensors") as caught:
        programs(apply("max_magnitude", [model], base))
    assert caught.value.facts == (
        "b: F32 in base, I64 in model0",
        "c: I64 in base, F32 in model0",
        "d: I64 in base, I32 in model0",
    )


def test_an_integer_that_is_not_used_does_not_matter():
    """The key is selected from one side only."""
    left, right = leaf(state(a=1, b=2), "l"), leaf({"a": torch.arange(5), "b": torch.ones(5)}, "r")
    node = Binary("+", left, subset(right, "b"), "common")
    assert numbers(merged(node)) == {"b": 3.0}
    models = [left, subset(right, "b")]
    node = apply("linear", models, parameters={"weight": 1.0}, on_missing="base")
    assert numbers(merged(node)) == {"a": 1.0, "b": 1.5}


def test_what_is_no_tensor_is_named():
    with pytest.raises(DtypeMismatch, match="extra of model0 is dict"):
        programs(apply("median", [{**state(w=1), "extra": {}}]))
    with pytest.raises(DtypeMismatch, match=r"w of model0 is torch.complex128"):
        programs(apply("median", [torch.ones(2, dtype=torch.complex128)]))


# --- what a program is


def test_steps_that_nothing_needs_are_left_out():
    """on_missing: average uses one model; what the others would have been merged with is gone."""
    inner = apply("linear", [FIRST, SECOND], parameters={"weight": 1.0}, on_missing="base")
    found = programs(task("average"))["first_only"]
    assert found.steps == (Read(1),)
    assert programs(inner)["base_and_first"].steps == (Read(0),)
    assert programs(task("average"))["models_only"].steps == (
        Read(1),
        Read(2),
        Compute("+", 0, 1),
        Compute("/", 2, None, 2.0),
    )


def test_a_shared_expression_is_computed_once():
    base, model = leaf(state(w=1), "base"), leaf(state(w=3), "model")
    delta = Binary("-", model, base)
    found = programs(Binary("+", base, Binary("*", delta, delta)))["w"]
    kinds = [type(step).__name__ for step in found.steps]
    assert kinds == ["Read", "Read", "Compute", "Compute", "Compute"]
    assert found.leaves == (0, 1)


@pytest.mark.parametrize("policy", ["common", "base", "average"])
def test_keys_of_one_kind_share_steps_and_no_others(policy):
    integers = {"count": torch.ones(2, dtype=torch.int64)}
    heads = state(head__a=1, head__b=2, shared2=3)
    models = [m | heads | integers for m in (FIRST, SECOND)]
    filtered = {"weight": [1.0, Filtered((("2", 3.0), ("", 1.0)))]}
    for given in (TASK, filtered):
        root = apply(
            "task_arithmetic",
            models,
            BASE | heads | integers,
            parameters=given,
            on_missing=policy,
            passthrough=frozenset({"head"}),
        )
        together = programs(root)
        inputs = align(root)
        for key in inputs.keys:  # a compiler of its own knows no other key
            assert Compiler(root, inputs).program(key) == together.get(key)
        shares = together["shared"].steps is together["shared2"].steps
        assert shares == (given is TASK)


def test_copied_keys_are_one_step():
    models = [{"n": torch.arange(3)} for _ in range(3)]
    assert programs(apply("median", models))["n"].steps == (Same((0, 1, 2)),)
    base_only = apply("median", models, passthrough=frozenset({"n"}), base_listed=True)
    assert programs(base_only)["n"].steps == (Same((1, 2)),)


def test_keys_are_the_union_in_order_the_bases_first():
    found = programs(task("average"))
    assert list(found) == ["shared", "base_only", "base_and_first", "first_only", "models_only"]


def test_programs_travel():
    program = programs(apply("ties", [FIRST, FIRST], FIRST, parameters=TASK))["shared"]
    assert pickle.loads(pickle.dumps(program)) == program


def test_nodes_are_numbered_from_the_root_down():
    one = apply("slerp", [state(w=1), state(w=2)], parameters={"t": 0.5})
    two = apply("slerp", [state(w=1), one], parameters={"t": 0.5})
    root = Binary("+", apply("median", [two, one]), one)
    nodes = [s.node for s in programs(root)["w"].steps if isinstance(s, Call)]
    assert nodes == [2, 1, 0], "inner ones are computed first, and the shared one once"


def test_equal_nodes_have_one_number():
    """Equal expressions have equal values, random ones too."""
    models = [leaf(state(w=1), "a"), leaf(state(w=2), "b")]
    first, again = (apply("slerp", models, parameters={"t": 0.5}) for _ in range(2))
    other = apply("slerp", models, parameters={"t": 0.4})
    root = apply("median", [first, again, other])
    assert [s.node for s in programs(root)["w"].steps if isinstance(s, Call)] == [1, 1, 2, 0]


def test_parameters_of_any_kind():
    """A dict or tensor that a user's method takes has no hash, or no plain equality."""

    @layer_merge
    def method(models, *, table=None, scale=None):
        return models[0] * table["w"] * scale

    parameters = {"table": {"w": 2.0}, "scale": torch.full((5,), 3.0)}
    assert merge(method, [state(w=1)["w"]], parameters=parameters).tolist() == [6.0] * 5


@dataclass(frozen=True)
class Counting(Checkpoint):
    """Knows how often its tensors were gone through for the fingerprint."""

    counted: tuple = ()

    @property
    def fingerprint(self):
        COUNTED.append(self.url)
        return super().fingerprint


COUNTED: list[str] = []


def test_fingerprints_are_taken_once_whatever_the_number_of_keys():
    """Each goes through all tensors: once a key would be quadratic."""

    def checkpoint(name, count):
        infos = {f"k{i}": TensorInfo("F32", (1,), "m", 4 * i, 4 * i + 4) for i in range(count)}
        return Leaf.of(Counting(name, name, infos, {"m": FileInfo("m", 4 * count, name)}))

    for count in (3, 300):
        COUNTED.clear()
        models = (checkpoint("a", count), checkpoint("b", count))
        node = Apply(find_method("median"), (("models", models),))
        compiler = Compiler(node, align(node))
        assert all(compiler.program(f"k{i}") for i in range(count))
        assert sorted(COUNTED) == ["a", "b"]


# --- parameters


KEYS = {
    "wte": 0.0,
    "h.0.attn.w": 1.0,
    "h.0.mlp.w": 1.0,
    "h.1.attn.w": 1.0,
    "h.1.mlp.w": 1.0,
    "h.2.attn.w": 1.0,
    "h.2.mlp.w": 1.0,
}


def ones():
    return {key: torch.ones(2) for key in KEYS}


def resolved(value, method="slerp", name="t"):
    """key -> the parameter's value in its program."""
    count = 1 if method != "linear" else 2
    base = ones() if method != "linear" else None
    node = apply(method, [ones()] * count, base, parameters={name: value})
    (found,) = ({k: p.steps[-1].parameters[name] for k, p in programs(node).items()},)
    return found


def test_gradients_resolve_by_layer():
    assert list(resolved(Gradient((0, 1))).values()) == [0, 0, 0, 0.5, 0.5, 1, 1]


def test_filters_resolve_by_key():
    value = Filtered((("attn", Gradient((0.2, 0.4))), ("mlp", 0.9), (None, 0.5)))
    assert list(resolved(value).values()) == [0.5, 0.2, 0.9, pytest.approx(0.3), 0.9, 0.4, 0.9]


def test_levels_resolve_in_order():
    value = Fallback((Filtered((("attn", 0.1),)), Filtered((("h.1", 0.2),)), 0.3))
    assert list(resolved(value).values()) == [0.3, 0.1, 0.3, 0.1, 0.2, 0.1, 0.3]


def test_per_model_values_each_have_a_form():
    value = [Gradient((0, 1)), Filtered((("attn", 2.0), (None, 3.0)))]
    found = resolved(value, "linear", "weight")
    assert found["h.1.attn.w"] == [0.5, 2.0]
    assert found["wte"] == [0.0, 3.0]


def test_one_value_serves_every_model():
    assert resolved(0.25, "linear", "weight")["wte"] == [0.25, 0.25]
    assert resolved(Gradient((0, 1)), "linear", "weight")["h.2.mlp.w"] == [1.0, 1.0]


def test_values_reach_the_arithmetic():
    base, model = {k: torch.zeros(2) for k in KEYS}, ones()
    node = apply(
        "task_arithmetic", [model], base, parameters={"weight": Gradient((0, 1)), "lambda": 10}
    )
    assert list(numbers(merged(node)).values()) == [0, 0, 0, 5, 5, 10, 10]


def test_experts_and_towers_resolve_by_their_layers():
    keys = [f"model.layers.{i}.mlp.experts.{j}.w" for i in range(3) for j in range(8)]
    keys += [f"vision.layers.{i}.w" for i in range(5)] + ["decoder.block.0.w", "decoder.block.1.w"]
    tensors = {key: torch.ones(1) for key in keys}
    node = apply("slerp", [tensors], tensors, parameters={"t": Gradient((0, 1))})
    t = {key: p.steps[-1].parameters["t"] for key, p in programs(node).items()}
    assert [t[f"model.layers.{i}.mlp.experts.7.w"] for i in range(3)] == [0, 0.5, 1]
    assert [t[f"vision.layers.{i}.w"] for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [t["decoder.block.0.w"], t["decoder.block.1.w"]] == [0, 1]


def test_no_match_takes_the_default():
    value = Filtered((("attn", 0.1),))
    node = apply("ties", [ones()], ones(), parameters={"weight": 1.0, "density": value})
    found = {k: p.steps[-1].parameters["density"] for k, p in programs(node).items()}
    assert found["h.0.attn.w"] == [0.1]
    assert found["wte"] == [1.0]


def test_no_match_without_a_default_names_the_key():
    with pytest.raises(ParameterError, match="slerp needs 't', and nothing gives it for wte"):
        resolved(Filtered((("h.", 0.1),)))


def test_a_required_parameter_that_nobody_gave():
    with pytest.raises(ParameterError, match="linear needs 'weight'"):
        programs(apply("linear", [ones()]))


def test_copied_keys_need_no_parameters():
    tensors = {"h.0.w": torch.ones(1), "steps": torch.tensor(3)}
    node = apply("slerp", [tensors], tensors, parameters={"t": Filtered((("h.", 0.5),))})
    assert set(programs(node)) == {"h.0.w", "steps"}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (1.5, "less than or equal to 1"),
        (Gradient((0.0, 0.5, 1.5)), "less than or equal to 1"),
        (Filtered((("h.2.mlp", -1), (None, 0.5))), "greater than or equal to 0"),
        ("some", "valid number"),
        (float("nan"), "or equal to"),
    ],
)
def test_values_out_of_range_for_some_key(value, reason):
    with pytest.raises(ParameterError, match="slerp: t can't be") as caught:
        resolved(value)
    assert reason in str(caught.value)


def test_as_many_values_as_models():
    with pytest.raises(ParameterError, match="weight has 3 values for 2 models"):
        programs(apply("linear", [ones()] * 2, parameters={"weight": [1.0, 2.0, 3.0]}))


def test_unknown_parameters_are_refused():
    with pytest.raises(ParameterError, match="slerp has no parameter 'tt'"):
        programs(apply("slerp", [ones()] * 2, parameters={"t": 0.5, "tt": 1}))


def test_equal_numbers_of_different_types_stay_apart():
    """1, 1.0 and True are equal, and hash alike."""

    @layer_merge
    def method(models, *, mode=None):
        return models[0]

    values = {"h.0.attn": 1, "h.0.mlp": True, "h.1.attn": 1.0}
    node = apply(method, [ones()], parameters={"mode": Filtered(tuple(values.items()))})
    found = {k: p.steps[-1].parameters["mode"] for k, p in programs(node).items()}
    assert [type(found[k + ".w"]) for k in values] == [int, bool, float]
    assert found["wte"] is None


def test_open_keywords_resolve_like_declared_ones():
    @layer_merge
    def method(models, **kw):
        return sum(models) * kw.get("alpha", 100) + sum(kw["betas"])

    parameters = {
        "alpha": Filtered((("h.", Gradient((0, 1))),)),
        "betas": [Gradient((1, 2)), 1],
    }
    node = apply(method, [ones(), ones()], parameters=parameters)
    assert list(numbers(merged(node)).values()) == [202, 2, 2, 3.5, 3.5, 5, 5]


# --- how many models


@pytest.mark.parametrize(
    ("method", "count", "with_base", "message"),
    [
        ("slerp", 1, False, "slerp merges 2 model"),
        ("slerp", 3, False, "slerp merges 2 model"),
        ("slerp", 2, True, "slerp merges 2 models, not 3"),
        ("model_stock", 1, True, "model_stock merges at least 2"),
        ("ties", 2, False, "ties needs a base model"),
        ("max_magnitude", 2, False, "max_magnitude needs a base"),
    ],
)
def test_wrong_numbers_of_models(method, count, with_base, message):
    required = {"slerp": {"t": 0.5}, "ties": {"weight": 1.0}}.get(method, {})
    base = ones() if with_base else None
    with pytest.raises(RecipeError, match=message):
        programs(apply(method, [ones()] * count, base, parameters=required))


def test_a_users_own_slerp_takes_as_many_as_it_says():
    @layer_merge(name="slerp")
    def method(models):
        return sum(models)

    assert merge(method, [torch.ones(2)] * 3).tolist() == [3.0, 3.0]


def test_bounds_of_a_users_method():
    method = layer_merge(name="pair", models=(2, 3))(lambda models: models[0])
    for count in (2, 3):
        assert programs(apply(method, [ones()] * count))
    for count in (1, 4):
        with pytest.raises(RecipeError, match=f"pair merges 2 to 3 models, not {count}"):
            programs(apply(method, [ones()] * count))

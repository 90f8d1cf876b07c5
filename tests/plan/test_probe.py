"""Methods tried on small numbers before the run: claims, parameters, questions about the model."""

import pytest
import torch
from methods.trees import apply, programs

from distmerge.errors import MethodError, ParameterError
from distmerge.expressions.nodes import Binary
from distmerge.methods.cutoff import cutoff
from distmerge.methods.declare import layer_merge
from distmerge.methods.reductions import dots, largest, total
from distmerge.methods.trim import keep_above
from distmerge.plan.probe import asks_model

X, Y, Z = (torch.randn(9, 63, generator=torch.Generator().manual_seed(i)) for i in range(3))
REQUIRED = {
    "ties": {"weight": 1.0, "density": 0.5},
    "dare_ties": {"weight": 1.0, "density": 0.5},
    "dare_linear": {"weight": 1.0, "density": 0.5},
    "slerp": {"t": 0.5},
}


def asks(node, shape=(9, 63)):
    return asks_model(programs(node).values(), lambda program: shape)


# --- questions about the whole model


@pytest.mark.parametrize("method", ["ties", "model_stock"])
@pytest.mark.parametrize("over", ["tensor", "model"])
def test_scope_decides(method, over):
    parameters = {**REQUIRED.get(method, {}), "over": over}
    assert asks(apply(method, [X, Y], Z, parameters=parameters)) == (over == "model")


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "slerp"])
def test_questions_about_tensors_need_no_pass_over_the_model(method):
    models = [X] if method == "slerp" else [X, Y]
    assert not asks(apply(method, models, Z, parameters=REQUIRED[method]))


def test_methods_that_ask_nothing():
    assert not asks(apply("linear", [X, Y], parameters={"weight": 1.0}))
    assert not asks(Binary("+", apply("median", [X]), 1.0))
    assert not asks_model([])


def test_a_question_deep_inside_counts():
    """Behind another one, or under a node that asks nothing."""

    @layer_merge
    def later(models):
        yield total(models[0])
        size = yield largest(models[0], over="model")
        return models[0] / size

    inner = apply(later, [X])
    assert asks(inner)
    assert asks(apply("median", [inner, Y]))
    assert asks(apply("slerp", [Y, Binary("*", inner, 2.0)], parameters=REQUIRED["slerp"]))
    assert not asks(apply("slerp", [Y, X], parameters=REQUIRED["slerp"]))


def test_keys_that_do_not_merge_do_not_ask():
    base = {"head.w": X, "n": torch.arange(3)}
    node = apply(
        "model_stock",
        [base, base],
        base,
        parameters={"over": "model"},
        passthrough=frozenset({"head"}),
    )
    assert not asks(node)


def test_what_sees_whole_tensors_is_not_tried_and_may_ask():
    """It may rely on a shape that no small tensor has: better a pass too many."""

    @layer_merge(blocks=False)
    def heads(models):
        size = yield largest(models[0].view(12, 64, -1), over="model")
        return models[0] / size

    @layer_merge
    def plain(models):
        return models[0].view(12, 64, -1).flip(0).reshape(models[0].shape)

    assert asks(apply(heads, [torch.ones(768, 5)]), (768, 5))
    assert not asks(apply(plain, [torch.ones(768, 5)]), (768, 5))


# --- claims


def _softmax(models):
    return models[0].softmax(-1)


def _centred(models):
    return models[0] - models[0].mean()


def _sorted_rows(models):
    return models[0].sort(-1).values


def _flipped(models):
    return models[0].flip(0)


def _transcendental(models):
    """Bits differ with the width of a slice."""
    return models[0].exp().sin() + models[1].tanh() * models[0].cosh().log1p()


def _undefined(models):
    """NaN where random numbers are negative."""
    return models[0].log() + models[1].sqrt()


def _random(models, rng):
    return models[0] * (rng.uniform(models[0]) < 0.5)


def _of_its_own_dice(models):
    return models[0] + torch.rand_like(models[0])


@pytest.mark.parametrize(
    ("function", "rows", "elements"),
    [
        (_softmax, True, False),
        (_sorted_rows, True, False),
        (_centred, False, False),
        (_flipped, False, False),
        (_transcendental, True, True),
        (_undefined, True, True),
        (_random, True, True),
        (_of_its_own_dice, False, False),
    ],
)
def test_claims_are_tried(function, rows, elements):
    for blocks, holds in ((True, rows), ("elements", elements)):
        node = apply(layer_merge(blocks=blocks)(function), [X, Y])
        if holds:
            assert not asks(node)
            continue
        with pytest.raises(MethodError, match="says that it works on blocks") as caught:
            asks(node)
        assert function.__name__ in str(caught.value)
        assert "tried on 6 x 63 numbers, whole and as two halves" in str(caught.value)
    assert not asks(apply(layer_merge(function), [X, Y])), "no claim, nothing to try"


def _trimmed(models, base):
    delta = models[0] - base
    cut = yield cutoff(delta, keep=0.3)
    return base + keep_above(delta, cut)


def _norm_of_the_block(models, base):
    gram = yield dots([base])
    return models[0] / models[0].norm() * gram[0, 0]


@pytest.mark.parametrize("blocks", [None, True, "elements"])
def test_claims_of_methods_that_ask(blocks):
    """A function that yields has said that it works on pieces."""
    assert not asks(apply(layer_merge(blocks=blocks)(_trimmed), [X], Y))
    with pytest.raises(MethodError, match="_norm_of_the_block says that it works on blocks"):
        asks(apply(layer_merge(blocks=blocks)(_norm_of_the_block), [X], Y))


def test_rows_have_their_true_length():
    """A method may cut them into heads."""

    @layer_merge(blocks=True)
    def by_head(models):
        heads = models[0].view(-1, 12, 64)
        return (heads / heads.norm(dim=-1, keepdim=True)).view(models[0].shape)

    assert not asks(apply(by_head, [torch.ones(5, 768)]), (5, 768))
    assert not asks(apply(by_head, [torch.ones(3, 5, 768)]), (3, 5, 768))


def test_a_false_claim_inside_a_tree_is_found():
    wrong = layer_merge(blocks=True)(_centred)
    with pytest.raises(MethodError, match="_centred"):
        asks(apply("median", [X, Binary("+", apply(wrong, [Y]), 1.0)]))


def test_parameters_of_the_claim_are_the_nodes_own():
    @layer_merge(blocks=True)
    def sometimes(models, *, whole: bool):
        return models[0] - (models[0].mean() if whole else 0)

    assert not asks(apply(sometimes, [X], parameters={"whole": False}))
    with pytest.raises(MethodError):
        asks(apply(sometimes, [X], parameters={"whole": True}))


def test_a_method_that_fails_is_found_before_the_run():
    @layer_merge(blocks=True)
    def broken(models):
        return models[0] + models[7]

    with pytest.raises(MethodError, match="broken failed on w: IndexError"):
        asks(apply(broken, [X]))


def test_parameters_that_cannot_work_are_found_before_the_run():
    with pytest.raises(ParameterError, match="add up to zero"):
        asks(apply("linear", [X, Y], parameters={"weight": [0.5, -0.5]}))


def test_any_number_of_models():
    @layer_merge(blocks="elements")
    def mean(models):
        return sum(models) / len(models)

    assert not asks(apply(mean, [X] * 150))


def test_each_method_is_tried_once():
    calls = []

    @layer_merge(blocks="elements")
    def counted(models):
        calls.append(1)
        return models[0]

    few, many = ({f"k{i}": X for i in range(count)} for count in (1, 50))
    asks(apply(counted, [few]))
    tries = len(calls)
    asks(apply(counted, [many]))
    assert len(calls) == 2 * tries

"""Programs evaluated block by block: against whole tensors, and against what methods promise."""

import math
import threading
import time

import pytest
import torch
from methods.trees import apply, leaf, merge, merged, programs, subset, threads

from distmerge.errors import DtypeMismatch, MethodError, ParameterError
from distmerge.expressions.asked import Answered
from distmerge.expressions.compute_pool import ComputePool, one_torch_thread
from distmerge.expressions.eager import evaluate_eagerly
from distmerge.expressions.evaluate import Evaluation
from distmerge.expressions.model_questions import ModelQuestions
from distmerge.expressions.nodes import Binary
from distmerge.expressions.settle import settle
from distmerge.methods.cutoff import Cut, cutoff
from distmerge.methods.declare import layer_merge
from distmerge.methods.reductions import dots, largest, total
from distmerge.methods.trim import keep_above

LARGE = (9000, 63)
"""Three blocks; the first two of 4161 rows."""
LONG = (2, 300_000)
"""Rows longer than a block."""


def random(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def spike(at):
    """Zeros but for one element, in one of the three blocks."""
    x = torch.zeros(LARGE)
    x.view(-1)[at] = 1.0
    return x


# --- questions


@pytest.mark.parametrize("form", ["one", "list", "tuple", "empty list", "many times"])
def test_forms_of_asking(form):
    x = random(*LARGE)

    @layer_merge
    def scaled(models):
        (x,) = models
        if form == "one":
            size = yield largest(x)
        elif form == "list":
            size, low = yield [largest(x), largest(-x)]
            assert low > 0
        elif form == "tuple":
            (size,) = yield (largest(x),)
        elif form == "empty list":
            nothing = yield []
            assert nothing == []
            size = yield largest(x)
        else:
            size = yield largest(x)
            for _ in range(4):
                size = yield largest(x.clamp(max=size))
        return x / size

    assert torch.equal(merge(scaled, [x]), x / x.max())


def test_later_questions_follow_from_earlier_answers():
    """The standard deviation in two passes; the exact cut of what the first pass left."""
    x, n = random(*LARGE) + 5, math.prod(LARGE)

    @layer_merge
    def standardized(models):
        mean = (yield total(models[0])) / n
        centred = models[0] - mean
        gram = yield dots([centred])
        scaled = centred / math.sqrt(gram[0, 0] / n)
        cut = yield cutoff(scaled, keep=0.1)
        return keep_above(scaled, cut)

    found = merge(standardized, [x])
    expected = ((x.double() - x.double().mean()) / x.double().std(correction=0)).float()
    kept = expected.abs() >= expected.abs().flatten().kthvalue(n - n // 10 + 1).values
    assert (found != 0).sum() == kept.sum() == n // 10
    assert torch.allclose(found, expected * kept, atol=1e-5)


def test_a_generator_may_return_without_asking():
    @layer_merge
    def sometimes(models, *, ask: bool):
        if ask:
            yield total(models[0])
        return models[0]

    x = random(*LARGE)
    assert torch.equal(merge(sometimes, [x], parameters={"ask": False}), x)
    assert torch.equal(merge(sometimes, [x], parameters={"ask": True}), x)


def test_questions_are_asked_of_every_block_once_a_pass():
    """And the method is not run on blocks that are never asked for."""
    seen = []

    @layer_merge
    def method(models):
        yield total(models[0])
        seen.append(tuple(models[0].shape))
        return models[0]

    merge(method, [random(*LARGE)])
    assert sorted(seen) == [(9000 - 2 * 4161, 63), (4161, 63), (4161, 63)]


# --- broken promises


def by_block(x):
    """Something that differs from block to block."""
    return bool(x.any())


@layer_merge
def early_return(models):
    if not by_block(models[0]):
        return models[0]
    s = yield total(models[0])
    return models[0] * s


@layer_merge
def other_share(models):
    cut = yield cutoff(models[0], keep=0.1 if by_block(models[0]) else 0.9)
    return keep_above(models[0], cut)


@layer_merge
def other_scope(models):
    yield total(models[0], over="model" if by_block(models[0]) else "tensor")
    return models[0]


@layer_merge
def other_number(models):
    yield [total(models[0])] * (2 if by_block(models[0]) else 1)
    return models[0]


@layer_merge
def other_kind(models):
    yield largest(models[0]) if by_block(models[0]) else total(models[0])
    return models[0]


@layer_merge
def other_size(models):
    yield dots([models[0]] * (2 if by_block(models[0]) else 1))
    return models[0]


@layer_merge
def another_question(models):
    yield total(models[0])
    if by_block(models[0]):
        yield total(models[0])
    return models[0]


@pytest.mark.parametrize(
    "method",
    [
        *(early_return, other_share, other_scope, other_number, other_kind, other_size),
        another_question,
    ],
)
@pytest.mark.parametrize("at", [0, 300_000, 9000 * 63 - 1])
@pytest.mark.parametrize("count", [1, 3])
def test_blocks_that_are_asked_differently_are_an_error(method, at, count):
    with threads(count), pytest.raises(MethodError, match=method.name) as caught:
        merge(method, [spike(at)])
    assert "different questions of different blocks of w" in str(caught.value)


@pytest.mark.parametrize("said", [3, None, "x", torch.ones(2), [1, 2]])
def test_what_is_yielded_has_to_be_a_question(said):
    @layer_merge
    def method(models):
        yield said
        return models[0]

    with pytest.raises(MethodError, match=r"method yields what is no question for w"):
        merge(method, [random(3, 4)])


@pytest.mark.parametrize(
    ("wrong", "shown"),
    [
        (lambda x: x.t().contiguous(), r"\(63, 9\)"),
        (lambda x: x[:-1], r"\(8, 63\)"),
        (lambda x: x.sum(), r"\(\)"),
        (lambda x: x.view(-1), r"\(567,\)"),
        (lambda x: None, "NoneType"),
        (lambda x: [x], "list"),
        (lambda x: x.numpy(), "ndarray"),
        (lambda x: 1.0, "float"),
        (lambda x: torch.fft.fft(x), "complex64"),
        (lambda x: x.to_sparse(), "sparse_coo"),
        (lambda x: x.to("meta"), "a tensor without values"),
    ],
)
def test_results_that_do_not_fit_are_an_error(wrong, shown):
    @layer_merge
    def method(models):
        return wrong(models[0])

    with pytest.raises(MethodError, match=rf"method returned (torch\.)?{shown} for w") as caught:
        merge(method, [random(9, 63)])
    assert "(9, 63)" in str(caught.value)


@pytest.mark.parametrize("blocks", [False, "rows", "elements"])
@pytest.mark.parametrize("error", [IndexError, SystemExit])
def test_an_exception_names_method_and_key(blocks, error):
    @layer_merge(blocks=blocks)
    def broken(models):
        raise error("no")

    with pytest.raises(MethodError, match=rf"broken failed on w: {error.__name__}: no") as caught:
        merge(broken, [random(*LARGE)])
    assert isinstance(caught.value.__cause__, error)


def test_an_exception_after_a_question_names_method_and_key():
    @layer_merge
    def broken(models):
        yield total(models[0])
        raise ZeroDivisionError("no")

    with pytest.raises(MethodError, match="broken failed on w: ZeroDivisionError: no"):
        merge(broken, [random(*LARGE)])


def test_errors_of_our_own_stay_as_they_are():
    with pytest.raises(ParameterError, match="add up to zero"):
        merge("linear", [random(3), random(3)], parameters={"weight": [1.0, -1.0]})


def _adds(models, base):
    models[0] += base
    return models[0]


def _adds_to_base(models, base):
    return base.mul_(2)


def _asks_first(models, base):
    yield total(base)
    models[0].add_(1)
    return models[0]


def _through_a_view(models, base):
    models[0].view(-1)[:3] = 0
    return models[0]


def _fills_out(models, base):
    return torch.add(models[0], base, out=models[0])


@pytest.mark.parametrize(
    "function", [_adds, _adds_to_base, _asks_first, _through_a_view, _fills_out]
)
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("shape", [(5, 4), LARGE])
def test_writing_to_inputs_is_an_error_and_harms_nobody(function, blocks, shape):
    method = layer_merge(blocks=blocks)(function)
    x, base = random(*shape), random(*shape, seed=1)
    before = x.clone(), base.clone()
    with pytest.raises(MethodError, match=r"changes its inputs in place \(seen on w\)"):
        merge(method, [x], base)
    assert torch.equal(x, before[0])
    assert torch.equal(base, before[1])


@pytest.mark.parametrize("blocks", [False, True])
def test_writing_through_numpy_goes_unseen_but_harms_nobody(blocks):
    @layer_merge(blocks=blocks)
    def sly(models):
        models[0].numpy()[:] = 7
        return models[0]

    x = random(*LARGE)
    before = x.clone()
    merge(sly, [x])
    assert torch.equal(x, before)


def test_a_method_that_returns_its_input_shares_nothing():
    @layer_merge
    def first(models):
        return models[0]

    x = random(9, 63)
    merge(first, [x]).fill_(0)
    assert x.any()


def test_lists_are_fresh():
    @layer_merge
    def pops(models, base):
        models.pop()
        models.append(base)
        models.clear()
        return base

    x = random(9, 63)
    assert torch.equal(merge(pops, [random(9, 63, seed=1)], x), x)


# --- what a function is given


def test_a_function_without_base_gets_all_in_order():
    given = {}

    @layer_merge
    def method(models, base_index, layer_name, **kw):
        given.update(kw, base_index=base_index, layer_name=layer_name, count=len(models))
        return models[1]

    models = [random(3, 4, seed=i) for i in range(3)]
    found = merge(method, models, base_index=2, parameters={"alpha": 0.5})
    assert torch.equal(found, models[1])
    assert given == {"alpha": 0.5, "base_index": 2, "layer_name": "w", "count": 3}


def test_a_function_with_base_gets_it_apart():
    @layer_merge
    def method(models, base, **kw):
        assert kw == {"layer_name": "w"}
        assert len(models) == 2
        return base + models[1]

    models, base = [random(3, 4, seed=i) for i in range(2)], random(3, 4, seed=9)
    assert torch.equal(merge(method, models, base), base + models[1])


def test_an_optional_base_may_be_left_out():
    @layer_merge
    def method(models, base=None):
        return models[0] if base is None else base

    x, base = random(3, 4), random(3, 4, seed=1)
    assert torch.equal(merge(method, [x]), x)
    assert torch.equal(merge(method, [x], base), base)


def test_random_numbers_are_by_position_whatever_the_blocks():
    def noise(models, rng):
        return models[0] + rng.uniform(models[0])

    x = random(*LARGE)
    found = {
        blocks: merge(layer_merge(blocks=blocks)(noise), [x], seed=4)
        for blocks in (False, "rows", "elements")
    }
    assert torch.equal(found[False], found["rows"])
    assert torch.equal(found[False], found["elements"])
    assert not torch.equal(found[False], merge(layer_merge(noise), [x], seed=5))
    first, second = (found[False] - x).view(-1)[: 2 * 4161 * 63].chunk(2)
    assert first.ne(second).float().mean() > 0.9, "the second block's are not the first's"


def test_gradients_are_off_in_every_thread():
    seen = []

    @layer_merge(blocks=True)
    def method(models):
        seen.append(torch.is_grad_enabled())
        return models[0] * 2

    x = torch.nn.Parameter(random(*LARGE))
    assert not merge(method, [x]).requires_grad
    assert seen == [False] * 3


def test_under_inference_mode():
    with torch.inference_mode():
        x, y = random(*LARGE), random(*LARGE, seed=1)
        found = merge("linear", [x, y], parameters={"weight": [1.0, 1.0]})
        whole = merge(layer_merge(lambda models: models[0] + models[1]), [x, y])
    assert torch.allclose(found, (x + y) / 2)
    assert torch.equal(whole, x + y)


# --- whole tensors, rows and elements, in one another


@layer_merge
def centred(models):
    """Sees whole tensors."""
    return models[0] - models[0].mean()


@layer_merge(blocks="rows")
def unit_rows(models):
    return models[0] / models[0].norm(dim=-1, keepdim=True)


@layer_merge(blocks="elements")
def doubled(models):
    return models[0] * 2


@layer_merge(blocks=False)
def whole_asker(models):
    (x,) = models
    assert x.ndim == 2, "the whole tensor, in its shape"
    size = yield largest(x)
    return x.t().contiguous().t() / size


def test_rows_are_whole_however_many_blocks():
    for shape in (LARGE, LONG, (9,), (300_000,), (40, 30, 63)):
        x = random(*shape)
        with one_torch_thread():
            expected = x / x.norm(dim=-1, keepdim=True)
        assert torch.equal(merge(unit_rows, [x]), expected), shape


def test_a_row_method_sees_a_matrix_whatever_the_tensor():
    """Else it would mean something else for a small fused tensor than for a large one."""
    seen = set()

    @layer_merge(blocks=True)
    def method(models):
        seen.add(models[0].shape[1:])
        return models[0]

    for shape in ((2, 3, 63), (90, 100, 63), (5, 63)):
        merge(method, [random(*shape)])
    assert seen == {(63,)}


@pytest.mark.parametrize("shape", [(9, 63), LARGE, LONG])
@pytest.mark.parametrize(
    "chain",
    [
        (centred, doubled),
        (doubled, centred),
        (centred, unit_rows, doubled),
        (unit_rows, centred, unit_rows),
        (centred, centred),
        (whole_asker, unit_rows, centred),
        (doubled, whole_asker, doubled),
    ],
    ids=lambda chain: "-".join(method.name for method in chain),
)
def test_methods_in_methods_equal_one_after_the_other(shape, chain):
    x = random(*shape)
    node, step = leaf(x), x
    for method in chain:
        node = apply(method, [node])
        step = merge(method, [step])
    assert torch.equal(merged(node), step)


@pytest.mark.parametrize("shape", [(9, 63), LARGE])
def test_ties_of_a_slerp_of_a_task_vector_sum(shape):
    base, a, b, c = (random(*shape, seed=i) for i in range(4))
    weights = {"weight": [0.5, 0.5]}
    inner = apply("task_arithmetic", [a, b], base, parameters=weights)
    middle = apply("slerp", [c], inner, parameters={"t": 0.3})
    outer = apply("ties", [middle, a], base, parameters={**weights, "density": [0.3, 0.2]})

    one = merge("task_arithmetic", [a, b], base, parameters=weights)
    two = merge("slerp", [c], one, parameters={"t": 0.3})
    three = merge("ties", [two, a], base, parameters={**weights, "density": [0.3, 0.2]})
    assert torch.equal(merged(outer), three)


def test_nested_results_are_not_rounded_in_between():
    """Bfloat16 models: float32 until written."""
    x, y, z = (random(63, 63, seed=i, dtype=torch.bfloat16) for i in range(3))
    weights = {"weight": [0.3, 0.7]}
    node = apply("linear", [x, y], parameters=weights)
    found = merged(apply("linear", [node, z], parameters=weights))
    inner = merge("linear", [x.float(), y.float()], parameters=weights)
    once = merge("linear", [inner, z.float()], parameters=weights)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, once.bfloat16())
    twice = merge("linear", [inner.bfloat16(), z], parameters=weights)
    assert not torch.equal(found, twice)


def test_a_shared_node_and_equal_nodes():
    x, y = random(*LARGE), random(*LARGE, seed=1)
    once = apply("slerp", [x, y], parameters={"t": 0.5})
    again = apply("slerp", [x, y], parameters={"t": 0.5})
    value = merged(once)
    assert torch.equal(merged(Binary("+", once, once)), value + value)
    assert torch.equal(merged(Binary("+", once, again)), value + value)


def test_random_nodes_have_streams_of_their_own():
    """Equal ones have the same: they are one value."""
    base, x = leaf(torch.zeros(LARGE), "base"), leaf(torch.ones(LARGE), "x")

    def dare(weight):
        parameters = {"weight": [weight], "density": [0.5], "rescale": False}
        return apply("dare_linear", [x], base, parameters=parameters)

    assert not merged(Binary("-", dare(1.0), dare(1.0))).any()
    apart = merged(Binary("-", dare(1.0), Binary("/", dare(2.0), 2.0)))
    assert abs(apart.ne(0).double().mean() - 0.5) < 0.01


# --- arithmetic


@pytest.mark.parametrize("shape", [(), (5,), LARGE])
def test_operators(shape):
    x, y = random(*shape), random(*shape, seed=1)
    a, b = leaf(x), leaf(y)
    assert torch.equal(merged(Binary("+", a, b)), x + y)
    assert torch.equal(merged(Binary("-", a, b)), x - y)
    assert torch.equal(merged(Binary("*", a, b)), x * y)
    assert torch.equal(merged(Binary("/", a, b)), x / y)
    assert torch.equal(merged(Binary("+", 2, b)), 2 + y)
    assert torch.equal(merged(Binary("-", 1.5, b)), 1.5 - y)
    assert torch.equal(merged(Binary("/", 3.0, b)), 3.0 / y)
    assert torch.equal(merged(Binary("*", a, 0.3)), x * 0.3)
    assert torch.equal(merged(Binary("-", a, a)), torch.zeros(shape))


def test_dtypes_of_arithmetic():
    short, wide = random(63, dtype=torch.float16), random(63, seed=1, dtype=torch.float64)
    found = merged(Binary("+", leaf(short), leaf(wide)))
    assert found.dtype == torch.float16, "the first one's"
    assert torch.equal(found, (short.double() + wide).half())
    turned = merged(Binary("+", leaf(wide), leaf(short)))
    assert torch.equal(turned, wide + short.double())


# --- tensors that are copied


def test_integers_and_booleans_are_copied_when_equal():
    state = {"a": torch.ones(3), "steps": torch.tensor(7), "mask": torch.tensor([True, False])}
    other = {k: v.clone() for k, v in state.items()}
    found = merge("linear", [state, other], parameters={"weight": [1.0, 1.0]})
    assert list(found) == ["a", "steps", "mask"]
    assert torch.equal(found["steps"], torch.tensor(7))
    assert found["mask"].dtype == torch.bool
    found["steps"].fill_(0)
    assert state["steps"] == 7


@pytest.mark.parametrize("node", ["method", "arithmetic"])
def test_integers_that_differ_are_an_error(node):
    sides = [{"n": torch.tensor([1, 2])}, {"n": torch.tensor([1, 3])}]
    root = apply("median", sides) if node == "method" else Binary("+", *map(leaf, sides))
    with pytest.raises(DtypeMismatch, match=r"n is torch.int64 and differs"):
        evaluate_eagerly(root)


def test_numbers_leave_integers_alone():
    node = Binary("*", leaf({"n": torch.tensor([4]), "x": torch.tensor([4.0])}), 0.5)
    assert {k: v.tolist() for k, v in evaluate_eagerly(node).items()} == {"n": [4], "x": [2.0]}


# --- the whole model


@layer_merge
def to_unit_model(models):
    gram = yield dots(models, over="model")
    return models[0] / math.sqrt(gram[0, 0])


@layer_merge
def between(models):
    """One question about the tensor and one about the model, in one yield."""
    own, all_of_it = yield [largest(models[0].abs()), largest(models[0].abs(), over="model")]
    return models[0] * (own / all_of_it)


def model(*shapes):
    return {f"k{i}": random(*shape, seed=i) for i, shape in enumerate(shapes)}


def concatenated(state):
    return torch.cat([v.double().view(-1) for v in state.values()])


@pytest.mark.parametrize("count", [1, 3])
def test_one_answer_for_all_keys(count):
    state = model(LARGE, (7,), (0,), (), (3, 5))
    with threads(count):
        found = merged(apply(to_unit_model, [state]))
    norm = concatenated(state).norm().item()
    assert list(found) == list(state)
    for key, tensor in state.items():
        assert torch.allclose(found[key], tensor / norm, rtol=1e-6)
    assert abs(concatenated(found).norm() - 1) < 1e-6


def test_questions_of_both_scopes_in_one_yield():
    state = model(LARGE, (7, 3), (500,))
    found = merged(apply(between, [state]))
    top = max(v.abs().max() for v in state.values())
    for key, tensor in state.items():
        assert torch.allclose(found[key], tensor * (tensor.abs().max() / top))


def test_a_two_pass_question_over_the_model_beside_a_one_pass_one():
    @layer_merge
    def method(models):
        (x,) = models
        cut, size, own = yield [
            cutoff(x, keep=0.1, over="model"),
            total(x.abs(), over="model"),
            cutoff(x, keep=0.5),
        ]
        return keep_above(keep_above(x, cut), own) / size

    state = model(LARGE, (700, 3))
    found = merged(apply(method, [state]))
    everything = concatenated(state).abs()
    limit = everything.kthvalue(everything.numel() - everything.numel() // 10 + 1).values
    for key, tensor in state.items():
        kept = torch.where(tensor.double().abs() >= limit, tensor, 0) / everything.sum()
        assert torch.allclose(found[key], kept.float(), rtol=1e-6)


def test_model_questions_about_model_answers():
    """Inner nodes first; a node may ask again and again."""

    @layer_merge
    def twice(models):
        first = yield largest(models[0], over="model")
        second = yield largest(models[0] / first, over="model")
        return models[0] / first * second

    state = model((50, 3), LARGE)
    node = apply(twice, [apply(to_unit_model, [apply(between, [state])])])
    expected = merged(apply(to_unit_model, [merged(apply(between, [state]))]))
    top = max(v.max() for v in expected.values())
    for key, found in merged(node).items():
        assert torch.allclose(found, expected[key] / top, rtol=1e-6)


def test_only_keys_that_the_method_merges_count():
    loud = {"head": torch.full((9,), 1e6), "body": torch.ones(9)}
    node = apply(to_unit_model, [loud], passthrough=frozenset({"head"}))
    assert torch.allclose(merged(node)["body"], torch.full((9,), 1 / 3.0))
    alone = merged(apply(to_unit_model, [subset(loud, "body")]))
    assert list(alone) == ["body"]
    assert torch.allclose(alone["body"], torch.full((9,), 1 / 3.0))


def test_a_key_need_not_ask():
    @layer_merge
    def matrices_only(models):
        if models[0].ndim < 2:
            return models[0]
        size = yield largest(models[0], over="model")
        return models[0] / size

    state = {"a": random(5, 5), "b": torch.full((5,), 100.0), "c": random(5, 5, seed=1)}
    found = merged(apply(matrices_only, [state]))
    top = torch.cat([state["a"], state["c"]]).max()
    assert torch.equal(found["b"], state["b"])
    assert torch.equal(found["c"], state["c"] / top.item())


# --- one evaluation by itself


def reader(*tensors):
    return lambda index, span: tensors[index].view(-1)[span[0] : span[1]]


def one_program(node):
    (program,) = programs(node).values()
    return program


def test_known_answers_need_no_questions():
    """As on a worker that joins after the questions were answered."""
    x = random(*LARGE)
    known = {(0, 0, 0): Answered(dots([x]).finish([4.0], None))}
    evaluation = Evaluation(one_program(apply(to_unit_model, [x])), LARGE, model_answers=known)
    assert torch.equal(evaluation.block(2, reader(x)).view(-1, 63), x[2 * 4161 :] / 2)


def test_blocks_may_come_in_any_order():
    """Sums of floats are folded in the order of the blocks all the same."""
    x = torch.zeros(LARGE)
    x.view(-1)[[0, 4161 * 63, 2 * 4161 * 63]] = torch.tensor([1e16, -1e16, 1.0])

    @layer_merge
    def plus_total(models):
        sum_ = yield total(models[0])
        return models[0] + sum_

    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        evaluation = Evaluation(one_program(apply(plus_total, [x])), LARGE)
        assert [evaluation.block(b, reader(x)) for b in order] == [None] * 3
        assert evaluation.advance()
        assert evaluation.block(2, reader(x))[-1] == 1.0, "(1e16 - 1e16) + 1, not (1 - 1e16) + 1e16"


def test_what_is_said_about_the_model_is_light():
    """It is sent to the driver: no block in it."""
    x = random(*LARGE)
    evaluation = Evaluation(one_program(apply(to_unit_model, [x])), LARGE)
    pool = ComputePool(1)
    assert settle([evaluation], [reader(x)], pool) == {}
    ((question, partial),) = evaluation.model_partials.values()
    assert question.operands == ()
    assert abs(partial[0] - (x.double() ** 2).sum()) < 1e-6
    questions = ModelQuestions()
    assert questions.fold([evaluation.model_partials])
    assert not questions.fold([])


def test_a_sample_is_looked_at_only_where_it_pays():
    large = one_program(apply("ties", [random(3)], random(3), parameters={"weight": [1.0]}))
    assert Evaluation(large, (1 << 20,)).sampled
    assert not Evaluation(large, (1 << 19,)).sampled
    plain = one_program(apply("linear", [random(3)], parameters={"weight": [1.0]}))
    assert not Evaluation(plain, (1 << 20,)).sampled


@pytest.mark.parametrize("order", ["random", "sorted"])
def test_the_cut_is_exact_where_a_sample_was_taken(order):
    """Sorted, the sample misleads."""
    x = 1 + 0.1 * torch.rand(1 << 20, generator=torch.Generator().manual_seed(0))
    x = x.sort().values if order == "sorted" else x
    parameters = {"weight": [1.0], "density": [0.3]}
    found = merge("ties", [x], torch.zeros_like(x), parameters=parameters)
    k = int(0.3 * x.numel())
    value = x.kthvalue(x.numel() - k + 1).values
    assert torch.equal(found[x != value], torch.where(x > value, x, 0)[x != value])
    equal, above = int((x == value).sum()), int((x > value).sum())
    expected = (k - above) / equal
    assert Cut(value.item(), expected).share > 0
    assert abs(int((found[x == value] != 0).sum()) - (k - above)) <= 3 * equal**0.5


# --- threads


def test_torch_is_kept_to_one_thread_and_given_back():
    seen = set()

    @layer_merge(blocks=True)
    def method(models):
        seen.add((threading.current_thread().name, torch.get_num_threads()))
        return models[0]

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threads(3):
            merge(method, [random(*LARGE)])
        assert torch.get_num_threads() == 2
        merge(method, [random(3, 4)])
        assert {count for _, count in seen} == {1}
    finally:
        torch.set_num_threads(before)


def test_two_callers_at_once_each_keep_torch_to_one_thread():
    """torch's number of threads is each thread's own."""
    entered, inside, counts = threading.Event(), threading.Event(), []

    def other():
        torch.get_num_threads()
        torch.set_num_threads(2)
        entered.set()
        inside.wait()
        with one_torch_thread():
            counts.append(torch.get_num_threads())
        counts.append(torch.get_num_threads())

    before = torch.get_num_threads()
    second = threading.Thread(target=other)
    second.start()
    entered.wait()
    with one_torch_thread():
        inside.set()
        second.join()
        pool = ComputePool(2)
        counts += pool.map(lambda _: torch.get_num_threads(), range(8))
        pool.close()
    assert counts == [1, 2, *[1] * 8]
    assert torch.get_num_threads() == before


def test_a_pool_keeps_order_and_raises_what_was_raised():
    pool = ComputePool(3)
    assert pool.map(lambda i: i * i, range(1000)) == [i * i for i in range(1000)]
    with pytest.raises(ZeroDivisionError):
        pool.map(lambda i: 1 // (500 - i), range(1000))
    together = threading.Barrier(3)

    def fail(i):
        together.wait()
        time.sleep(0.05 * (2 - i))
        raise ValueError(str(i))

    with pytest.raises(ValueError, match="0"):
        pool.map(fail, range(3))

    def give_up(i):
        together.wait()
        if threading.current_thread() is not threading.main_thread():
            raise SystemExit(i)

    with pytest.raises(SystemExit):
        pool.map(give_up, range(3))
    assert pool.map(lambda i: -i, [3]) == [-3]
    assert pool.map(lambda i: i, []) == []
    pool.close()

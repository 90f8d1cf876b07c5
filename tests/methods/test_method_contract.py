"""What every registered method keeps to, tried on all of them: see `cases`."""

import pickle
from contextlib import nullcontext
from functools import lru_cache

import numpy as np
import pytest
import torch
from methods.by_hand import blocks_of, merge_by_hand
from methods.cases import CASES, Case
from methods.trees import plain_loops, threads

from distmerge.methods.registry import find_method, method_names

LARGE = (33_300, 63)
"""Nine blocks, the last one short, of rows that fill no vector register."""
SMALL = (37, 63)


def those(condition):
    """Only cases for which a promise makes sense."""
    return pytest.mark.parametrize("case", [c for c in CASES if condition(c)], ids=str)


def has(name):
    return lambda case: name in find_method(case.method).parameters


def each(given, function):
    """Every tensor of a case's changed."""

    def change(value):
        if isinstance(value, list):
            return [function(x) for x in value]
        return None if value is None else function(value)

    return {name: change(value) for name, value in given.items()}


def replaced(given, model, change):
    """With one model's tensor changed by a function of it."""
    models = [change(m.clone()) if i == model else m for i, m in enumerate(given["models"])]
    return {**given, "models": models}


def large(case):
    return _large(case.count, case.base, case.fishers)


@lru_cache(maxsize=2)
def _large(count, base, fishers):
    return Case("", count, base, fishers).tensors(LARGE)


def by_name(keys):
    """{"models": [{key: tensor}, ...], ...} from {key: {"models": [tensor, ...], ...}}."""
    result = {}
    for name, value in next(iter(keys.values())).items():
        if isinstance(value, list):
            places = range(len(value))
            result[name] = [{key: given[name][i] for key, given in keys.items()} for i in places]
        else:
            tensors = {key: given[name] for key, given in keys.items()}
            result[name] = None if value is None else tensors
    return result


def in_ulps(found, expected):
    """The largest difference, in units of the larger one's last place."""
    step = torch.finfo(expected.dtype).eps * 2.0 ** torch.floor(torch.log2(expected.abs()))
    return float(((found - expected).abs() / step).nan_to_num(0.0).max())


@pytest.fixture(params=["fused", "plain"])
def loops(request):
    if request.param == "fused":
        yield
    else:
        with plain_loops():
            yield


def test_every_builtin_method_is_tried():
    builtin = {name for name in method_names() if find_method(name).builtin}
    assert builtin == {case.method for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=str)
class TestEveryMethod:
    # --- blocks

    def test_large_tensors_equal_their_blocks_bit_by_bit(self, case):
        """However many threads evaluate them."""
        given = large(case)
        assert len(blocks_of(LARGE)) >= 8
        method = find_method(case.method)
        expected = merge_by_hand(method, case.parameters, {"w": given}, seed=3)["w"]
        for count in (1, 3):
            with threads(count):
                assert torch.equal(case.merge(**given, seed=3).view(-1), expected)

    # --- values

    def test_the_order_of_models_does_not_matter(self, case):
        if "density" in case.parameters and case.random:
            case = case.per_model("density", 1.0)  # random masks belong to places in the list
        given, order = case.tensors(SMALL), np.random.default_rng(1).permutation(case.count)
        order = order[::-1] if case.count == 2 and order[0] == 0 else order
        turned = case.with_parameters(
            **{n: [v[i] for i in order] for n, v in case.parameters.items() if isinstance(v, list)}
        )
        if case.method == "slerp" and not case.base:
            turned = case.with_parameters(t=1 - case.parameters["t"])
        models = [given["models"][i] for i in order]
        fishers = given["fishers"] and [given["fishers"][i] for i in order]
        found = turned.merge(models, given["base"], fishers)
        assert torch.allclose(found, case.merge(**given), rtol=1e-5, atol=1e-5)

    def test_copies_of_one_model_give_that_model(self, case):
        given = case.tensors(SMALL)
        model = given["models"][0]
        if has("lambda")(case):
            case = case.with_parameters(**{"lambda": 1.0})
        if has("weight")(case):
            case = case.per_model("weight", 1 / case.count)
        base = model.clone() if case.base else None
        copies = [model.clone() for _ in range(case.count)]
        found = case.merge(copies, base, given["fishers"])
        if case.base and case.method not in ("slerp", "model_stock"):
            assert torch.equal(found, model), "nothing is added to the base"
        # The weights of Fisher's mean are multiplied in and divided out again.
        assert in_ulps(found, model) <= (4 if case.fishers else 1)

    def test_one_seed_one_result(self, case):
        given = case.tensors(SMALL)
        first = case.merge(**given, seed=1)
        assert torch.equal(first, case.merge(**given, seed=1))
        assert torch.equal(first, case.merge(**given, seed=2)) != case.random

    # --- values that are no numbers, or nothing

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_what_is_not_finite_stays_where_it_is(self, case, value, loops):
        at = (5, 62)
        if "density" in case.parameters:
            case = case.per_model("density", 0.9)
        if "epsilon" in case.parameters and case.random:
            case = case.per_model("epsilon", 0.05)
        given = case.tensors(SMALL)
        clean, elsewhere = case.merge(**given), torch.ones(SMALL, dtype=torch.bool)
        elsewhere[at] = False

        def put(tensor):
            tensor[at] = value
            return tensor

        for model in range(case.count):
            found = case.merge(**replaced(given, model, put))
            assert found[elsewhere].isfinite().all()
            assert case.method == "median" or not found[at].isfinite()
            changed = elsewhere.clone()
            if case.lines:  # what stands in the same row or column may change
                changed[at[0] if case.lines == "rows" else (slice(None), at[1])] = False
            moved = (found - clean).abs()[changed]
            if case.sums or case.cuts:
                # The one element is left out of sums and counts: the others hardly change, but
                # for those at a threshold.
                assert (moved > 1e-3).sum() <= 2 * case.count * case.cuts
            else:
                assert not moved.any()

    def test_zeros_give_zeros(self, case):
        assert not case.merge(**each(case.tensors(SMALL), torch.zeros_like)).any()

    def test_zero_models_beside_a_base(self, case):
        given = case.tensors(SMALL)
        zeros = {**given, "models": [torch.zeros(SMALL) for _ in given["models"]]}
        assert case.merge(**zeros).isfinite().all()

    # --- shapes and dtypes

    @pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)])
    def test_empty_tensors(self, case, shape):
        found = case.merge(**case.tensors(shape))
        assert found.shape == shape
        assert found.dtype == torch.float32

    def test_scalars(self, case):
        given = case.tensors(())
        found = case.merge(**given)
        assert found.shape == ()
        assert torch.equal(found, case.merge(**each(given, lambda x: x.view(1)))[0])

    def test_dimensions_do_not_matter(self, case):
        """A tensor of three dimensions is merged as the matrix with the same rows."""
        if case.lines == "columns":
            return  # whose columns are others
        matrix, cube = case.tensors((24, 63)), case.tensors((4, 6, 63))
        assert torch.equal(case.merge(**cube).view(24, 63), case.merge(**matrix))

    def test_float64_stays_float64(self, case):
        """Float32 arithmetic on the way would leave float32's digits."""
        found = case.merge(**case.tensors(SMALL, dtype=torch.float64))
        assert found.dtype == torch.float64
        assert not torch.equal(found, found.float().double())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_short_floats_are_merged_in_float32_and_rounded_once(self, case, dtype):
        given = case.tensors(SMALL, dtype=dtype)
        found = case.merge(**given)
        assert found.dtype == dtype
        assert torch.equal(found, case.merge(**each(given, torch.Tensor.float)).to(dtype))

    def test_the_dtype_is_that_of_the_base_or_the_first_model(self, case):
        given = case.tensors(SMALL)
        if case.base:
            given["base"] = given["base"].bfloat16()
        else:
            given["models"][0] = given["models"][0].bfloat16()
        assert case.merge(**given).dtype == torch.bfloat16

    # --- manners

    @pytest.mark.parametrize("plain", [False, True], ids=["fused", "plain"])
    @pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
    def test_inputs_are_left_alone(self, case, shape, plain):
        given = case.tensors(shape)
        before = each(given, torch.clone)
        with plain_loops() if plain else nullcontext():
            case.merge(**given).fill_(7.0)
        for name, value in given.items():
            pairs = zip(value, before[name], strict=True) if isinstance(value, list) else []
            assert all(torch.equal(x, y) for x, y in pairs)
        assert given["base"] is None or torch.equal(given["base"], before["base"])

    def test_strided_inputs_and_parameters_of_modules(self, case):
        given = case.tensors(SMALL)
        strided = each(given, lambda x: torch.nn.Parameter(x.t().contiguous().t()))
        found = case.merge(**strided)
        assert not found.requires_grad
        assert torch.equal(found, case.merge(**given))

    def test_pickled_it_is_the_same_method(self, case):
        method = find_method(case.method)
        assert pickle.loads(pickle.dumps(method)) is method


@those(lambda case: find_method(case.method).generator)
def test_fused_and_plain_loops_agree(case):
    """Bit by bit; those that add floats up in another order to a few units in the last place."""
    given = large(case)
    fused = case.merge(**given, seed=3)
    with plain_loops():
        plain = case.merge(**given, seed=3)
    if case.sums:
        assert torch.allclose(fused, plain, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(fused, plain)


@those(lambda case: case.parameters.get("over") != "model")
def test_several_keys_are_as_each_alone(case):
    keys = {name: case.tensors(SMALL, seed=i) for i, name in enumerate(["a", "b", "w"])}
    together = case.merge(**by_name(keys))
    assert list(together) == ["a", "b", "w"]
    for name, given in keys.items():
        alone = case.merge(**by_name({name: given}))
        assert torch.equal(alone[name] if name != "w" else alone, together[name])


@those(lambda case: case.parameters.get("over") == "model")
@pytest.mark.parametrize("count", [1, 3])
def test_several_keys_over_the_model_equal_their_blocks_bit_by_bit(case, count):
    shapes = {"a": LARGE, "b": SMALL, "c": (5000, 63)}
    keys = {key: case.tensors(shape, seed=shape[0]) for key, shape in shapes.items()}
    expected = merge_by_hand(find_method(case.method), case.parameters, keys, seed=3)
    with threads(count):
        found = case.merge(**by_name(keys), seed=3)
    for name, tensor in found.items():
        assert torch.equal(tensor.view(-1), expected[name])


@those(lambda case: case.base and case.method not in ("slerp", "nearswap", "arcee_fusion"))
def test_copies_of_a_fine_tune_give_it(case):
    """With nothing dropped and weights that add up to one."""
    if has("density")(case):
        case = case.per_model("density", 1.0)
    if has("weight")(case):
        case = case.per_model("weight", 1 / case.count)
    if has("lambda")(case):
        case = case.with_parameters(**{"lambda": 1.0})
    if case.method == "sce":
        case = case.with_parameters(select_topk=1.0)  # they don't differ anywhere
    if case.method in ("ram", "ramplus_tl"):
        case = case.with_parameters(epsilon=0.0)
    given = case.tensors(SMALL)
    model = given["models"][0]
    found = case.merge([model] * case.count, given["base"])
    scale = torch.maximum(model.abs(), given["base"].abs())
    assert ((found - model).abs() <= 2 * torch.finfo(torch.float32).eps * scale).all()


@those(has("lambda"))
def test_lambda_zero_gives_the_base(case):
    given = case.tensors(SMALL)
    found = case.with_parameters(**{"lambda": 0.0}).merge(**given)
    assert torch.equal(found, given["base"])


@those(lambda case: case.method == "slerp")
def test_slerp_ends_at_its_ends(case):
    given = case.tensors(SMALL)
    first, last = [given["base"], *given["models"]] if case.base else given["models"]
    assert torch.equal(case.with_parameters(t=0.0).merge(**given), first)
    assert torch.equal(case.with_parameters(t=1.0).merge(**given), last)


@those(lambda case: case.fishers or has("weight")(case))
def test_a_model_of_weight_zero_does_not_matter(case):
    given = case.tensors(SMALL)
    if case.fishers:
        given["fishers"][1] = torch.zeros(SMALL)
    else:
        weight = [0.0 if i == 1 else w for i, w in enumerate(case.parameters["weight"])]
        case = case.with_parameters(weight=weight)
    other = replaced(given, 1, lambda m: 50 * m.flip(0) - 3)
    assert torch.equal(case.merge(**given), case.merge(**other))

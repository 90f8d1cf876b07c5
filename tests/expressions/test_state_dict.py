"""State dicts that compute at once, against plain torch."""

from __future__ import annotations

import copy
import json
import operator
import pickle

import numpy as np
import pytest
import small_models
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from distmerge.errors import (
    DtypeMismatch,
    KeyMismatch,
    OutputExists,
    ParameterError,
    RecipeError,
    ShapeMismatch,
)
from distmerge.expressions.state_dict import StateDict
from distmerge.write.verify import verify

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
IN_PLACE = {"+": operator.iadd, "-": operator.isub, "*": operator.imul, "/": operator.itruediv}


@pytest.fixture
def base():
    return small_models.gpt2(0)


@pytest.fixture
def other(base):
    return small_models.gpt2(1, near=base)


def assert_same(found, expected):
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


def unchanged(model, before):
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# Arithmetic -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", OPERATORS)
@pytest.mark.parametrize(
    ("left_is", "right_is"),
    [("state dict", kind) for kind in ("state dict", "dict", "module", "pipeline")]
    + [(kind, "state dict") for kind in ("dict", "module", "pipeline")],
)
def test_operands_of_every_kind_on_both_sides(base, other, sign, left_is, right_is):
    a, b = small_models.weights(base), small_models.weights(other)

    def shown_as(kind, model, tensors):
        made = {
            "state dict": lambda: StateDict(tensors),
            "dict": lambda: dict(tensors),
            "module": lambda: model,
            "pipeline": lambda: transformers.TextGenerationPipeline(
                model=model, tokenizer=small_models.tokenizer(), device="cpu"
            ),
        }
        return made[kind]()

    found = OPERATORS[sign](shown_as(left_is, base, a), shown_as(right_is, other, b))
    assert isinstance(found, StateDict)
    assert_same(found, {key: OPERATORS[sign](a[key], b[key]) for key in a})
    assert unchanged(base, a)
    assert unchanged(other, b)


NUMBERS = {
    "int": 3,
    "float": -0.3,
    "numpy float32": np.float32(0.7),
    "numpy int64": np.int64(5),
    "numpy array": np.array(1.7),
    "0-d tensor": torch.tensor(0.3),
    "0-d float64 tensor": torch.tensor(0.3, dtype=torch.float64),
    "0-d integer tensor": torch.tensor(2),
    "0-d parameter": nn.Parameter(torch.tensor(0.3)),
}


@pytest.mark.parametrize("sign", OPERATORS)
@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_numbers_on_both_sides(base, sign, number):
    tensors = small_models.weights(base)
    plain = number.item() if hasattr(number, "item") else number
    sd = StateDict(tensors)
    apply = OPERATORS[sign]
    assert_same(apply(sd, number), {k: apply(v, plain) for k, v in tensors.items()})
    assert_same(apply(number, sd), {k: apply(plain, v) for k, v in tensors.items()})


@pytest.mark.parametrize("sign", OPERATORS)
@pytest.mark.parametrize("shape", [(4,), (1,), (3, 1), (3, 4)], ids=str)
@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_tensors_that_broadcast_on_both_sides(sign, shape, kind):
    entries = {"a": torch.rand(3, 4) + 1, "b": torch.rand(2, 3, 4) + 1}
    operand = torch.rand(shape) + 1
    given = operand if kind == "tensor" else operand.numpy()
    apply = OPERATORS[sign]
    sd = StateDict(entries)
    assert_same(apply(sd, given), {k: apply(v, operand) for k, v in entries.items()})
    assert_same(apply(given, sd), {k: apply(operand, v) for k, v in entries.items()})


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4, 5), (4, 3)], ids=str)
def test_a_tensor_that_would_change_an_entrys_shape_is_refused(shape):
    with pytest.raises(ShapeMismatch, match="bias"):
        StateDict(bias=torch.ones(1, 4)) * torch.ones(shape)


@pytest.mark.parametrize("sign", IN_PLACE)
@pytest.mark.parametrize("operand", ["module", "number", "tensor", "itself"])
def test_in_place_forms_change_the_dict_and_nothing_else(base, other, sign, operand):
    before, others = small_models.weights(base), small_models.weights(other)
    sd = StateDict.from_model(base)
    name, entries = sd, dict(sd)
    given = {
        "module": other,
        "number": 0.5,
        "tensor": torch.full((1,), 0.5),
        "itself": sd,
    }[operand]
    sd = IN_PLACE[sign](sd, given)
    assert sd is name
    right = others if operand == "module" else before
    expected = {
        key: OPERATORS[sign](before[key], right[key] if operand in ("module", "itself") else 0.5)
        for key in before
    }
    assert_same(sd, expected)
    assert unchanged(base, before)
    assert unchanged(other, others)
    assert all(torch.equal(entries[key], before[key]) for key in before)


def test_in_place_forms_leave_the_dict_alone_when_they_fail():
    sd = StateDict(a=torch.ones(2), b=torch.ones(2))
    with pytest.raises(KeyMismatch):
        sd += {"a": torch.ones(2)}
    assert_same(sd, {"a": torch.ones(2), "b": torch.ones(2)})


def test_negation_is_minus_and_plus_is_a_new_dict():
    sd = StateDict(a=torch.tensor([1.0, -2.0]))
    assert_same(-sd, {"a": torch.tensor([-1.0, 2.0])})
    same = +sd
    same["b"] = torch.ones(1)
    assert "b" not in sd


def test_sums_with_and_without_a_start(base, other):
    dicts = [StateDict.from_model(base), StateDict.from_model(other), StateDict.from_model(base)]
    a, b = small_models.weights(base), small_models.weights(other)
    expected = {key: (a[key] + b[key] + a[key]) / 3 for key in a}
    assert_same(sum(dicts) / 3, expected)
    assert_same(sum(dicts, start=StateDict.zeros_like(base)) / 3, expected)
    total = sum(dicts[:1])
    total += 1
    assert_same(dicts[0], a)


def test_keys_keep_the_left_operands_order():
    left = {"b": torch.ones(1), "a": torch.ones(1), "c": torch.ones(1)}
    right = {"c": torch.ones(1), "a": torch.ones(1), "b": torch.ones(1)}
    assert list(StateDict(left) + right) == ["b", "a", "c"]
    assert list(right + StateDict(left)) == ["c", "a", "b"]
    assert list(2 * StateDict(left)) == ["b", "a", "c"]


def test_keys_that_one_side_lacks_are_named():
    left = StateDict(a=torch.ones(1), head=torch.ones(1))
    right = {"a": torch.ones(1), "tail": torch.ones(1)}
    for attempt in (lambda: left - right, lambda: right - left, lambda: left.sub(right)):
        with pytest.raises(KeyMismatch) as caught:
            attempt()
        assert "head" in str(caught.value)
        assert "tail" in str(caught.value)
        assert "common" in str(caught.value)


@pytest.mark.parametrize(("name", "sign"), [("add", "+"), ("sub", "-"), ("mul", "*"), ("div", "/")])
def test_common_keys_on_request(name, sign):
    left = StateDict(b=torch.tensor([3.0]), head=torch.ones(1), a=torch.tensor([5.0]))
    right = {"a": torch.tensor([2.0]), "tail": torch.ones(1), "b": torch.tensor([4.0])}
    found = getattr(left, name)(right, on_missing="common")
    assert_same(found, {k: OPERATORS[sign](left[k], right[k]) for k in ("b", "a")})
    assert_same(getattr(left, name)(2), {k: OPERATORS[sign](v, 2) for k, v in left.items()})
    with pytest.raises(ParameterError, match="average"):
        getattr(left, name)(right, on_missing="average")


def test_shapes_that_differ_are_listed():
    left = StateDict(a=torch.ones(2, 3), b=torch.ones(1), c=torch.ones(4))
    with pytest.raises(ShapeMismatch) as caught:
        left + {"a": torch.ones(3, 2), "b": torch.ones(5), "c": torch.ones(4)}
    assert "a: 2 x 3 and 3 x 2" in str(caught.value)
    assert "b: 1 and 5" in str(caught.value)
    assert "c:" not in str(caught.value)


def test_what_is_no_operand():
    sd = StateDict(a=torch.ones(1))
    for nonsense in ("gpt2", None, [sd], 1j, object()):
        with pytest.raises(TypeError):
            sd + nonsense
        with pytest.raises(TypeError):
            nonsense - sd
        with pytest.raises(DtypeMismatch):
            sd.add(nonsense)
    with pytest.raises(DtypeMismatch, match="learning_rate"):
        StateDict(learning_rate=0.1) * 2
    with pytest.raises(DtypeMismatch, match="a is a list"):
        sd + {"a": [1.0]}


# Dtypes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_dtypes_as_torch_promotes_them(dtype):
    a, b = torch.randn(100).to(dtype), torch.randn(100)
    assert_same(StateDict(x=a) - {"x": b}, {"x": a - b})
    assert_same(0.1 * StateDict(x=a), {"x": 0.1 * a})
    assert_same(StateDict(x=a) * torch.tensor(0.1), {"x": a * torch.tensor(0.1)})


def test_8_bit_floats_are_widened():
    a, b = torch.randn(10).to(torch.float8_e4m3fn), torch.randn(10).to(torch.float8_e4m3fn)
    assert_same(StateDict(x=a) + {"x": b}, {"x": a.float() + b.float()})
    assert_same(StateDict(x=a) / 3, {"x": a.float() / 3})


def test_integers_and_booleans_are_carried_along():
    steps, mask = torch.tensor(7), torch.tensor([True, False])
    base = StateDict(w=torch.tensor([1.0]), steps=steps, mask=mask)
    tuned = {"w": torch.tensor([3.0]), "steps": steps.clone(), "mask": mask.clone()}
    merged = base + 0.5 * (tuned - base)
    assert_same(merged, {"w": torch.tensor([2.0]), "steps": steps, "mask": mask})
    assert merged["steps"].data_ptr() != steps.data_ptr()
    assert_same(StateDict.zeros_like(base), {"w": torch.zeros(1), "steps": steps, "mask": mask})
    for key, value in (("steps", torch.tensor(8)), ("mask", mask.int()), ("steps", torch.ones(()))):
        with pytest.raises(DtypeMismatch, match=key):
            base - {**tuned, key: value}


def test_results_are_detached():
    grown = StateDict(x=nn.Parameter(torch.ones(2))) * 2
    assert type(grown["x"]) is torch.Tensor
    assert not grown["x"].requires_grad


# A dict -----------------------------------------------------------------------------------------


def test_it_is_a_dict():
    tensors = {"a": torch.ones(1), "b": torch.zeros(1)}
    sd = StateDict(tensors)
    assert isinstance(sd, dict)
    assert list(sd) == ["a", "b"]
    assert sd.get("c") is None
    sd.update(c=torch.ones(2))
    assert sd.pop("c").shape == (2,)
    for joined in (sd | {"d": torch.ones(1)}, {"d": torch.ones(1)} | sd):
        assert isinstance(joined, StateDict)
        assert set(joined) == {"a", "b", "d"}
    sd |= {"e": torch.ones(1)}
    assert isinstance(sd, StateDict)
    assert "e" in sd
    with pytest.raises(TypeError):
        sd | 3
    assert_same(pickle.loads(pickle.dumps(StateDict(tensors))), tensors)
    module = nn.Linear(1, 1)
    module.load_state_dict(StateDict.from_model(module) * 0)
    assert module.weight.item() == 0.0


def test_parts_of_it():
    sd = StateDict(a=torch.ones(1), b=torch.zeros(2), c=torch.ones(3))
    part = sd.subset(["c", "a"])
    assert list(part) == ["c", "a"]
    assert part["c"] is sd["c"]
    assert sd.filter_values(lambda value: value.sum() > 0) is sd
    assert list(sd) == ["a", "c"]
    assert sd.remove(["a"]) is sd
    assert list(sd) == ["c"]
    for attempt in (sd.remove, sd.subset):
        with pytest.raises(KeyMismatch, match="cc"):
            attempt(["c", "cc"])
    assert list(sd) == ["c"]


def test_to_moves_and_casts_floats():
    sd = StateDict(a=torch.tensor([1.5]), n=torch.tensor([2]))
    for moved in (sd.to(torch.float16), sd.to("cpu", torch.float16), sd.to(dtype=torch.float16)):
        assert (moved["a"].dtype, moved["n"].dtype) == (torch.float16, torch.int64)
    meta = sd.to("meta")
    assert {value.device.type for value in meta.values()} == {"meta"}
    assert sd["a"].dtype == torch.float32


def test_copy_is_deep():
    sd = StateDict(a=torch.ones(2))
    twin = sd.copy()
    twin["a"].zero_()
    assert isinstance(twin, StateDict)
    assert_same(sd, {"a": torch.ones(2)})


def test_its_repr_is_short(base):
    elements = sum(param.numel() for param in base.parameters())
    assert repr(StateDict.from_model(base)) == f"<StateDict: 28 tensors, {elements:,} elements>"


# Models -----------------------------------------------------------------------------------------


def test_from_model_gives_module_order_and_tied_tensors_once(base):
    sd = StateDict.from_model(base)
    assert list(sd) == [name for name, _ in base.named_parameters()]
    assert "lm_head.weight" in base.state_dict()
    assert "lm_head.weight" not in sd
    assert not any(value.requires_grad for value in sd.values())
    pipe = transformers.TextGenerationPipeline(
        model=base, tokenizer=small_models.tokenizer(), device="cpu"
    )
    assert_same(StateDict.from_model(pipe), sd)
    with pytest.raises(RecipeError, match="from_hf"):
        StateDict.from_model("gpt2")


def test_from_model_and_remove_leave_the_module_alone(base):
    before = small_models.weights(base)
    sd = StateDict.from_model(base)
    sd.remove(["transformer.wte.weight"])
    sd *= 0
    assert unchanged(base, before)


def test_from_hf_loads_by_name_and_drops_what_transformers_dropped(base, tmp_path):
    name = small_models.save(base, tmp_path / "base")
    for sd in (
        StateDict.from_hf(name),
        StateDict.from_hf(name, "text-generation", device="cpu", framework="pt"),
        StateDict.from_hf(name, task="text-generation"),
    ):
        assert_same(sd, small_models.weights(base))
    zeros = StateDict.zeros_like(name, task="text-generation")
    assert_same(zeros, {k: torch.zeros_like(v) for k, v in sd.items()})


def test_to_model_of_a_name_gives_a_pipeline_with_these_weights(base, other, tmp_path):
    name = small_models.save(base, tmp_path / "base")
    merged = StateDict.from_model(base) + 0.5 * (StateDict.from_model(other) - base)
    pipe = merged.to_model(name, task="text-generation", framework="pt", device="cpu", verbose=True)
    assert_same(dict(pipe.model.named_parameters()), merged)
    assert torch.equal(pipe.model.lm_head.weight, merged["transformer.wte.weight"])
    text = pipe("the cat", max_new_tokens=3, do_sample=False, framework="pt")[0]["generated_text"]
    ids = torch.tensor([pipe.tokenizer("the cat")["input_ids"]])
    expected = copy.deepcopy(base)
    expected.load_state_dict(merged, strict=False)
    said = expected.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=1)[0]
    words = pipe.tokenizer.decode(said, skip_special_tokens=True)
    assert text.replace(" ", "") == words.replace(" ", "")
    assert_same(dict(merged.to_model(name).model.named_parameters()), merged)


def test_to_model_of_a_module_or_pipeline_leaves_it_alone(base, other):
    before = small_models.weights(base)
    sd = StateDict.from_model(other)
    pipe = transformers.TextGenerationPipeline(
        model=base, tokenizer=small_models.tokenizer(), device="cpu"
    )
    module, second = sd.to_model(base), sd.to_model(pipe)
    assert module is not base
    assert isinstance(second, type(pipe))
    for made in (module, second.model):
        assert_same(dict(made.named_parameters()), sd)
        made.transformer.wte.weight.data.zero_()
    assert pipe.model is base
    assert unchanged(base, before)
    assert unchanged(other, small_models.weights(other))
    assert float(sd["transformer.wte.weight"].abs().sum()) > 0
    assert sd.to_model({}) is sd
    assert sd.to_model({}, device="meta")["transformer.wte.weight"].is_meta
    with pytest.raises(RecipeError, match="int"):
        sd.to_model(3)


def test_to_model_refuses_missing_and_unexpected_keys(base, tmp_path):
    name = small_models.save(base, tmp_path / "base")
    for target in (base, name):
        with pytest.raises(KeyMismatch, match="ln_f"):
            StateDict.from_model(base).remove(["transformer.ln_f.bias"]).to_model(target)
        with pytest.raises(KeyMismatch, match="classifier"):
            (StateDict.from_model(base) | {"classifier": torch.ones(1)}).to_model(target)


# To a checkpoint --------------------------------------------------------------------------------


def test_it_is_saved_as_a_merge_is(tmp_path):
    tensors = StateDict((f"layers.{i}.weight", torch.full((64, 64), float(i))) for i in range(3))
    written = tensors.save(tmp_path / "out", max_shard_size="20KB")
    shards = sorted((tmp_path / "out").glob("model-*-of-00003.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    found = {key: value for shard in shards for key, value in load_file(shard).items()}
    for read in (found, written.collect()):
        assert set(read) == set(tensors)
        assert all(torch.equal(read[key], tensors[key]) for key in tensors)
    assert verify(str(tmp_path / "out")).ok


def test_saved_like_a_model_it_loads(base, tmp_path):
    name = small_models.save(base, tmp_path / "base")
    half = StateDict.from_model(base) * 0.5
    half.save(tmp_path / "out")
    with pytest.raises(OutputExists):  # the same weights, with a config this time
        half.save(tmp_path / "out", like=name)
    half.save(tmp_path / "out", like=name, overwrite=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    parameters = dict(loaded.named_parameters())
    assert all(torch.equal(parameters[key], half[key]) for key in half)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_what_cant_be_saved_leaves_nothing(tmp_path):
    with pytest.raises(DtypeMismatch, match="count"):
        StateDict(count=3).save(tmp_path / "out")
    with pytest.raises(RecipeError, match="cluster"):
        StateDict(a=torch.ones(2)).save(tmp_path / "out", engine="ray")
    assert not list(tmp_path.iterdir())

"""Calls of merge methods: whatever kind of models goes in comes back, merged."""

from __future__ import annotations

import logging

import pytest
import small_models
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import distmerge
from distmerge.errors import (
    CheckpointError,
    KeyMismatch,
    MethodError,
    OutputExists,
    ParameterError,
    RecipeError,
    ShapeMismatch,
    UnknownMethod,
)
from distmerge.expressions.eager import evaluate_eagerly
from distmerge.expressions.lazy import LazyStateDict, open_lazy
from distmerge.expressions.nodes import Apply, TensorLeaf
from distmerge.expressions.state_dict import StateDict
from distmerge.methods.declare import dict_map, layer_merge, model_merge
from distmerge.methods.registry import find_method

ties, linear, median = find_method("ties"), find_method("linear"), find_method("median")
task_arithmetic, slerp = find_method("task_arithmetic"), find_method("slerp")


@pytest.fixture(scope="module")
def modules():
    base = small_models.gpt2(0)
    return [base, small_models.gpt2(1, near=base), small_models.gpt2(2, near=base)]


@pytest.fixture(scope="module")
def names(modules, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [
        small_models.save(m, folder / n)
        for m, n in zip(modules, ["base", "legal", "recipes"], strict=True)
    ]


@pytest.fixture(scope="module")
def dicts(modules):
    return [small_models.weights(module) for module in modules]


@pytest.fixture(scope="module")
def expected(dicts):
    """What `base + mean of the others' offsets` is."""
    base, *others = dicts
    return {k: (v + sum(o[k] - v for o in others) / 2) for k, v in base.items()}


@layer_merge
def offsets(models, base):
    return base + sum(model - base for model in models) / len(models)


def assert_close(found, wanted):
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        assert torch.allclose(found[key].detach(), value, atol=1e-6), key


def pipeline_of(model):
    return transformers.TextGenerationPipeline(
        model=model, tokenizer=small_models.tokenizer(), device="cpu"
    )


# Kinds ------------------------------------------------------------------------------------------


def test_names_give_a_pipeline(names, expected):
    for pipe in (
        offsets(names, task="text-generation", framework="pt", device="cpu"),
        offsets(names),
        offsets(models=names, verbose=True),
    ):
        assert isinstance(pipe, transformers.TextGenerationPipeline)
        assert_close(dict(pipe.model.named_parameters()), expected)
        assert pipe("the cat", max_new_tokens=2, framework="pt")[0]["generated_text"]
        assert pipe.model.lm_head.weight is pipe.model.transformer.wte.weight


def test_modules_give_a_module_and_stay_as_they_are(modules, dicts, expected):
    merged = offsets(modules)
    assert type(merged) is type(modules[0])
    assert merged not in modules
    assert_close(dict(merged.named_parameters()), expected)
    assert merged.lm_head.weight is merged.transformer.wte.weight
    for module, before in zip(modules, dicts, strict=True):
        assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    merged.transformer.wte.weight.data.zero_()
    assert torch.equal(modules[0].transformer.wte.weight, dicts[0]["transformer.wte.weight"])


def test_pipelines_give_a_pipeline_and_stay_as_they_are(modules, dicts, expected):
    pipes = [pipeline_of(module) for module in modules]
    merged = offsets(pipes)
    assert isinstance(merged, type(pipes[0]))
    assert_close(dict(merged.model.named_parameters()), expected)
    assert pipes[0].model is modules[0]
    assert all(torch.equal(p, dicts[0][n]) for n, p in pipes[0].model.named_parameters())


def test_dicts_give_a_state_dict_and_stay_as_they_are(dicts, expected):
    given = [dict(tensors) for tensors in dicts]
    for models in (given, tuple(given), iter(given), [StateDict(d) for d in given]):
        merged = offsets(models)
        assert isinstance(merged, StateDict)
        assert list(merged) == list(dicts[0])
        assert_close(merged, expected)
    assert [list(d) for d in given] == [list(d) for d in dicts]
    assert offsets(given, device="meta")["transformer.wte.weight"].is_meta


def test_lazy_ones_give_a_lazy_one(names, expected):
    merged = offsets([open_lazy(name) for name in names])
    assert isinstance(merged, LazyStateDict)
    assert str(merged.expression) == "offsets(legal, recipes, base=base)"
    assert_close(merged.collect(), expected)
    assert_close({"x": merged["transformer.wte.weight"]}, {"x": expected["transformer.wte.weight"]})
    halved = (merged / 2).collect()
    assert_close(halved, {k: v / 2 for k, v in expected.items()})


def test_mixed_ones_give_a_lazy_one(names, modules, dicts, expected):
    for models in (
        [names[0], modules[1], dicts[2]],
        [dicts[0], open_lazy(names[1]), pipeline_of(modules[2])],
        [open_lazy(names[0]), open_lazy(names[1]) * 1, names[2]],
    ):
        merged = offsets(models)
        assert isinstance(merged, LazyStateDict)
        assert_close(merged.collect(), expected)


def test_every_kind_gives_the_same_bits(names, modules, dicts):
    found = ties(dicts, k=0.3)
    module = ties(modules, k=0.3)
    pipe = ties(names, k=0.3)
    lazy = ties([open_lazy(name) for name in names], k=0.3).collect()
    for other in (dict(module.named_parameters()), dict(pipe.model.named_parameters()), lazy):
        assert set(other) == set(found)
        assert all(torch.equal(other[key], found[key]) for key in found)


def test_out_streams_to_a_checkpoint(names, dicts, expected, tmp_path):
    for models, place in ((names, "names"), (dicts, "dicts")):
        written = offsets(models, out=tmp_path / place)
        assert isinstance(written, LazyStateDict)
        assert_close(written.collect(), expected)
        assert_close(load_file(tmp_path / place / "model.safetensors"), expected)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "names")
    assert_close(dict(loaded.named_parameters()), expected)


def test_out_may_replace_what_is_there(names, dicts, tmp_path):
    @model_merge
    def first(models):
        return models[0]

    linear(dicts[:1], out=tmp_path / "out")
    for merge in (offsets, first):
        with pytest.raises(OutputExists, match="overwrite=True"):
            merge(names[1:], out=tmp_path / "out")
        merge(names[1:], out=tmp_path / "out", overwrite=True)
    assert_close(load_file(tmp_path / "out" / "model.safetensors"), dicts[1])
    assert (tmp_path / "out" / "config.json").is_file()


def test_names_on_the_hub_and_in_buckets(hub, s3, names, expected):
    ids = ["calls/base", "calls/legal", "recipes"]
    for name, repo in zip(names, ids, strict=True):
        hub.add_repo(repo, name)
    commit = hub.branches("calls/legal")["main"]
    hub.commit("calls/legal", {"model.safetensors": b"no longer a model"})
    pipe = offsets([ids[0], f"calls/legal@{commit}", f"hf://{ids[2]}"], framework="pt")
    assert_close(dict(pipe.model.named_parameters()), expected)
    place, options = s3.url("calls/out"), s3.storage_options
    streamed = offsets([*names[:2], ids[2]], out=place, storage_options=options)
    assert_close(streamed.collect(), expected)
    urls = [place, place, place]
    again = offsets(urls, out=s3.url("calls/again"), storage_options=options)
    assert_close(again.collect(), expected)
    by_place = {"s3://models/": options}
    mixed = offsets([distmerge.open(place, storage_options=by_place), *names[1:]], base_index=0)
    assert set(mixed.collect()) == set(expected)
    with pytest.raises(CheckpointError, match="s3://"):
        offsets(urls, storage_options=options)


def test_models_of_one_short_name_are_named_in_full(modules, tmp_path):
    places = [small_models.save(m, tmp_path / str(i) / "same") for i, m in enumerate(modules)]
    merged = offsets([*places[:2], open_lazy(places[2])])
    assert str(merged.expression) == f"offsets({places[1]}, same, base={places[0]})"


def test_results_in_all_four_ways(dicts, modules, names, tmp_path):
    """A user's function on dicts, on modules, from a recipe, and streamed."""
    method = tmp_path / "mine.py"
    method.write_text(
        "from distmerge import layer_merge\n"
        "import torch\n"
        "@layer_merge\n"
        "def middle(models, **kw):\n"
        "    return torch.median(torch.stack(models), 0).values\n"
    )
    middle = find_method(f"{method}:middle")
    wanted = {k: torch.stack([d[k] for d in dicts]).median(0).values for k in dicts[0]}
    assert_close(middle(dicts), wanted)
    assert_close(dict(middle(modules).named_parameters()), wanted)
    from distmerge.run.merge import merge

    recipe = {"merge_method": f"{method}:middle", "models": [{"model": name} for name in names]}
    assert_close(merge(recipe, str(tmp_path / "out")).collect(), wanted)
    assert_close(middle(names, out=tmp_path / "streamed").collect(), wanted)


def test_what_is_no_list_of_models(dicts, names):
    for nonsense in ("gpt2", dicts[0], nn.Linear(1, 1), 3, None):
        with pytest.raises(RecipeError, match="list"):
            offsets(nonsense)
    with pytest.raises(RecipeError):
        offsets([])
    with pytest.raises(RecipeError, match="int"):
        offsets([dicts[0], 3])
    with pytest.raises(ParameterError, match="models"):
        offsets()
    with pytest.raises(ParameterError):
        offsets(dicts, dicts)
    with pytest.raises(ParameterError):
        offsets(dicts, models=dicts)
    with pytest.raises(CheckpointError):
        offsets([names[0], "./no/such/model"])


def test_a_pipeline_that_cant_be_made_shows_before_anything_is_merged(names, dicts, tmp_path):
    seen = []

    @layer_merge
    def watched(models):
        seen.append(1)
        return models[0]

    with pytest.raises(ParameterError, match="no-such-task"):
        watched(names, task="no-such-task")
    assert not seen
    watched(dicts)
    assert seen


def test_keywords_that_are_missing_or_misspelt(names):
    with pytest.raises(ParameterError, match="breadcrumbs needs 'weight'") as raised:
        distmerge.breadcrumbs(["./no/such", *names])
    assert raised.value.fix == "breadcrumbs([...], weight=...)"
    for wrong, meant in (("base", "base_index"), ("overwite", "overwrite"), ("dencity", "density")):
        with pytest.raises(ParameterError, match=wrong) as raised:
            ties(["./no/such", *names], **{wrong: 1})
        assert raised.value.fix == f"write '{meant}='"


# The base ---------------------------------------------------------------------------------------


@layer_merge
def subtract(models, base):
    return models[0] - base


@layer_merge
def which(models, base_index):
    return models[base_index]


@layer_merge
def maybe(models, base=None):
    return torch.full_like(models[0], -1.0) if base is None else base


def numbered(count=3):
    return [{"x": torch.full((2,), float(i))} for i in range(count)]


@pytest.mark.parametrize(("index", "place"), [(0, 0), (1, 1), (2, 2), (-1, 2), (-3, 0)])
def test_the_base_is_where_base_index_says(index, place):
    assert float(subtract(numbered(), base_index=index)["x"][0]) == min({0, 1, 2} - {place}) - place
    assert float(which(numbered(), base_index=index)["x"][0]) == place
    assert float(maybe(numbered(), base_index=index)["x"][0]) == place


def test_no_base():
    assert float(maybe(numbered(), base_index=None)["x"][0]) == -1
    with pytest.raises(RecipeError, match="needs a base"):
        subtract(numbered(), base_index=None)
    for wrong in (3, -4, "0", 0.0):
        with pytest.raises(ParameterError, match="base_index"):
            subtract(numbered(), base_index=wrong)


def test_functions_get_fresh_lists():
    @layer_merge
    def pops(models, base_index=0):
        base = models.pop(base_index)
        return base + models[0]

    models = numbered()
    kept = list(models)
    assert float(pops(models, base_index=1)["x"][0]) == 1.0
    assert models == kept


def test_slerp_takes_two():
    models = [{"x": torch.tensor([1.0, 0.0])}, {"x": torch.tensor([0.0, 1.0])}]
    half = torch.full((2,), 2**-0.5)
    assert torch.allclose(slerp(models)["x"], half)
    assert torch.allclose(slerp(models, base_index=None)["x"], half)
    assert torch.allclose(slerp(models, tau=0.0)["x"], models[0]["x"])
    assert torch.allclose(slerp(models, tau=0.0, base_index=1)["x"], models[1]["x"])
    with pytest.raises(RecipeError, match="slerp"):
        slerp(numbered(3))


# Heads ------------------------------------------------------------------------------------------


def test_passthrough_averages_the_models_without_the_base():
    models = [
        {"w": torch.tensor([0.0]), "head.w": torch.tensor([100.0])},
        {"w": torch.tensor([2.0]), "head.w": torch.tensor([3.0])},
        {"w": torch.tensor([4.0]), "head.w": torch.tensor([5.0])},
    ]
    for key in ("head.w", "head"):
        for option in ("passthrough", "passthrough_layers"):
            for given in ([key], key, {key}):
                merged = offsets(models, **{option: given})
                assert merged["head.w"].tolist() == [4.0]
                assert merged["w"].tolist() == [3.0]
    # No base in play: all count, unless the caller names one.
    assert median(models, passthrough=["head"])["head.w"].tolist() == [36.0]
    assert median(models, passthrough=["head"], base_index=0)["head.w"].tolist() == [4.0]
    assert median(models, passthrough=["head"], base_index=2)["head.w"].tolist() == [51.5]
    assert which(models, passthrough=["head"])["head.w"].tolist() == [4.0]
    both = offsets(models, passthrough=["head"], passthrough_layers=["w"])
    assert both["w"].tolist() == [3.0]
    with pytest.raises(KeyMismatch, match="haed"):
        offsets(models, passthrough=["haed"])


def test_a_head_may_differ_in_shape_from_the_bases():
    models = [
        {"w": torch.zeros(1), "head": torch.ones(3)},
        {"w": torch.ones(1), "head": torch.ones(2)},
        {"w": torch.ones(1), "head": torch.zeros(2)},
    ]
    assert offsets(models, passthrough=["head"])["head"].tolist() == [0.5, 0.5]
    with pytest.raises(ShapeMismatch, match="head"):
        offsets(models)


def test_heads_that_a_model_lacks_are_averaged_over_those_that_have_them():
    models = [
        {"w": torch.zeros(1)},
        {"w": torch.ones(1)},
        {"w": torch.ones(1), "head": torch.ones(1)},
        {"w": torch.ones(1), "head": torch.zeros(1)},
    ]
    with pytest.raises(KeyMismatch, match="head"):
        offsets(models)
    assert offsets(models, passthrough=["head"])["head"].tolist() == [0.5]
    assert list(offsets(models, on_missing="common")) == ["w"]
    assert offsets(models, on_missing="average")["head"].tolist() == [0.5]


def test_keys_missing_somewhere_take_the_bases_tensor():
    base, tuned = {"w": torch.zeros(1), "only": torch.full((1,), 7.0)}, {"w": torch.ones(1)}
    for models, index in (([base, tuned], 0), ([tuned, base], 1)):
        merged = offsets(models, base_index=index, on_missing="base")
        assert merged["only"].tolist() == [7.0]
    # The policy alone, where what is kept is not what was read last.
    for members in ((base, tuned), (tuned, base)):
        root = Apply(
            linear,
            (("models", tuple(TensorLeaf(m) for m in members)),),
            parameters=(("weight", 1.0),),
            on_missing="average",
        )
        assert evaluate_eagerly(root)["only"].tolist() == [7.0]


@pytest.fixture(scope="module")
def berts(tmp_path_factory):
    """A base with a masked language model's head, and classifiers made from it."""
    folder = tmp_path_factory.mktemp("berts")
    base = small_models.bert(0, kind="ForPreTraining")
    tuned = [small_models.bert(seed, near=base) for seed in (1, 2)]
    models = [base, *tuned]
    places = [small_models.save(m, folder / str(i)) for i, m in enumerate(models)]
    return models, places


def test_the_result_is_like_the_first_model_that_has_the_heads(berts):
    models, places = berts
    heads = ["classifier.weight", "classifier.bias"]
    pipe = offsets(places, passthrough=heads, base_index=0)
    module = offsets(models, passthrough=heads, base_index=0)
    assert isinstance(pipe, transformers.TextClassificationPipeline)
    assert type(module) is type(models[1])
    a, b, c = (small_models.weights(model) for model in models)
    wanted = {k: a[k] + ((b[k] - a[k]) + (c[k] - a[k])) / 2 for k in b if k in a}
    wanted |= {key: (b[key] + c[key]) / 2 for key in heads}
    assert set(wanted) == set(b)
    assert_close(dict(pipe.model.named_parameters()), wanted)
    assert_close(dict(module.named_parameters()), wanted)
    lazy = offsets([open_lazy(place) for place in places], passthrough=["classifier"])
    assert_close(lazy.collect(), wanted)
    assert pipe("the cat sat")[0]["label"] in ("LABEL_0", "LABEL_1")


def test_without_passthrough_such_heads_are_named(berts):
    models, places = berts
    for given in (models, places):
        with pytest.raises(KeyMismatch) as caught:
            offsets(given)
        assert "classifier" in str(caught.value)
        assert "passthrough" in str(caught.value)


def test_passthrough_may_be_spelt_as_any_of_the_models_spells_it(tmp_path):
    base = small_models.gpt2(0)
    tuned = [small_models.gpt2(seed, near=base) for seed in (1, 2)]
    inner = base.transformer
    places = [small_models.save(inner, tmp_path / "inner")]
    places += [small_models.save(m, tmp_path / str(i)) for i, m in enumerate(tuned)]
    wanted = (tuned[0].transformer.ln_f.bias + tuned[1].transformer.ln_f.bias) / 2
    for spelling in ("ln_f", "transformer.ln_f"):
        lazy = task_arithmetic([open_lazy(p) for p in places], scaling=0, passthrough=[spelling])
        assert torch.allclose(lazy["ln_f.bias"], wanted)
        assert torch.equal(lazy["wpe.weight"], inner.wpe.weight)


# Parameters -------------------------------------------------------------------------------------


def test_functions_receive_what_they_declare_and_no_more(dicts):
    seen = {}

    @layer_merge
    def declared(models, *, strength: float = 1.0, verbose=False, device=None):
        seen.update(strength=strength, verbose=verbose, device=device)
        return models[0]

    declared(dicts, strength=2, verbose=True, device="cpu")
    assert seen == {"strength": 2.0, "verbose": True, "device": "cpu"}
    declared(dicts)
    assert seen == {"strength": 1.0, "verbose": False, "device": None}
    with pytest.raises(ParameterError, match="strenght") as caught:
        declared(dicts, strenght=2)
    assert "strength" in caught.value.fix
    with pytest.raises(ParameterError, match="strength"):
        declared(dicts, strength="much")


def test_open_keywords_receive_the_rest(dicts):
    seen = {}

    @layer_merge
    def open_ended(models, **kw):
        seen.setdefault(kw.pop("layer_name"), kw)
        return models[0]

    open_ended(dicts, temperature=0.5, verbose=True, base_index=1)
    assert set(seen) == set(dicts[0])
    assert all(kw == {"temperature": 0.5, "verbose": True, "base_index": 1} for kw in seen.values())


def test_verbose_logs_the_formula(dicts, caplog):
    with caplog.at_level(logging.INFO, logger="distmerge"):
        offsets(dicts)
        assert not caplog.records
        offsets(dicts, verbose=True)
    assert "offsets(models[1], models[2], base=models[0])" in caplog.text


def test_a_seed_decides_about_random_methods(dicts):
    dare = find_method("dare_linear")
    first, second = dare(dicts, seed=1), dare(dicts, seed=2)
    again = dare(dicts, seed=1)
    key = "transformer.wte.weight"
    assert torch.equal(first[key], again[key])
    assert not torch.equal(first[key], second[key])
    assert torch.equal(dare(dicts)[key], dare(dicts, seed=0)[key])


def test_a_method_that_fails_says_where(dicts):
    @layer_merge
    def broken(models):
        raise ZeroDivisionError("of a kind")

    with pytest.raises(MethodError, match=r"transformer\.wte\.weight.*of a kind"):
        broken(dicts)


# Functions of dicts -----------------------------------------------------------------------------


def test_dict_map_takes_lists_of_dicts_by_place_and_name():
    @dict_map
    def larger(models, factor=1.0):
        return factor * torch.stack(models).amax(0)

    @dict_map(["models", "weights"])
    def weighted(models, weights, offset=0.0):
        return sum(m * w for m, w in zip(models, weights, strict=True)) + offset

    @dict_map()
    def first(models, **kw):
        return models[0]

    models, weights = numbered(), numbered()
    for merged in (larger(models), larger(models=models), larger(models, unknown=3)):
        assert isinstance(merged, StateDict)
        assert merged["x"].tolist() == [2.0, 2.0]
    assert larger(models, 3.0)["x"].tolist() == [6.0, 6.0]
    assert larger(models, factor=3.0)["x"].tolist() == [6.0, 6.0]
    for merged in (weighted(models, weights), weighted(weights=weights, models=models)):
        assert merged["x"].tolist() == [5.0, 5.0]
    assert weighted(models, weights, offset=1.0)["x"].tolist() == [6.0, 6.0]
    assert first(models)["x"].tolist() == [0.0, 0.0]
    with pytest.raises(ParameterError, match="weights"):
        weighted(models)
    with pytest.raises(ParameterError, match="2 weights for 3"):
        weighted(models, weights[:2])
    with pytest.raises(MethodError, match="names"):
        dict_map(["names"])(lambda models: models[0])
    with pytest.raises(MethodError):
        dict_map("models")


def test_model_merge_sees_whole_state_dicts(names, modules, dicts, expected):
    seen = []

    @model_merge
    def whole(models, base, **kw):
        seen.append(kw)
        assert all(isinstance(model, StateDict) for model in [*models, base])
        return base + sum(model - base for model in models) / len(models)

    pipe, module, merged = whole(names), whole(modules), whole(dicts, temperature=0.5)
    assert isinstance(pipe, transformers.TextGenerationPipeline)
    assert isinstance(merged, StateDict)
    assert list(merged) == list(dicts[0])
    lazy = whole([open_lazy(names[0]), *dicts[1:]])
    assert isinstance(lazy, LazyStateDict)
    for found in (pipe.model, module):
        assert_close(dict(found.named_parameters()), expected)
    assert_close(merged, expected)
    assert_close(lazy.collect(), expected)
    assert seen == [{}, {}, {"temperature": 0.5}, {}]
    assert whole.__name__ == "whole"


def test_model_merge_may_do_as_it_likes_with_its_dicts(dicts):
    @model_merge
    def rough(models, base_index=0):
        base = models.pop(base_index)
        for model in models:
            for value in model.values():
                value.zero_()
        base += models[0]
        return dict(base)

    given = [{k: v.clone() for k, v in d.items()} for d in dicts]
    assert_close(rough(given, base_index=1), dicts[1])
    for before, after in zip(dicts, given, strict=True):
        assert all(torch.equal(before[k], after[k]) for k in before)


def test_model_merge_with_names_spelt_differently_heads_and_out(berts, tmp_path):
    models, places = berts

    @model_merge
    def average(models, **kw):
        assert not any("classifier" in key for model in models for key in model)
        return sum(models) / len(models)

    a, b, c = (small_models.weights(model) for model in models)
    wanted = {k: (a[k] + b[k] + c[k]) / 3 for k in b if k in a}
    heads = {k: (b[k] + c[k]) / 2 for k in b if k.startswith("classifier")}
    options = {"passthrough": ["classifier"], "base_index": 0}
    pipe = average(places, **options)
    assert_close(dict(pipe.model.named_parameters()), {**wanted, **heads})
    written = average(places, **options, out=tmp_path / "out")
    assert_close(written.collect(), {**wanted, **heads})
    base = small_models.gpt2(0)
    inner = small_models.save(base.transformer, tmp_path / "inner")
    outer = small_models.save(base, tmp_path / "outer")

    @model_merge
    def difference(models):
        return models[1] - models[0]

    zero = difference([open_lazy(inner), open_lazy(outer)]).collect()
    assert set(zero) == {k.removeprefix("transformer.") for k in small_models.weights(base)}
    assert not any(value.any() for value in zero.values())


def test_model_merge_refuses_nonsense(dicts, tmp_path):
    @model_merge
    def strict(models, *, strength: float = 1.0):
        return strength

    with pytest.raises(MethodError, match="float"):
        strict(dicts)
    with pytest.raises(ParameterError, match="strength"):
        strict(dicts, strenght=1)
    with pytest.raises(ParameterError, match="strength"):
        strict(dicts, strength="much")

    @model_merge
    def based(models, base):
        raise ValueError("on purpose")

    with pytest.raises(ParameterError, match="base"):
        based(dicts, base_index=None)
    with pytest.raises(MethodError, match="on purpose"):
        based(dicts)

    @model_merge
    def leaving(models):
        raise SystemExit(0)

    with pytest.raises(MethodError, match="leaving failed: SystemExit: 0"):
        leaving(dicts)
    file = tmp_path / "mine.py"
    file.write_text("import distmerge\n@distmerge.model_merge\ndef whole(models): ...\n")
    with pytest.raises(UnknownMethod, match="whole"):
        find_method(f"{file}:whole")


def test_policies_that_there_arent_are_refused(dicts):
    with pytest.raises(ParameterError, match="on_missing can't be 'zzz'") as refused:
        ties(dicts, on_missing="zzz")
    assert "error, common, base, average" in str(refused.value)
    for given in (3, ["lm_head", 3]):
        with pytest.raises(ParameterError, match="passthrough can't be"):
            ties(dicts, passthrough=given)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "-inf"])
def test_parameters_that_are_no_finite_numbers_are_refused(dicts, value):
    with pytest.raises(ParameterError, match="has to be a finite number"):
        linear(dicts, weight=value)

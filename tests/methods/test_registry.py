"""What is known of a function once it is declared a method, and where methods are found."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Annotated, Any, Literal

import cloudpickle
import pytest
import torch
from methods.trees import merge
from pydantic import Field

from distmerge.errors import MethodError, ParameterError, UnknownMethod
from distmerge.methods.declare import layer_merge, model_merge
from distmerge.methods.method import REQUIRED, PerModel
from distmerge.methods.registry import find_method, method_names
from distmerge.methods.signature import describe

if TYPE_CHECKING:
    from collections.abc import Sequence

BUILTIN = [
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "fisher",
    "karcher",
    "linear",
    "max_magnitude",
    "median",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "passthrough",
    "ram",
    "ramplus_tl",
    "sce",
    "slerp",
    "task_arithmetic",
    "ties",
]


# --- what a signature says


def everything(
    models: Sequence[Any],
    fishers: list[torch.Tensor],
    base: torch.Tensor,
    base_index: int,
    *,
    rng: Any,
    layer_name: str,
    weight: PerModel[float],
    t: Annotated[float, Field(ge=0, le=1)] = 0.5,
    lambda_: float = 1.0,
    mode: Literal["a", "b"] = "a",
    free=3,
    **kw: Any,
) -> Any:
    """Has one of each kind of argument."""


def test_a_signature_is_read():
    method = describe(everything, inputs=("models", "fishers"))
    assert method.name == "everything"
    assert method.inputs == ("models", "fishers")
    assert (method.takes_base, method.base_required, method.accepts_any) == (True, True, True)
    assert method.offered == {"base", "base_index", "rng", "layer_name"}
    assert list(method.parameters) == ["weight", "t", "lambda", "mode", "free"]
    weight, scaling = method.parameters["weight"], method.parameters["lambda"]
    assert (weight.per_model, weight.annotation, weight.default) == (True, float, REQUIRED)
    assert (scaling.keyword, scaling.default, scaling.per_model) == ("lambda_", 1.0, False)
    assert method.parameters["free"].annotation is Any
    assert method.__doc__.startswith(everything.__doc__)
    assert not method.builtin


def test_annotations_that_only_a_type_checker_reads_hide_no_others():
    """`Sequence` above is imported for type checkers alone."""
    method = describe(everything, inputs=("models", "fishers"))
    assert method.parameters["weight"].per_model
    with pytest.raises(ParameterError):
        method.parameters["t"].check(2.0, "everything")


def test_a_base_with_a_default_may_be_left_out():
    assert describe(lambda models, base: 1, name="f").base_required
    assert not describe(lambda models, base=None: 1, name="f").base_required
    assert not describe(lambda models: 1, name="f").takes_base


def yields(models):
    yield models


@pytest.mark.parametrize(
    ("function", "blocks", "granularity"),
    [
        (lambda models: 1, None, "whole"),
        (lambda models: 1, False, "whole"),
        (lambda models: 1, True, "rows"),
        (lambda models: 1, "elements", "elements"),
        (yields, None, "rows"),
        (yields, False, "whole"),
        (yields, "elements", "elements"),
    ],
)
def test_what_a_method_sees(function, blocks, granularity):
    assert layer_merge(blocks=blocks, name="f")(function).granularity == granularity


def test_the_decorator_with_and_without_options():
    @layer_merge
    def plain(models):
        return models[0]

    @layer_merge(name="other", models=(2, 3))
    def named(models):
        return models[0]

    assert (plain.name, plain.models) == ("plain", (1, None))
    assert (named.name, named.models) == ("other", (2, 3))
    assert repr(named) == "<merge method other>"
    assert plain.__name__ == "plain"
    assert plain.__wrapped__ is plain.function


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: 1, "has no argument at all"),
        (lambda models, /: 1, "positional-only"),
        (lambda *models: 1, "positional-only"),
    ],
)
def test_signatures_that_cannot_be(function, message):
    with pytest.raises(MethodError, match=message) as caught:
        describe(function, name="wrong")
    assert "wrong(" in str(caught.value), "the definition is quoted"


def test_lists_that_are_no_arguments():
    with pytest.raises(MethodError, match=r"f\(models\) has no argument fishers"):
        describe(lambda models: 1, name="f", inputs=("models", "fishers"))


def test_blocks_of_nothing_known():
    with pytest.raises(MethodError, match="blocks can't be 'row'"):
        layer_merge(blocks="row")(lambda models: 1)


# --- parameters


def parameter(name):
    return describe(everything, inputs=("models", "fishers")).parameters[name]


@pytest.mark.parametrize(
    ("name", "value", "checked"),
    [
        ("t", 0, 0.0),
        ("t", "1e-5", 1e-5),
        ("t", 1, 1.0),
        ("lambda", -3, -3.0),
        ("weight", "0.5", 0.5),
        ("mode", "b", "b"),
        ("free", [1], [1]),
    ],
)
def test_values_are_taken_as_the_annotations_types(name, value, checked):
    """YAML 1.1 reads 1e-5 as text, and numbers without a point as integers."""
    found = parameter(name).check(value, "everything")
    assert found == checked
    assert type(found) is type(checked)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("t", 1.5, "less than or equal to 1"),
        ("t", -0.1, "greater than or equal to 0"),
        ("t", float("nan"), "or equal to"),
        ("t", "much", "valid number"),
        ("weight", [1.0], "valid number"),
        ("weight", None, "valid number"),
        ("mode", "c", "'a' or 'b'"),
    ],
)
def test_values_that_do_not_fit(name, value, reason):
    with pytest.raises(ParameterError, match=rf"everything: {name} can't be") as caught:
        parameter(name).check(value, "everything")
    assert reason in str(caught.value)
    assert "Fix: " in str(caught.value)


@pytest.mark.parametrize("text", ["1.0", "true", "yes", "on"])
def test_flags_as_recipes_spell_them(text):
    normalize = find_method("ties").parameters["normalize"]
    assert normalize.check(text if text != "1.0" else 1.0, "ties") is True
    assert find_method("dare_ties").parameters["rescale"].check("density", "dare_ties") == "density"


def test_unknown_parameters_have_a_nearest_name():
    with pytest.raises(ParameterError, match="ties has no parameter 'densty'") as caught:
        find_method("ties").check_parameters({"densty": 0.5})
    assert caught.value.fix == "write 'density'"
    with pytest.raises(ParameterError) as caught:
        find_method("median").check_parameters({"zzz": 0.5})
    assert caught.value.facts == ("it has: none",)


def test_open_keywords_take_any_parameter():
    describe(everything, inputs=("models", "fishers")).check_parameters({"anything": 1})


def test_only_what_is_declared_is_passed():
    seen = {}

    def method(models, *, alpha, lambda_):
        seen.update(alpha=alpha, lambda_=lambda_, models=models)
        return models[0]

    described = describe(method)
    models = [torch.ones(2)]
    described.invoke(
        {"models": models},
        torch.zeros(2),
        {"alpha": 1, "lambda": 2},
        layer_name="w",
        base_index=0,
    )
    assert (seen["alpha"], seen["lambda_"]) == (1, 2)
    assert seen["models"] is not models


# --- where methods are found


def test_the_builtin_methods():
    assert [name for name in method_names() if find_method(name).builtin] == BUILTIN


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("tie", "ties"), ("dare_tie", "dare_ties"), ("slrep", "slerp")]
)
def test_an_unknown_name_has_a_nearest(wrong, nearest):
    with pytest.raises(UnknownMethod, match=f"no merge method '{wrong}'") as caught:
        find_method(wrong)
    assert caught.value.fix == f"did you mean '{nearest}'?"
    assert nearest in caught.value.facts[0]


def test_a_name_like_no_other():
    with pytest.raises(UnknownMethod) as caught:
        find_method("qqqqqq")
    assert caught.value.fix == "'distmerge methods' lists them"


SOURCE = """
    import torch
    from distmerge.methods.declare import layer_merge, model_merge

    def helper(x):
        return x * 2

    def plain(models, **kw):
        return helper(models[0])

    @layer_merge(blocks="elements")
    def decorated(models, *, alpha: float = 3.0):
        return models[0] * alpha

    @model_merge
    def of_models(models):
        return models[0]

    NUMBER = 7
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "my_methods.py"
    path.write_text(textwrap.dedent(SOURCE))
    return path


def test_a_function_in_a_file(source):
    plain, decorated = find_method(f"{source}:plain"), find_method(f"{source}:decorated")
    assert (plain.name, plain.granularity) == ("plain", "whole")
    assert decorated.granularity == "elements"
    assert merge(plain, [torch.ones(3)]).tolist() == [2.0] * 3
    assert merge(decorated, [torch.ones(3)]).tolist() == [3.0] * 3


@pytest.mark.parametrize(
    ("name", "headline"),
    [
        ("nothing", "defines no 'nothing'"),
        ("NUMBER", "is a int, not a function"),
        ("of_models", "sees whole models"),
    ],
)
def test_a_file_without_such_a_method(source, name, headline):
    with pytest.raises(UnknownMethod, match=headline):
        find_method(f"{source}:{name}")


def test_a_file_that_is_not_there_or_cannot_be_run(tmp_path):
    with pytest.raises(UnknownMethod, match="no file"):
        find_method(f"{tmp_path}/none.py:f")
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    with pytest.raises(UnknownMethod, match="ZeroDivisionError"):
        find_method(f"{broken}:f")


def test_a_function_in_a_module(source, monkeypatch):
    monkeypatch.syspath_prepend(str(source.parent))
    assert find_method("my_methods:plain").name == "plain"
    with pytest.raises(UnknownMethod, match="'no_such_module' can't be imported"):
        find_method("no_such_module:f")
    for name in (":f", ".my_methods:plain"):
        with pytest.raises(UnknownMethod, match="is no module"):
            find_method(name)
    (source.parent / "leaving.py").write_text("raise SystemExit(0)")
    with pytest.raises(UnknownMethod, match="SystemExit: 0"):
        find_method("leaving:f")


def test_a_method_of_an_installed_package(source, tmp_path, monkeypatch):
    """Found by the entry point that its metadata declare."""
    metadata = tmp_path / "my_methods-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-methods\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[distmerge.methods]\ntwice = my_methods:plain\nthrice = my_methods:decorated\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert set(method_names()) == {*BUILTIN, "twice", "thrice"}
    assert merge("twice", [torch.ones(2)]).tolist() == [2.0, 2.0]
    assert merge("thrice", [torch.ones(2)]).tolist() == [3.0, 3.0]
    with pytest.raises(UnknownMethod) as caught:
        find_method("thrise")
    assert caught.value.fix == "did you mean 'thrice'?"


# --- on their way to workers


def test_a_function_from_a_file_travels_as_code(source, tmp_path):
    """To where the file is not."""
    method = find_method(f"{source}:plain")
    (tmp_path / "pickled").write_bytes(cloudpickle.dumps(method))
    source.unlink()
    script = (
        "import pickle, sys, torch; method = pickle.load(open(sys.argv[1], 'rb'));"
        "print(method.name, method.function([torch.ones(2)]).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "pickled")],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    assert done.stdout == "plain [2.0, 2.0]\n"


def test_builtin_methods_travel_by_name():
    for name in BUILTIN:
        assert pickle.loads(pickle.dumps(find_method(name))) is find_method(name)


def test_a_method_survives_the_journey():
    method = describe(everything, inputs=("models", "fishers"), blocks="elements", models=(2, 4))
    arrived = cloudpickle.loads(cloudpickle.dumps(method))
    for name in ("name", "inputs", "granularity", "models", "offered", "accepts_any"):
        assert getattr(arrived, name) == getattr(method, name)
    assert arrived.parameters["weight"].default is REQUIRED
    assert arrived.source_hash == method.source_hash


# --- what a resumed run trusts


def scaled_by(factor):
    return layer_merge(lambda models: models[0] * factor)


def test_the_source_hash_changes_with_the_source_and_what_it_closes_over():
    first = layer_merge(lambda models: models[0])
    second = layer_merge(lambda models: models[0] + 1)
    assert first.source_hash != second.source_hash
    assert scaled_by(2.0).source_hash == scaled_by(2.0).source_hash
    assert scaled_by(2.0).source_hash != scaled_by(3.0).source_hash


SHARE = 0.25


def halved(tensor):
    return tensor / 2


def shared(models, *, scale=SHARE):
    return sum(halved(model) * SHARE for model in models)


@pytest.mark.parametrize(
    "changed",
    [{"SHARE": 0.5}, {"SHARE": 1}, {"halved": lambda tensor: tensor / 3}],
    ids=["another share", "another kind of share", "another function"],
)
def test_the_source_hash_changes_with_what_is_beside_the_function(changed, monkeypatch):
    method = layer_merge(shared)
    before = method.source_hash
    assert layer_merge(shared).source_hash == before
    for name, value in changed.items():
        monkeypatch.setitem(globals(), name, value)
    assert method.source_hash != before
    monkeypatch.undo()
    assert method.source_hash == before


def test_the_source_hash_changes_with_defaults():
    def made(share):
        def scaled(models, *, scale=share):
            return models[0] * scale

        return layer_merge(scaled)

    assert made(1.0).source_hash == made(1.0).source_hash != made(2.0).source_hash


def test_a_hash_without_source_is_the_same_in_every_process():
    code = (
        "import distmerge\n"
        "def f(models): return sum(m * len([x for x in {'a', 'b'} if x in {'a', 'b'}]) "
        "for m in models)\n"
        "print(distmerge.layer_merge(f).source_hash)"
    )
    found = {
        subprocess.run(
            [sys.executable, "-"], input=code, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(3)
    }
    assert len(found) == 1


def test_functions_without_source_have_a_hash():
    def made(code):
        space = {}
        exec(code, space)
        return layer_merge(space["f"])

    double, triple = "def f(models): return models[0] * 2", "def f(models): return models[0] * 3"
    assert made(double).source_hash == made(double).source_hash
    assert made(double).source_hash != made(triple).source_hash


def test_a_method_of_models_describes_its_function():
    @model_merge
    def average(models, **kw):
        """The mean."""
        return sum(models) / len(models)

    assert repr(average) == "<model merge method average>"
    assert average.__doc__.startswith("The mean.\n")
    assert average.__name__ == "average"

"""The notebooks, run against the loopback Hub, and each of their results against plain torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import plain_merges
import pytest
import torch
import transformers
from filelock import FileLock
from nbclient import NotebookClient
from plain_merges import Tensors, assert_close, assert_merged
from safetensors import safe_open

pytestmark = pytest.mark.full

EXAMPLES = Path(__file__).parents[2] / "examples"
BASE = "openai-community/gpt2"
LEGAL = "umarbutler/open-australian-legal-gpt2"
LEGAL_TODAY = "isaacus/open-australian-legal-gpt2"
"""To which the Hub redirects."""
RECIPE = "mrm8488/gpt2-finetuned-recipes-cooking"
PREFIX = "transformer."

KEEP = """
def _plain(value):
    module = getattr(value, "model", value)
    if isinstance(module, torch.nn.Module):
        return {name: tensor.detach() for name, tensor in module.named_parameters()}
    if isinstance(value, distmerge.LazyStateDict):
        return _plain(value.collect())
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if isinstance(value, (torch.Tensor, str, int, float)) else None

_names = [name for name in globals() if name[0] != "_" and name not in ("In", "Out")]
torch.save({name: _plain(globals()[name]) for name in _names}, "kept")
"""
"""A last cell: what the notebook's variables hold, for the tests to look at."""


def run_to_the_end(name: str, folder: Path) -> None:
    """Run a notebook in a folder; leave what it shows and what its variables hold there."""
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(KEEP))
    folder.mkdir()
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    nbformat.write(notebook, folder / "shown.ipynb")


class Ran:
    """A notebook that was run to its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        cells = nbformat.read(folder / "shown.ipynb", as_version=4).cells
        self.cells = [cell for cell in cells if cell.cell_type == "code"]
        self.variables: dict[str, Any] = torch.load(folder / "kept", weights_only=True)

    def __getitem__(self, name: str) -> Any:
        return self.variables[name]

    def shown(self, source: str) -> str:
        """What the cell that holds `source` printed, and its last value."""
        [cell] = [cell for cell in self.cells if source in cell.source]
        outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        return "".join(o.get("text") or o["data"]["text/plain"] for o in outputs)


@pytest.fixture(scope="module")
def run_notebook(hub, hub_layouts, shared_folder, tmp_path_factory):
    """Runs a notebook, once for all workers; the loopback Hub serves the names in it."""
    hub.add_repo(BASE, hub_layouts["base"])
    hub.add_repo(LEGAL_TODAY, hub_layouts["law"], moved_from=[LEGAL])
    hub.add_repo(RECIPE, hub_layouts["cooking"])
    home = tmp_path_factory.mktemp("jupyter")

    def run(name: str) -> Ran:
        folder = shared_folder / f"notebook-{name}"
        with FileLock(f"{folder}.lock"), pytest.MonkeyPatch.context() as patch:
            for variable in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
                patch.setenv(variable, str(home / variable))
            if not folder.exists():
                run_to_the_end(name, folder)
        return Ran(folder)

    return run


@pytest.fixture(scope="module")
def plain(trained_models) -> dict[str, dict[str, torch.Tensor]]:
    """The three models' parameters, as transformers loads what training saved."""
    folders = {"base": "base", "legal": "law", "recipe": "cooking"}
    return {
        name: plain_merges.parameters(getattr(trained_models, folder))
        for name, folder in folders.items()
    }


def key_by_key(plain, formula) -> dict[str, torch.Tensor]:
    """`formula(base, legal, recipe)` of each key's tensors."""
    return {key: formula(*(plain[name][key] for name in plain)) for key in plain["base"]}


def assert_equal(found: Tensors, expected: Tensors) -> None:
    """The same keys in the same order, the same bits."""
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0, equal_nan=True, msg=key)


def as_in_the_file(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Under the names that the base's file has."""
    return {key.removeprefix(PREFIX): value for key, value in tensors.items()}


def file_keys(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as opened:
        return list(opened.keys())


# The tutorial ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tutorial(run_notebook) -> Ran:
    return run_notebook("tutorial")


ARITHMETIC = {
    "added": lambda base, legal, recipe: recipe + legal,
    "subtracted": lambda base, legal, recipe: base - recipe,
    "scaled": lambda base, legal, recipe: 2 * base,
    "halved": lambda base, legal, recipe: base / 2,
    "multiplied": lambda base, legal, recipe: base * legal,
    "divided": lambda base, legal, recipe: base / legal,
    "negated": lambda base, legal, recipe: -base,
    "mirrored": lambda base, legal, recipe: 1 - base,
    "chained": lambda base, legal, recipe: base - 2 * (legal - recipe),
    "with_module": lambda base, legal, recipe: base + legal,
    "running": lambda base, legal, recipe: (base + legal + recipe) / 3,
    "legal_delta": lambda base, legal, recipe: legal - base,
    "recipe_delta": lambda base, legal, recipe: recipe - base,
    "both": lambda base, legal, recipe: base + 0.5 * ((legal - base) + (recipe - base)) / 2,
    "more_legal": lambda base, legal, recipe: base + 0.7 * (legal - base) + 0.3 * (recipe - base),
    "no_recipes": lambda base, legal, recipe: base + (legal - base) - 0.5 * (recipe - base),
}
"""Variable of the notebook -> the same for one tensor of each model."""


class TestTutorial:
    @pytest.mark.parametrize("name", ["base", "legal", "recipe"])
    def test_models_are_loaded_in_module_order(self, tutorial, plain, name):
        assert len(tutorial[name]) == len(plain[name]) == 52
        assert_equal(tutorial[name], plain[name])

    def test_looking_inside(self, tutorial, plain):
        base = plain["base"]
        elements = sum(tensor.numel() for tensor in base.values())
        assert (
            tutorial.shown("base = StateDict") == f"<StateDict: 52 tensors, {elements:,} elements>"
        )
        for key in list(base)[:6]:
            assert f"'{key}': {tuple(base[key].shape)}" in tutorial.shown("tuple(base[key].shape)")
        part = [key for key in base if ".h.0.attn." in key]
        assert list(tutorial["attention"]) == part
        assert tutorial.shown("attention = base.subset") == str(
            sum(base[key].numel() for key in part)
        )

    def test_lengths_and_angle(self, tutorial, plain):
        flat = {
            name: torch.cat([tensor.double().flatten() for tensor in model.values()])
            for name, model in plain.items()
        }
        legal, recipe = flat["legal"] - flat["base"], flat["recipe"] - flat["base"]
        lengths = [float(x.norm()) for x in (flat["base"], legal, recipe)]
        assert list(tutorial["lengths"].values()) == pytest.approx(lengths, rel=1e-5)
        cosine = float(legal @ recipe) / lengths[1] / lengths[2]
        assert tutorial["cosine"] == pytest.approx(cosine, abs=1e-5)

    @pytest.mark.parametrize("name", ARITHMETIC)
    def test_arithmetic(self, tutorial, plain, name):
        assert_equal(tutorial[name], key_by_key(plain, ARITHMETIC[name]))

    def test_parts_have_factors_of_their_own(self, tutorial, plain):
        expected = {
            key: base + (1.0 if ".attn." in key else 0.25) * (plain["legal"][key] - base)
            for key, base in plain["base"].items()
        }
        assert_equal(tutorial["legal_attention"], expected)

    def test_keys_that_one_side_lacks(self, tutorial, plain):
        part = [key for key in plain["base"] if ".h.0.attn." in key]
        assert f"disagree on {52 - len(part)} keys" in tutorial.shown(
            "except distmerge.KeyMismatch"
        )
        assert_equal(tutorial["common"], {key: 2 * plain["base"][key] for key in part})

    def test_pipelines_have_the_merged_weights_and_the_first_one_its_own(self, tutorial, plain):
        assert_equal(tutorial["both_pipe"], key_by_key(plain, ARITHMETIC["both"]))
        assert_equal(tutorial["base_pipe"], plain["base"])
        assert_equal(tutorial["legal_pipe"], plain["legal"])

    def test_they_write_what_such_models_write(self, tutorial, plain, trained_models):
        both = key_by_key(plain, ARITHMETIC["both"])
        pipes = [pipeline_of(trained_models.base, tensors) for tensors in (plain["base"], both)]
        answers = iter(tutorial["answers"])
        for prompt in tutorial["prompts"]:
            for pipe in pipes:
                transformers.set_seed(7)
                [answer] = pipe(prompt, max_length=50, pad_token_id=pipe.tokenizer.eos_token_id)
                assert answer["generated_text"] == next(answers)
                assert len(pipe.tokenizer(answer["generated_text"]).input_ids) <= 50
                assert answer["generated_text"][len(prompt) :] in tutorial.shown("answers = []")
        assert next(answers, None) is None

    def test_ties(self, tutorial, plain):
        expected = plain_merges.ties(plain["base"], [plain["legal"], plain["recipe"]], keep=0.2)
        assert_merged(tutorial["ties_pipe"], expected)

    def test_average(self, tutorial, plain):
        expected = plain_merges.mean(list(plain.values()))
        assert_close(tutorial["average"], expected)
        assert_equal(tutorial["average_pipe"], tutorial["average"])

    def test_lazily_the_same(self, tutorial, plain, hub_layouts):
        expected = as_in_the_file(key_by_key(plain, ARITHMETIC["both"]))
        in_file = [key for key in file_keys(hub_layouts["base"]) if not key.endswith(".attn.bias")]
        lazy, written = tutorial["lazy_both"], tutorial["written"]
        assert list(lazy) == in_file
        assert list(written) == in_file
        assert set(in_file) == set(expected)
        for found in (lazy, written, read_file(tutorial.folder / "merges/both")):
            assert_equal({key: found[key] for key in expected}, expected)
        assert tutorial.shown('norm = lazy_both["ln_f.weight"]') == "True"

    def test_the_plan_tells_how_names_were_matched(self, tutorial):
        told = tutorial.shown("print(lazy_both.explain())")
        assert told.startswith("(gpt2 + ((0.5 * ((open-australian-legal-gpt2 - gpt2) + ")
        for words in (f"{BASE} at ", f"{LEGAL} at ", f"{RECIPE} at ", "transformer.X -> X"):
            assert words in told
        for words in ("mask buffer", "mask value", "alias of transformer.wte.weight"):
            assert words in told

    def test_what_was_streamed_loads(self, tutorial, plain):
        both = key_by_key(plain, ARITHMETIC["both"])
        assert_equal(tutorial["loaded_pipe"], both)
        assert_equal(plain_merges.parameters(tutorial.folder / "merges/both"), both)
        expected = plain_merges.ties(plain["base"], [plain["legal"], plain["recipe"]], keep=0.2)
        assert_merged(plain_merges.parameters(tutorial.folder / "merges/ties"), expected)


def pipeline_of(folder: Path, tensors: Tensors) -> transformers.TextGenerationPipeline:
    """A pipeline of a saved model with other weights."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        parameter.data = tensors[name].clone()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.pipeline("text-generation", model, tokenizer=tokenizer, device="cpu")


def read_file(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118


# Methods of one's own ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(run_notebook) -> Ran:
    return run_notebook("own_methods")


@pytest.fixture(scope="module")
def medians(plain) -> dict[str, torch.Tensor]:
    return key_by_key(plain, lambda *models: torch.median(torch.stack(models), 0).values)


class TestOwnMethods:
    @pytest.mark.parametrize(
        "name", ["median_pipe", "median_module", "median_dict", "two_steps_pipe", "trimmed_dict"]
    )
    def test_the_median_of_any_kind_of_model(self, own, medians, name):
        assert_equal(own[name], medians)  # of three, also the mean without the outer two

    def test_what_cells_show(self, own):
        assert own.shown("median_pipe = ").startswith("'Section 12 of the Act")
        assert own.shown("two_steps_pipe = ") == "3 models of 52 tensors\n"
        assert "Fix: write 'scaling='" in own.shown("scalling=0.5")
        assert own.shown("lazy.explain()").startswith("trimmed_task(open-australian-legal-gpt2, ")

    @pytest.mark.parametrize(
        ("name", "base", "scaling"),
        [("strongest_dict", "base", 0.5), ("last_as_base", "recipe", 1)],
    )
    def test_the_strongest_change(self, own, plain, name, base, scaling):
        others = [model for other, model in plain.items() if other != base]
        expected = {}
        for key, start in plain[base].items():
            first, second = (model[key] - start for model in others)
            expected[key] = start + scaling * torch.where(
                first.abs() >= second.abs(), first, second
            )
        assert_equal(own[name], expected)

    def test_the_layer_name_says_which_to_leave(self, own, plain):
        expected = {
            key: base
            if key in ("transformer.wte.weight", "transformer.wpe.weight")
            else (plain["legal"][key].double() + plain["recipe"][key]) / 2
            for key, base in plain["base"].items()
        }
        assert_close(own["body_only_dict"], {k: v.double() for k, v in expected.items()})

    def test_trimming_asks_for_the_cut(self, own, plain):
        assert_merged(own["trimmed_task_dict"], trimmed_task(plain, density=0.1))

    def test_lengths_are_evened_out_by_dot_products(self, own, plain):
        expected = {}
        for key, base in plain["base"].items():
            deltas = [plain[name][key].double() - base for name in ("legal", "recipe")]
            length = sum(delta.norm() for delta in deltas) / 2
            even = [delta / delta.norm() * length for delta in deltas if delta.norm() > 0]
            expected[key] = base + sum(even) / 2
        assert_close(own["even_dict"], expected)

    def test_two_lists(self, own, plain):
        expected = {}
        for key, base in plain["base"].items():
            models = [plain[name][key].double() for name in ("legal", "recipe")]
            weights = [(model - base).abs() + 1e-8 for model in models]
            weighted = sum(m * w for m, w in zip(models, weights, strict=True))
            expected[key] = weighted / sum(weights)
        assert_close(own["weighted_dict"], expected)

    @pytest.mark.parametrize("name", ["lazy", "streamed", "from_recipe", "on_ray", "recipe_on_ray"])
    def test_one_function_everywhere(self, own, name):
        expected = as_in_the_file(own["trimmed_task_dict"])
        assert set(own[name]) == set(expected)
        assert_equal({key: own[name][key] for key in expected}, expected)

    def test_the_bytes_are_the_same_wherever_it_ran(self, own):
        merges = ["trimmed", "from-recipe", "on-ray", "recipe-on-ray"]
        files = [own.folder / "merges" / merge / "model.safetensors" for merge in merges]
        assert len({hashlib.sha256(file.read_bytes()).digest() for file in files}) == 1
        loaded = plain_merges.parameters(own.folder / "merges/recipe-on-ray")
        assert_equal(loaded, own["trimmed_task_dict"])


def trimmed_task(plain, density):
    expected = {}
    for key, base in plain["base"].items():
        deltas = [plain[name][key].double() - base.double() for name in ("legal", "recipe")]
        pairs = [plain_merges.trim(delta, density) for delta in deltas]
        kept, unsure = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        expected[key] = base.double() + kept.mean(0), unsure.any(0)
    return expected

"""What the README and the guides print works as printed, in a folder with three small models."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml
from small_models import gpt2, save
from snippets import read_snippets, run_snippet

import distmerge
from distmerge.expressions.recipe import load_recipe
from distmerge.methods.registry import find_method, method_names
from distmerge.run.merge import plan

REPOSITORY = Path(__file__).parents[1]
README = REPOSITORY / "README.md"
RECIPES = REPOSITORY / "docs" / "recipes.md"
GUIDES = [
    README,
    *(
        REPOSITORY / "docs" / f"{n}.md"
        for n in ("how-to", "from-mergecraft", "from-mergekit", "methods")
    ),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders `base`, `law` and `cooking`."""
    folder = tmp_path_factory.mktemp("models")
    base = gpt2(0)
    save(base, folder / "base")
    save(gpt2(1, near=base), folder / "law")
    save(gpt2(2, near=base), folder / "cooking")
    return folder


@pytest.fixture
def here(models, tmp_path, monkeypatch):
    """A working directory that sees those models."""
    for model in models.iterdir():
        (tmp_path / model.name).symlink_to(model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [n for n, m in sys.modules.items() if _lies_in(m, tmp_path)]:
        del sys.modules[name]


def _lies_in(module, folder):
    return str(getattr(module, "__file__", None) or "").startswith(str(folder))


@pytest.fixture(scope="module")
def on_the_hub(hub, models):
    """The models as `org/base` and so on."""
    for model in models.iterdir():
        hub.add_repo(f"org/{model.name}", model)


@pytest.fixture
def places(s3, hub, on_the_hub, monkeypatch):
    """The bucket `models` on S3, empty, with its credentials; and the models on the Hub, which may
    be written."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    yield
    for key in s3.keys():  # noqa: SIM118 (a server, not a dict)
        s3.client().delete_object(Bucket=s3.bucket, Key=key)


LONG = ("how-to", "README", "from-mergekit")
"""Guides whose snippets take longer than half a minute."""


@pytest.mark.parametrize(
    "document",
    [pytest.param(g, marks=[pytest.mark.full] * (g.stem in LONG), id=g.stem) for g in GUIDES],
)
def test_every_snippet_works_as_printed(document, here, places):
    first = 2 if document == README else 0  # the commands that set up, which got us here
    namespace = {"__name__": "guide"}
    for snippet in read_snippets(document)[first:]:
        run_snippet(snippet, namespace)


def test_the_readme_opens_with_two_commands_and_ci_runs_the_second():
    run, test = read_snippets(README)[:2]
    assert run.language == test.language == "bash"
    assert run.text.count("\n") == test.text.count("\n") == 1
    assert run.text.endswith(".venv/bin/distmerge demo\n")
    assert test.text in (REPOSITORY / ".ci" / "run").read_text()
    for command in (run.text, test.text):
        assert "-c constraints.txt" in command


def test_every_piece_of_a_recipe_means_something(here, models):
    for name in ("law", "cooking"):
        (here / f"{name}-importance").symlink_to(models / name)
    whole = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "law"}, {"model": "cooking"}],
        "parameters": {"weight": 1.0, "density": 0.5},
    }
    pieces = [s for s in read_snippets(RECIPES) if s.language == "yaml"]
    assert len(pieces) > 10
    for piece in pieces:
        given, *more = yaml.safe_load_all(piece.text)
        part = not more and not given.keys() & {"merge_method", "merge"}
        recipe = load_recipe({**whole, **given} if part else piece.text)
        assert recipe.warnings == (), str(piece)
        if "s3://" not in piece.text and "org/" not in piece.text:
            assert plan(recipe.request()).units, str(piece)
            assert recipe.request().warnings == (), str(piece)
    for piece in read_snippets(RECIPES):
        run_snippet(piece, {})


def test_the_example_of_judging_tells_candidates_apart(here):
    for snippet in read_snippets(REPOSITORY / "docs" / "how-to.md"):
        if snippet.file in ("ties.yml", "judging.py", "judged.yml"):
            run_snippet(snippet, {})
    results = distmerge.sweep("judged.yml", "judged")
    by_density = [r.scores["moved"] for r in sorted(results, key=lambda r: str(r.settings))]
    assert len(by_density) == 3
    assert by_density[0] < by_density[1] < by_density[2]
    assert [bool(result.place) for result in results].count(True) == 1


@pytest.mark.parametrize("title", ["Importances for Fisher merging", "State dicts of one's own"])
def test_a_part_of_the_guide_stands_alone(title, here):
    text = (REPOSITORY / "docs" / "how-to.md").read_text()
    part = text.partition(f"## {title}\n")[2].partition("\n## ")[0]
    assert part
    (here / "part.md").write_text(part)
    namespace = {"__name__": "guide", "distmerge": distmerge}
    for snippet in read_snippets(here / "part.md"):
        run_snippet(snippet, namespace)


def test_every_method_and_parameter_is_in_the_guide():
    guide = (REPOSITORY / "docs" / "methods.md").read_text()
    for name in method_names():
        method = find_method(name)
        if method.builtin:
            row = next(line for line in guide.splitlines() if f"| `{name}` |" in line)
            for parameter in method.parameters:
                assert f"`{parameter}" in row, f"{name}: {parameter}"


@pytest.mark.parametrize(
    "document", [*GUIDES, RECIPES, REPOSITORY / "CONTRIBUTING.md"], ids=lambda p: p.stem
)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target

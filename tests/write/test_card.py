"""The model card, read back by huggingface_hub and by a YAML parser."""

import re

import pytest
import yaml
from huggingface_hub import ModelCard

from distmerge.checkpoints.local_store import LocalStore
from distmerge.checkpoints.tensors import Checkpoint
from distmerge.write.card import (
    License,
    Parent,
    license_warnings,
    model_card,
    parent_of,
    read_license,
)

MIT = License(("mit",))
APACHE = License(("apache-2.0",))
QWEN = License(("other",), "tongyi-qianwen", "https://example.org/LICENSE")

RECIPE = """\
merge_method: ties
base_model: org/base
models:
  - model: org/legal   # a comment
    parameters: {weight: [0.1, 0.9]}
"""


def card(parents, **changes):
    fields = {
        "name": "legal-cook",
        "parents": parents,
        "base": "org/base",
        "method": "ties",
        "expression": "ties([org/legal, /disk/cook], base=org/base, density=0.2)",
        "recipe_text": RECIPE,
        "dtype": "bfloat16",
        "library_version": "0.1.0",
        "library": "transformers",
    }
    return model_card(**{**fields, **changes})


def loaded(text, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(text)
    return ModelCard.load(path)


def test_the_hub_reads_the_metadata(tmp_path):
    parents = [
        Parent("org/base", "org/base", MIT),
        Parent("org/legal", "org/legal", MIT),
        Parent(None, "cook", MIT),
        Parent("org/legal", "org/legal", MIT),
    ]
    data = loaded(card(parents), tmp_path).data
    assert data.to_dict() == {
        "base_model": ["org/base", "org/legal"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "license": "mit",
        "tags": ["merge", "distmerge"],
    }


def test_local_parents_leave_no_base_model(tmp_path):
    data = loaded(card([Parent(None, "a", None)]), tmp_path).data
    assert "base_model" not in data.to_dict()
    assert data["base_model_relation"] == "merge"


def test_the_body_says_what_was_merged_and_how(tmp_path):
    parents = [Parent("org/legal", "org/legal", MIT), Parent(None, "cook", MIT)]
    text = loaded(card(parents), tmp_path).text
    assert text.lstrip().startswith("# legal-cook\n")
    for said in ("`ties`", "`bfloat16`", "distmerge 0.1.0", "https://huggingface.co/org/legal",
                 "- cook, licence: mit", "density=0.2"):  # fmt: skip
        assert said in text
    assert "Licence" not in text


def test_the_recipe_is_a_yaml_block_that_parses_to_the_recipe(tmp_path):
    text = loaded(card([]), tmp_path).text
    (block,) = re.findall(r"```yaml\n(.*?)\n```", text, re.DOTALL)
    assert yaml.safe_load(block) == yaml.safe_load(RECIPE)
    assert "# a comment" in block
    assert "yaml" not in loaded(card([], recipe_text=None), tmp_path).text


def test_names_stay_on_their_line():
    text = card([Parent(None, "a\n# b")], name="c\n# d", base="e\n# f")
    assert [line for line in text.splitlines() if line.startswith("# ")] == [r"# c\x0a# d"]


def test_backticks_in_a_recipe_do_not_end_the_block(tmp_path):
    recipe = "chat_template: |\n  ```\n  # Not a heading of the card\n  ```\n"
    text = loaded(card([], recipe_text=recipe), tmp_path).text
    (block,) = re.findall(r"^````yaml\n(.*?\n)````$", text, re.DOTALL | re.MULTILINE)
    assert yaml.safe_load(block) == yaml.safe_load(recipe)


def test_credentials_are_never_in_the_card():
    recipe = (
        "base_model: s3://AKIAIOSFODNN7EXAMPLE:wJalr/XUtnFEMI@bucket/m\nhf_token: hf_abcdefgh1\n"
    )
    text = card(
        [], recipe_text=recipe, expression="https://user:pass-word@host/a + 1", base="s3://u:p@b/m"
    )
    for secret in ("AKIAIOSFODNN7EXAMPLE", "wJalr", "XUtnFEMI", "abcdefgh1", "pass-word", "u:p"):
        assert secret not in text
    assert "bucket/m" in text
    assert "@host/a + 1" in text


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        ([MIT, MIT], {"license": "mit"}),
        ([MIT, APACHE], {}),
        ([MIT, None], {}),
        ([None, None], {}),
        ([License(("other",)), License(("other",))], {}),
        ([License(("mit", "apache-2.0"))], {"license": ["mit", "apache-2.0"]}),
        (
            [QWEN, QWEN],
            {
                "license": "other",
                "license_name": "tongyi-qianwen",
                "license_link": "https://example.org/LICENSE",
            },
        ),
        ([QWEN, License(("other",), "another")], {}),
    ],
)
def test_a_licence_is_named_only_when_all_agree(tmp_path, licenses, expected):
    parents = [Parent(f"org/m{i}", f"org/m{i}", found) for i, found in enumerate(licenses)]
    data = loaded(card(parents), tmp_path).data.to_dict()
    assert {name: value for name, value in data.items() if "license" in name} == expected
    assert bool(license_warnings(parents)) == (not expected)
    for warning in license_warnings(parents):
        assert warning in card(parents)


def test_each_model_is_listed_once_with_its_licence():
    text = card([Parent("org/x", "org/x", QWEN), Parent(None, "y"), Parent("org/x", "org/x", QWEN)])
    models = text.partition("## Models")[2].partition("##")[0].split("\n")
    assert [line for line in models if line] == [
        "- [org/x](https://huggingface.co/org/x), licence: tongyi-qianwen",
        "- y, licence: not named",
    ]


def test_warnings_name_the_models_and_their_licences():
    same_name = [Parent(None, "model", MIT), Parent(None, "model", APACHE)]
    (warning,) = license_warnings(same_name)
    assert "model (mit), model (apache-2.0)" in warning
    assert "bound" not in warning, "what follows from licences is not ours to say"
    both = license_warnings([*same_name, Parent("org/x", "org/x"), Parent("org/x", "org/x")])
    assert len(both) == 2
    assert both[1].count("org/x") == 1


READMES = {
    "---\nlicense: mit\n---\n# A model": MIT,
    "\ufeff---\r\nlicense: apache-2.0\r\nlanguage: en\r\n---\r\n# A model": APACHE,
    "---\nlicense: other\nlicense_name: tongyi-qianwen\n"
    "license_link: https://example.org/LICENSE\n---\n": QWEN,
    "---\nlicense: [mit, apache-2.0]\n---\n": License(("apache-2.0", "mit")),
    "---\nlicense: mit\nmodel-index: nonsense\n---\n": MIT,
    "---\nlanguage: en\n---\n": None,
    "# license: mit\n\n---\n\nnot metadata\n": None,
    "---\nlicense: [unclosed\n---\n": None,
    "---\n- a list\n---\n": None,
    "---\nlicense: mit\ntags: " + "[" * 3000 + "\n---\n": None,
    "---\nlicense: mit\n1: a number\n---\n": None,
    "---\nlicense: mit\nignore_metadata_errors: x\n---\n": None,
    '---\nlicense: "mit\\n---\\n# A heading"\n---\n': None,
    "---\nlicense: {mit: yes}\n---\n": None,
    "---\nlicense: [mit, <!-- bsd]\n---\n": None,
    "---\nlicense: [mit, '']\nlicense_name: [x]\n---\n": MIT,
    '---\nlicense: mit\nlicense_name: "a\\nb"\nlicense_link: "\\e[31m"\n---\n': MIT,
    "": None,
}


@pytest.mark.parametrize("readme", list(READMES))
def test_the_licence_is_read_from_the_readme(tmp_path, readme):
    (tmp_path / "README.md").write_bytes(readme.encode())
    assert read_license(LocalStore(str(tmp_path))) == READMES[readme]


def test_the_licence_in_the_config_is_second(tmp_path):
    store = LocalStore(str(tmp_path))
    assert read_license(store) is None
    (tmp_path / "config.json").write_text('{"license": "mit"}')
    assert read_license(store) == MIT
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert read_license(store) == APACHE


@pytest.mark.parametrize(
    ("url", "root", "hub_id", "name"),
    [
        ("org/model@main", "hf://org/model", "org/model", "org/model"),
        ("hf://org/model/folder", "hf://org/model/folder", "org/model", "org/model"),
        ("gpt2", "hf://gpt2", "gpt2", "gpt2"),
        ("org/model", "/work/org/model", None, "model"),
        ("/home/someone/models/base/", "/home/someone/models/base", None, "base"),
        ("s3://bucket/models/base", "s3://bucket/models/base", None, "base"),
    ],
)
def test_only_what_came_from_the_hub_has_a_hub_id(tmp_path, url, root, hub_id, name):
    checkpoint = Checkpoint(url, root, {}, {})
    assert parent_of(checkpoint, LocalStore(str(tmp_path))) == Parent(hub_id, name)

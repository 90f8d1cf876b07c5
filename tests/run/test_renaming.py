"""`rename`: a checkpoint under other names merges, renamed, as one with the usual names does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from cli.commands import call
from run.family import same_tensors, save_model, tensors_at, weight_bytes
from safetensors.torch import load_file, save_file

import distmerge
from distmerge.checkpoints import renaming
from distmerge.errors import DistmergeError, KeyMismatch, ParameterError, RecipeError
from distmerge.plan.explain import to_json
from distmerge.run.merge import plan
from distmerge.run.options import MergeOptions
from distmerge.sweeps.definition import load_sweep
from distmerge.sweeps.run import run_sweep

RULES = [
    {"prefix": "net.", "to": "model."},
    {"regex": r"^model\.blocks\.(\d+)\.", "to": r"model.layers.\1."},
    {"regex": r"\.attention\.(\w)\.", "to": r".self_attn.\1_proj."},
]


def foreign(key: str) -> str:
    """What the other checkpoint calls it."""
    key = re.sub(r"\.self_attn\.(\w)_proj\.", r".attention.\1.", key)
    key = key.replace("model.layers.", "model.blocks.")
    return "net." + key.removeprefix("model.") if key.startswith("model.") else key


def llama(seed: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=20,
        pad_token_id=1,
    )
    return transformers.LlamaForCausalLM(config)


def rename_files(file: Path, name: Any) -> None:
    save_file({name(key): tensor for key, tensor in load_file(file).items()}, file)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """`base`, `law`, and `law` again as `other`, under other names, with an adapter each."""
    monkeypatch.chdir(tmp_path)
    llama(0).save_pretrained("base")
    for name in ("law", "other"):
        llama(1).save_pretrained(name)
        torch.manual_seed(2)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(llama(1), config).save_pretrained(f"{name}-lora")
    rename_files(tmp_path / "other/model.safetensors", foreign)
    prefix = "base_model.model."
    rename_files(
        tmp_path / "other-lora/adapter_model.safetensors",
        lambda key: prefix + foreign(key.removeprefix(prefix)),
    )
    return tmp_path


def linear(*models: Any, **fields: Any) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": list(models),
        "parameters": {"weight": 0.5},
        **fields,
    }


OTHER: dict[str, Any] = {"model": "other", "rename": RULES}


def merged(recipe: Any, out: str, **options: Any) -> dict[str, bytes]:
    distmerge.merge(recipe, out, **options)
    return weight_bytes(out)


def test_renamed_keys_merge_as_if_they_had_always_been_called_so(here):
    with pytest.raises(KeyMismatch):
        plan(linear("base", "other"))
    wanted = merged(linear("base", "law"), "wanted")
    assert merged(linear("base", OTHER), "found") == wanted
    lazy = (distmerge.open("base") + distmerge.open("other", rename=RULES)) * 0.5
    assert not same_tensors(lazy.collect(), tensors_at("wanted"))
    shorter = {"model": {"path": "other", "rename": RULES}}
    assert merged(linear("base", shorter), "found again") == wanted


def test_slices_move_the_renamed_layers(here):
    def stacked(model: Any) -> dict[str, Any]:
        second = model if isinstance(model, dict) else {"model": model}
        return {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": "base", "layer_range": [0, 2]}]},
                {"sources": [{**second, "layer_range": [1, 3]}]},
            ],
        }

    assert merged(stacked(OTHER), "found") == merged(stacked("law"), "wanted")
    skipped = {(entry.model, entry.key): entry.reason for entry in plan(stacked(OTHER)).skipped}
    assert skipped["other", "net.blocks.0.attention.q.weight"] == "outside layer_range"


def test_an_adapter_is_fitted_to_the_names_of_the_files(here):
    wanted = merged(linear("base", "law+law-lora"), "wanted")
    assert wanted != merged(linear("base", "law"), "without")
    given = {"model": {"model": "other", "lora": "other-lora"}, "rename": RULES}
    assert merged(linear("base", given), "found") == wanted
    short = {"model": "other+other-lora", "rename": RULES}
    assert merged(linear("base", short), "found again") == wanted
    beside = {"model": "other", "lora": {"path": "other-lora", "rename": RULES}}
    with pytest.raises(RecipeError, match="rename holds for models, not for the adapter"):
        plan(linear("base", {"model": beside}))


def test_8_bit_codes_keep_their_scales(here):
    for folder, name in (("coded", lambda key: key), ("coded other", foreign)):
        held = {}
        for key, tensor in tensors_at("law").items():
            coded = "proj" in key
            held[name(key)] = tensor.to(torch.float8_e4m3fn) if coded else tensor
            held |= {f"{name(key)}_scale": torch.tensor(0.5)} if coded else {}
        save_model(held, here / folder)
    wanted = merged(linear("base", "coded"), "wanted")
    given = {"model": "coded other", "rename": RULES}
    assert merged(linear("base", given), "found") == wanted


def test_rules_hold_wherever_the_model_is_named(here):
    base = {"path": "other", "rename": RULES}

    def ties(base: Any, *models: Any) -> dict[str, Any]:
        more = {"base_model": base, "merge_method": "ties"}
        return linear(*models, **more)

    merged(ties("law", "base", "law"), "wanted")
    merged(ties(base, "base", "other"), "found")
    merged(ties("other", "base", OTHER), "listed")
    for out in ("found", "listed"):
        assert not same_tensors(tensors_at(out), tensors_at("wanted"))
    formula = {"models": {"a": base, "b": "base"}, "merge": "a + 0.5 * (b - a)"}
    usual = {"models": {"a": "law", "b": "base"}, "merge": "a + 0.5 * (b - a)"}
    for recipe, out in ((formula, "formula"), (usual, "usual formula")):
        merged(recipe, out)
    assert not same_tensors(tensors_at("formula"), tensors_at("usual formula"))
    with pytest.raises(RecipeError, match="other is renamed in two ways"):
        plan(ties(base, "base", {"model": "other", "rename": {"net.": "model."}}))


def test_in_a_sweep_every_candidate_is_renamed(here):
    grid = {"models.1.parameters.weight": [0.25, 0.75]}

    def swept(other: Any, out: str) -> list[str]:
        listed = [{"model": "base", "parameters": {"weight": 1.0}}, {**other, "parameters": {}}]
        sweep = load_sweep({"merge_method": "linear", "models": listed, "grid": grid})
        return [result.place for result in run_sweep(sweep, out, MergeOptions(workers=2))]

    found, wanted = swept(OTHER, "found"), swept({"model": "law"}, "wanted")
    assert [weight_bytes(place) for place in found] == [weight_bytes(place) for place in wanted]
    assert weight_bytes(found[0]) != weight_bytes(found[1])


def test_explain_plan_and_digest_tell_of_it(here):
    decided = plan(linear("base", OTHER))
    key = "model.layers.1.self_attn.q_proj.weight"
    found = to_json(decided, key)["tensors"][key]
    assert [one["key"] for one in found["from"]["of"]] == [key, foreign(key)]
    [text] = decided.inputs.mappings
    assert re.fullmatch(r"other: 29 keys renamed, such as net\.\S+ -> model\.\S+", text)
    more = plan(linear("base", {**OTHER, "rename": [*RULES, {"prefix": "x", "to": "y"}]}))
    assert more.digest != decided.digest


def test_a_rule_that_fits_nothing_is_told(here, tmp_path):
    idle = {**OTHER, "rename": [*RULES, {"prefix": "transformer.", "to": "model."}]}
    text = "other has no key that rename's 'transformer.' fits."
    assert plan(linear("base", idle)).request.warnings == (text,)
    assert distmerge.open("other", rename={"transformer.": "x."}).request().warnings == (text,)
    (tmp_path / "merge.yml").write_text(json.dumps(linear("base", idle)))
    told = call("plan", "merge.yml").stderr
    assert told.count(text) == 1
    assert plan(linear("base", OTHER)).request.warnings == ()


@pytest.mark.parametrize(
    ("rules", "headline"),
    [
        ({r"net.": "", "lm_head.weight": "norm.weight"}, "one name, norm.weight"),
        ([{"regex": r"^net\.blocks\.\d", "to": "b"}], "one name, b.attention.k.weight"),
        ({"lm_head.weight": ""}, "rename leaves nothing of the name of lm_head.weight of other."),
        ([{"regex": "(", "to": ""}], "'(' -> '' is not a regular expression"),
        ([{"regex": "a", "to": r"\1"}], r"invalid group reference"),
        ([{"regex": "a", "to": r"\g<b>"}], "unknown group name"),
        ([{"regex": "a{99999999999}", "to": ""}], "is not a regular expression"),
        ([{"regex": "(" * 5000 + ")" * 5000, "to": ""}], "'(((("),
        ([{"prefix": "a"}], "{'prefix': 'a'} is no rule to rename by"),
        ([{"prefix": "a", "regex": "a", "to": "b"}], "is no rule to rename by"),
        ([{"prefix": 1, "to": "b"}], "renames something that is no name"),
        ("net.", "rename takes rules, not 'net.'"),
    ],
)
def test_rules_that_make_no_sense_are_one_sentence_early(here, rules, headline):
    for build in (
        lambda: plan(linear("base", {"model": "other", "rename": rules})),
        lambda: distmerge.open("other", rename=rules),
    ):
        with pytest.raises(DistmergeError) as raised:
            build()
        assert isinstance(raised.value, KeyMismatch | ParameterError | RecipeError)
        assert headline in raised.value.headline
        assert raised.value.fix


def test_a_regular_expression_that_takes_ages_is_refused(here, monkeypatch):
    monkeypatch.setattr(renaming, "LONGEST_SEARCH", 0.05)
    with pytest.raises(ParameterError, match="takes too long on") as raised:
        distmerge.open("other", rename=[{"regex": r"^(.|..)+\s$", "to": ""}])
    assert raised.value.fix


def test_the_time_is_that_of_all_keys_together(here, monkeypatch):
    seconds = iter([0.0, 4.0, 9.9, 10.0])
    monkeypatch.setattr(renaming.time, "monotonic", lambda: next(seconds))
    rule = renaming.Rule("^a", "b", is_regex=True)
    names = rule.on(["a1", "a2", "a3"])
    assert [next(names), next(names)] == ["b1", "b2"]
    with pytest.raises(ParameterError, match="takes too long on 'a3'"):
        next(names)


def test_the_command_says_where_a_wrong_rule_stands(here, tmp_path):
    recipe = 'merge_method: linear\nmodels:\n- model: other\n  rename: [{regex: "(", to: ""}]\n'
    (tmp_path / "merge.yml").write_text(recipe + "- model: base\n")
    done = call("plan", "merge.yml")
    assert done.exit_code == 2
    assert "merge.yml, line 3" in done.stderr or "merge.yml, line 4" in done.stderr
    (tmp_path / "merge.yml").write_text("rename: {a: b}\n" + recipe)
    done = call("plan", "merge.yml")
    assert done.exit_code == 2
    assert "merge.yml, line 1: rename holds for one model, not for all." in done.stderr

"""LoRA adapters: what peft trains and merges is the reference, and the formula in a few lines."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import small_models
import torch
import transformers
from run.family import on_grid, same_tensors, save_model, tensors_at
from run.merging import least_memory
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import distmerge
from distmerge.checkpoints.low_rank import LowRank
from distmerge.checkpoints.opening import open_checkpoint
from distmerge.errors import CheckpointError, CheckpointNotFound, MalformedCheckpoint, RecipeError
from distmerge.expressions.nodes import Leaf
from distmerge.methods.blocks import BLOCK_ELEMENTS
from distmerge.run.merge import plan


def llama(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=20,
        attention_bias=True,
        tie_word_embeddings=False,
        pad_token_id=1,
    )
    return transformers.LlamaForCausalLM(config).eval()


def randomise(model: nn.Module, seed: int) -> None:
    """Trained adapters are not zero, and magnitudes not the norms they began as."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.requires_grad and "magnitude" in name:
                param.mul_(1 + 0.2 * torch.rand(param.shape, generator=draw))
            elif param.requires_grad:
                param.add_(0.3 * torch.randn(param.shape, generator=draw))


def train(model: nn.Module, place: Path, **options: Any) -> tuple[str, dict[str, Tensor]]:
    """The base and an adapter saved apart; the adapter's place, and what peft merges."""
    model.save_pretrained(place / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    randomise(adapted, 7)
    adapted.save_pretrained(place / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(place / "merged")
    return str(place / "adapter"), tensors_at(place / "merged")


LINEAR = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": LINEAR},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": LINEAR},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": LINEAR,
        "rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.down_proj": 3},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 11},
    },
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": LINEAR},
    "bias": {"r": 4, "lora_bias": True, "bias": "none", "target_modules": ["q_proj", "v_proj"]},
    "all biases": {"r": 4, "bias": "all", "target_modules": ["q_proj", "v_proj"]},
    "embeddings": {"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "dora on embeddings": {"r": 4, "use_dora": True, "target_modules": ["embed_tokens"]},
    "modules to save": {"r": 4, "target_modules": LINEAR, "modules_to_save": ["lm_head", "norm"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_applied_as_peft_merges_it(tmp_path, kind):
    adapter, wanted = train(llama(), tmp_path, **KINDS[kind])
    found = distmerge.open(f"{tmp_path}/base+{adapter}").collect()
    assert set(found) == set(wanted)
    base = tensors_at(tmp_path / "base")
    assert any(not torch.equal(base[key], wanted[key]) for key in base)
    for key, tensor in wanted.items():
        assert torch.allclose(found[key], tensor, rtol=1e-5, atol=1e-6), key


@pytest.mark.parametrize("dora", [False, True])
def test_conv1d_is_stored_the_other_way_round(tmp_path, dora):
    model = small_models.gpt2(0)
    options = {"r": 2, "target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True}
    adapter, wanted = train(model, tmp_path, use_dora=dora, **options)
    found = distmerge.open(f"{tmp_path}/base+{adapter}").collect()
    for key, tensor in wanted.items():
        assert torch.allclose(found[key], tensor, rtol=1e-5, atol=1e-6), key


def test_convolutions_are_matrices_with_a_row_for_each_output(tmp_path):
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], num_channels=3
    )
    model = transformers.ResNetForImageClassification(config).eval()
    adapter, wanted = train(model, tmp_path, r=2, target_modules=["convolution"])
    found = distmerge.open(f"{tmp_path}/base+{adapter}").collect()
    for key, tensor in wanted.items():
        assert torch.allclose(found[key], tensor, rtol=1e-5, atol=1e-6), key


def test_a_new_head_comes_with_the_adapter(tmp_path):
    base = transformers.LlamaModel(llama().config)
    base.save_pretrained(tmp_path / "base")
    model = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
    adapter, wanted = train(model, tmp_path / "trained", r=2, task_type="SEQ_CLS")
    found = distmerge.open(f"{tmp_path}/base+{adapter}").collect()
    assert torch.equal(found["score.weight"], wanted["score.weight"])
    assert torch.allclose(
        found["layers.1.self_attn.q_proj.weight"], wanted["model.layers.1.self_attn.q_proj.weight"]
    )


# --- by hand: layouts that peft doesn't write today, sizes of several blocks


def by_hand(folder: Path, tensors: dict[str, Tensor], **config: Any) -> str:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    wanted = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, **config}
    (folder / "adapter_config.json").write_text(json.dumps(wanted))
    return str(folder)


def large(seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (700, 1025), "b.weight": (3, 270_001), "c.weight": (63, 4001)}
    return {
        key: on_grid(torch.randn(s, generator=random)).to(torch.bfloat16)
        for key, s in shapes.items()
    }


def pair(key: str, tensor: Tensor, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    outputs, inputs = tensor.shape
    return {
        f"base_model.model.{key}.lora_A.weight": torch.randn(3, inputs, generator=random),
        f"base_model.model.{key}.lora_B.weight": torch.randn(outputs, 3, generator=random),
    }


def adapted(folder: Path, number: int, *, dora: bool = False) -> tuple[str, dict[str, Tensor]]:
    """A model of large tensors with an adapter, and what it comes to in float64."""
    base = large(number)
    place = save_model(base, folder / f"base{number}")
    tensors, wanted = {}, {}
    for i, (key, tensor) in enumerate(base.items()):
        module = key.removesuffix(".weight")
        tensors |= pair(module, tensor, 10 * number + i)
        a, b = list(tensors.values())[-2:]
        wanted[key] = tensor.double() + 2 * b.double() @ a.double()
        if dora:
            norms = wanted[key].norm(dim=1)
            tensors[f"base_model.model.{module}.lora_magnitude_vector"] = norms.float() * 1.5
            wanted[key] *= 1.5
    adapter = by_hand(folder / f"adapter{number}", tensors, use_dora=dora)
    return f"{place}+{adapter}", wanted


@pytest.mark.usefixtures("fixed_reserve")
def test_what_an_adapter_changes_is_made_in_the_same_blocks_whatever_the_threads(tmp_path):
    """Bits of a product of matrices can depend on how many rows are made at once."""
    base = {"a.weight": on_grid(torch.randn(5_000, 1_027, generator=torch.Generator()))}
    tensors = pair("a", base["a.weight"], 3)
    names = [save_model(base, tmp_path / "0"), save_model(base, tmp_path / "1")]
    names[1] += "+" + by_hand(tmp_path / "adapter", tensors)
    models = [distmerge.open(name) for name in names]
    (plain,) = plan(distmerge.ties(models[:1] * 3, k=0.2), allowed_mem="2GiB").units
    (adapted,) = plan(distmerge.ties([models[0], *models], k=0.2), allowed_mem="2GiB").units
    assert plain.tasks[0].block > adapted.tasks[0].block == BLOCK_ELEMENTS


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("memory", ["much", "little"])
@pytest.mark.usefixtures("fixed_reserve")
def test_large_tensors_stream_to_the_same_bits(tmp_path, memory, dora):
    models, wanted = zip(*(adapted(tmp_path, i, dora=dora) for i in range(3)), strict=True)
    what = distmerge.soup([distmerge.open(model) for model in models])
    what.save(tmp_path / "much", workers=1, out_dtype="float32")
    found = tensors_at(tmp_path / "much")
    for key, tensor in found.items():
        mean = sum(part[key] for part in wanted) / 3
        assert torch.allclose(tensor.double(), mean, rtol=1e-5, atol=1e-4), key
    if memory == "little":
        allowed = least_memory(what, workers=2)
        what.save(tmp_path / "little", workers=2, out_dtype="float32", allowed_mem=allowed)
        assert same_tensors(found, tensors_at(tmp_path / "little")) == []


@pytest.mark.usefixtures("fixed_reserve")
def test_methods_with_questions_see_the_same_bits_however_it_is_read(tmp_path):
    models = [adapted(tmp_path, i)[0] for i in range(3)]
    what = distmerge.ties([distmerge.open(model) for model in models], k=0.3)
    what.save(tmp_path / "much", workers=2, out_dtype="float32")
    allowed = least_memory(what, workers=1)
    what.save(tmp_path / "little", workers=1, out_dtype="float32", allowed_mem=allowed)
    assert same_tensors(tensors_at(tmp_path / "much"), tensors_at(tmp_path / "little")) == []


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("magnitude", [False, True])
def test_any_run_of_a_view_is_that_run_of_the_whole(tmp_path, swapped, magnitude):
    base = {"x.weight": torch.randn(12, 10, generator=torch.Generator().manual_seed(0))}
    inputs, outputs = (12, 10) if swapped else (10, 12)
    tensors = pair("x", torch.empty(outputs, inputs), 1)
    if magnitude:
        tensors["base_model.model.x.lora_magnitude_vector"] = torch.rand(outputs)
    adapter = by_hand(tmp_path / "adapter", tensors)
    place = save_model(base, tmp_path / "base")
    view = open_checkpoint(f"{place}+{adapter}").presented["x.weight"]
    assert isinstance(view, LowRank)
    assert view.swapped is swapped
    sources = [base["x.weight"], *tensors.values()]

    def made(span: tuple[int, int]) -> Tensor:
        pieces = [sources[n].reshape(-1)[slice(*run)] for n, run in view.needs(span)]
        return view.values(span, pieces)

    whole = made((0, 120))
    a, b = list(tensors.values())[:2]
    delta = 2 * (b.double() @ a.double())
    plain = base["x.weight"].double() + (delta.t() if swapped else delta)
    if magnitude:
        norms = plain.norm(dim=0 if swapped else 1, keepdim=True)
        plain *= tensors["base_model.model.x.lora_magnitude_vector"].view(norms.shape) / norms
    assert torch.allclose(whole.double().view(12, 10), plain, rtol=1e-5, atol=1e-5)
    if not view.whole:
        for span in [(0, 10), (3, 4), (9, 31), (110, 120), (0, 119)]:
            assert torch.allclose(made(span), whole[slice(*span)], rtol=1e-6), span


def test_a_bin_adapter_is_read_too(tmp_path):
    model, wanted = adapted(tmp_path, 0)
    folder = tmp_path / "adapter0"
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    found = distmerge.open(model).collect(["c.weight"])["c.weight"]
    assert torch.allclose(found.double(), wanted["c.weight"], rtol=2**-8, atol=1e-4)


def recipe(base: Any, *models: Any, **fields: Any) -> dict[str, Any]:
    listed = [{"model": m, "parameters": {"weight": 1.0}} for m in models]
    return {"merge_method": "task_arithmetic", "base_model": base, "models": listed, **fields}


@pytest.mark.parametrize("kind", ["plain", "dora", "rslora"])
def test_recipes_name_adapters_in_a_string_or_apart_and_as_the_base(tmp_path, kind):
    (first, one), (second, two) = (adapted(tmp_path, i, dora=kind == "dora") for i in range(2))
    if kind == "rslora":  # with a rank whose root is a number, so that the scale is the same
        for i in range(2):
            config = tmp_path / f"adapter{i}/adapter_config.json"
            given = json.loads(config.read_text())
            given |= {"use_rslora": True, "lora_alpha": 2 * given["r"] ** 0.5}
            config.write_text(json.dumps(given))
    base, adapter = second.split("+")
    spelt = {"model": {"path": base}, "lora": {"path": adapter}}
    assert first != second
    distmerge.merge(recipe(first, spelt, dtype="float32"), str(tmp_path / "out"))
    found = tensors_at(tmp_path / "out")
    assert one.keys() == two.keys() == found.keys()
    for key, tensor in found.items():
        assert torch.allclose(tensor.double(), two[key], rtol=1e-5, atol=1e-4), key
    again = recipe({"model": first.split("+")[0], "lora": first.split("+")[1]}, second)
    assert plan(again).digest == plan(recipe(first, spelt)).digest


def test_the_same_base_with_and_without_an_adapter_are_two_models(tmp_path):
    model, wanted = adapted(tmp_path, 0)
    base = model.split("+")[0]
    distmerge.merge(recipe(base, model, dtype="float32"), str(tmp_path / "out"))
    found = tensors_at(tmp_path / "out")
    assert torch.allclose(found["c.weight"].double(), wanted["c.weight"], rtol=1e-5, atol=1e-4)
    manifest = json.loads((tmp_path / "out/distmerge.json").read_text())
    assert [Path(i["url"]).name for i in manifest["inputs"]] == ["base0", "adapter0", "adapter0"]
    assert (tmp_path / "out/README.md").read_text().count("adapter0") >= 2
    assert not (tmp_path / "out/adapter_config.json").exists()


def test_another_scale_is_another_digest(tmp_path):
    model, _ = adapted(tmp_path, 0)
    first = plan(distmerge.open(model)).digest
    config = tmp_path / "adapter0/adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 6', '"lora_alpha": 7'))
    assert plan(distmerge.open(model)).digest != first


def test_a_base_on_the_hub_and_an_adapter_on_s3(tmp_path, hub, s3):
    model, wanted = adapted(tmp_path, 0)
    base, adapter = model.split("+")
    hub.add_repo("loras/base", Path(base))
    hub.add_repo("loras/lora", Path(adapter))
    for path in Path(adapter).iterdir():
        body = path.read_bytes()
        s3.client().put_object(Bucket=s3.bucket, Key=f"lora/{path.name}", Body=body)
    stored = {s3.url(""): s3.storage_options}
    for name in ("loras/base@main+loras/lora@main", f"loras/base+{s3.url('lora')}"):
        found = distmerge.open(name, storage_options=stored).collect(["c.weight"])["c.weight"]
        assert torch.allclose(found.double(), wanted["c.weight"], rtol=2**-8, atol=1e-4)


def test_base_and_adapter_are_pinned_each_to_its_revision(tmp_path, hub):
    (model, wanted), (other, others) = adapted(tmp_path, 0), adapted(tmp_path, 1)
    pairs = [pair.split("+") for pair in (model, other)]
    base, adapter = (hub.add_repo(f"pinned/{name}", pairs[0][i]) for i, name in enumerate("ab"))
    for name, place in zip("ab", pairs[1], strict=True):
        files = {path.name: path.read_bytes() for path in Path(place).iterdir()}
        hub.commit(f"pinned/{name}", files)
    blend: dict[str, Any] = {"merge_method": "passthrough"}
    for named, expected in (
        (f"pinned/a@{base}+pinned/b@{adapter}", wanted),
        ("pinned/a+pinned/b", others),
        ("pinned/a@main+pinned/b@main", others),
    ):
        out = tmp_path / "out"
        blend["models"] = [{"model": named}]
        distmerge.merge(blend, str(out), overwrite=True)
        found = tensors_at(out)
        for key, tensor in expected.items():
            assert torch.allclose(found[key].double(), tensor, rtol=2**-8, atol=1e-4), (named, key)
        pinned = json.loads((out / "distmerge.json").read_text())["inputs"]
        if named.startswith("pinned/a@" + base):
            assert {one["revision"] for one in pinned} == {base, adapter}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another type": ({"peft_type": "LOHA"}, "LOHA"),
    "prompt": ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
    "layers replicated": ({"layer_replication": [[0, 1]]}, "layer_replication"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "parameters": ({"target_parameters": ["experts"]}, "target_parameters"),
    "aLoRA": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    "of the future": ({"use_quantum": True}, "use_quantum"),
    "no rank": ({"r": None}, "r: "),
    "a rank of nothing": ({"r": 0}, "r: "),
    "no number": ({"lora_alpha": math.nan}, "lora_alpha: "),
    "no number of a module": ({"alpha_pattern": {"c": math.inf}}, "alpha_pattern.c: "),
    "a rank of nothing in a module": ({"rank_pattern": {"c": -1}}, "rank_pattern.c: "),
}


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "a fraction": ({"r": 2.7}, "r: .*whole|r: .*integer"),
    "text for a number": ({"r": "3"}, "r: "),
    "infinite rank": ({"r": math.inf}, "r: "),
    "no number": ({"r": math.nan}, "r: "),
    "no rank": ({"r": 0}, "r: "),
    "an endless rank": ({"r": 10**400}, "r: "),
    "true": ({"r": True}, "r: "),
    "infinite alpha": ({"lora_alpha": -math.inf}, "lora_alpha: "),
    "no alpha": ({"lora_alpha": math.nan}, "lora_alpha: "),
    "more than float32 holds": ({"lora_alpha": 1e39}, "lora_alpha: "),
    "a word for yes": ({"use_rslora": "x"}, "use_rslora: "),
    "one for yes": ({"fan_in_fan_out": 1}, "fan_in_fan_out: "),
    "a list of patterns": ({"rank_pattern": ["c"]}, "rank_pattern: "),
    "a pattern for a word": ({"alpha_pattern": {"c": "x"}}, "alpha_pattern.c: "),
    "a pattern for a list": ({"rank_pattern": {"c": [3]}}, "rank_pattern.c: "),
    "a list for a type": ({"peft_type": ["LORA"]}, "LORA"),
    "a list of beginnings": ({"init_lora_weights": ["pissa"]}, "init_lora_weights"),
    "looking around": ({"rank_pattern": {"(?=c)c": 3}}, "can't be matched: '\\(\\?=c"),
    "repeating itself": ({"alpha_pattern": {r"(c)\1": 3}}, "can't be matched"),
    "no expression": ({"rank_pattern": {"(": 3}}, "can't be matched"),
    "a long one": ({"rank_pattern": {"c" * 1001: 3}}, "1,001 characters"),
    "many": ({"rank_pattern": {f"c{i}": 3 for i in range(10_001)}}, "10,001 patterns"),
    "many costly ones": ({"rank_pattern": {f"c+{i}": 3 for i in range(101)}}, "101 patterns"),
    "half a character": ({"rank_pattern": {"\ud800": 3}}, "Unicode"),
}


def refused(folder: Path, config: dict[str, Any], named: str) -> CheckpointError:
    """What opening a model with an adapter of this config raises, which names that."""
    base = save_model(large(), folder / "base")
    adapter = by_hand(folder / "adapter", pair("c", large()["c.weight"], 0), **config)
    with pytest.raises(CheckpointError, match=named) as caught:
        distmerge.open(f"{base}+{adapter}")
    assert "adapter" in str(caught.value)
    return caught.value


@pytest.mark.parametrize("what", ODD)
def test_values_that_peft_never_writes_are_refused(tmp_path, what):
    refused(tmp_path, *ODD[what])


def test_a_pattern_takes_no_longer_than_its_name(tmp_path):
    module = "a" * 5000
    tensor = torch.ones(4, 4)
    base = save_model({f"{module}!.weight": tensor}, tmp_path / "base")
    hostile = {"(a+)+$": 5, "(a|a)*b": 5, "(.*a){40}x": 5, r"(\w{0,9}){0,9}!": 3}
    tensors = pair(f"{module}!", tensor, 0)
    patterns = {"rank_pattern": hostile, "alpha_pattern": hostile}
    adapter = by_hand(tmp_path / "adapter", tensors, **patterns)
    began = time.monotonic()
    found = distmerge.open(f"{base}+{adapter}").collect()
    assert time.monotonic() - began < 10
    a, b = tensors.values()
    assert torch.allclose(found[f"{module}!.weight"], tensor + 2 * b @ a, rtol=1e-5)


def test_patterns_that_would_be_gone_through_for_hours_are_refused(tmp_path):
    modules = [f"m{i}" for i in range(2_100)]
    base = save_model({f"{m}.weight": torch.ones(1, 1) for m in modules}, tmp_path / "base")
    tensors: dict[str, Tensor] = {}
    for module in modules:
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(3, 1)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(1, 3)
    many = {f"x.{i}": 3 for i in range(9_999)}
    adapter = by_hand(tmp_path / "adapter", tensors, rank_pattern=many)
    with pytest.raises(MalformedCheckpoint, match="2,100 modules and too many patterns"):
        distmerge.open(f"{base}+{adapter}")


@pytest.mark.parametrize("what", REFUSED)
def test_what_an_adapter_asks_for_and_isnt_known_is_refused_by_name(tmp_path, what):
    assert refused(tmp_path, *REFUSED[what]).fix


@pytest.mark.parametrize(
    ("tensors", "kind", "named"),
    [
        ({"base_model.model.z.lora_A.weight": torch.ones(3, 5)}, CheckpointError, "z.weight"),
        ({"base_model.model.c.lora_A.weight": torch.ones(3, 4001)}, MalformedCheckpoint, "half"),
        ({"base_model.model.c.lora_Q.weight": torch.ones(3)}, CheckpointError, "lora_Q"),
        (pair("c", torch.empty(63, 4000), 0), CheckpointError, "63 x 4000"),
        (
            {
                "base_model.model.c.lora_A.weight": torch.ones(4, 4001),
                "base_model.model.c.lora_B.weight": torch.ones(63, 4),
            },
            MalformedCheckpoint,
            "r is 3",
        ),
    ],
)
def test_weights_that_dont_fit_are_refused(tmp_path, tensors, kind, named):
    base = save_model(large(), tmp_path / "base")
    adapter = by_hand(tmp_path / "adapter", tensors)
    with pytest.raises(kind, match=named):
        distmerge.open(f"{base}+{adapter}")


def test_places_that_hold_no_adapter_and_two_adapters_are_refused(tmp_path):
    base = save_model(large(), tmp_path / "base")
    with pytest.raises(CheckpointError, match="is not an adapter"):
        distmerge.open(f"{base}+{base}")
    with pytest.raises(CheckpointNotFound):
        distmerge.open(f"{base}+{tmp_path}/nothing")
    with pytest.raises(CheckpointError, match="one adapter"):
        distmerge.open("org/a+org/b+org/c")
    with pytest.raises(RecipeError, match="two adapters"):
        plan(recipe(base, {"model": "org/a+org/b", "lora": "org/c"}))


def test_a_folder_with_a_plus_sign_is_a_folder(tmp_path):
    place = save_model(large(), tmp_path / "c++")
    leaf = distmerge.open(place).expression
    assert isinstance(leaf, Leaf)
    assert not leaf.checkpoint.others
    assert math.isfinite(leaf.checkpoint.nbytes)

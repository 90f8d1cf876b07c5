"""Opening real checkpoints in every layout, and refusing what is none."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from distmerge.checkpoints import local_store
from distmerge.checkpoints.opening import open_checkpoint, open_checkpoints, open_store
from distmerge.errors import CheckpointError, CheckpointNotFound, MalformedCheckpoint, ReadFailed

TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}
CONFIG = {"model_type": "llama", "hidden_size": 8}


def tensors(seed: int = 0, names: str = "abc") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {
        f"model.{name}.weight": torch.randn(5, 3, generator=generator).to(torch.bfloat16)
        for name in names
    }
    return found | {f"model.{names[0]}.steps": torch.arange(7)}


def write_config(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def single(folder: Path) -> dict[str, torch.Tensor]:
    save_file(tensors(), write_config(folder) / "model.safetensors")
    return tensors()


def sharded(folder: Path, shards: int = 3) -> dict[str, torch.Tensor]:
    write_config(folder)
    everything, weight_map = {}, {}
    for n in range(shards):
        part = {f"shard{n}.{k}": v for k, v in tensors(n).items()}
        file = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file)
        everything |= part
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return everything


def torch_single(folder: Path) -> dict[str, torch.Tensor]:
    torch.save(tensors(), write_config(folder) / "pytorch_model.bin")
    return tensors()


def torch_sharded(folder: Path) -> dict[str, torch.Tensor]:
    write_config(folder)
    first, second = tensors(1, "xy"), tensors(2, "zw")
    torch.save(first, folder / "pytorch_model-1.bin")
    torch.save(second, folder / "pytorch_model-2.bin")
    weight_map = dict.fromkeys(first, "pytorch_model-1.bin")
    weight_map |= dict.fromkeys(second, "pytorch_model-2.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return first | second


def torch_old(folder: Path) -> dict[str, torch.Tensor]:
    path = write_config(folder) / "pytorch_model.bin"
    torch.save(tensors(), path, _use_new_zipfile_serialization=False)
    return tensors()


def loose(folder: Path) -> dict[str, torch.Tensor]:
    write_config(folder)
    first, second = tensors(1, "xy"), tensors(2, "zw")
    save_file(first, folder / "part-a.safetensors")
    save_file(second, folder / "part-b.safetensors")
    return first | second


def diffusion(folder: Path) -> dict[str, torch.Tensor]:
    save_file(tensors(), write_config(folder) / "diffusion_pytorch_model.safetensors")
    save_file(tensors(9), folder / "diffusion_pytorch_model.fp16.safetensors")
    return tensors()


LAYOUTS = [single, sharded, torch_single, torch_sharded, torch_old, loose, diffusion]


def read_tensors(checkpoint, options=None) -> dict[str, torch.Tensor]:
    """Every tensor's values, read through the store that a worker would open."""
    store = open_store(checkpoint.root, options, revision=checkpoint.revision)
    found = {}
    for name, info in checkpoint.tensors.items():
        buffer = bytearray(info.stop - info.start)
        store.read_into(checkpoint.files[info.file], info.start, memoryview(buffer))
        assert info.strides is None
        found[name] = torch.frombuffer(buffer, dtype=TORCH[info.dtype]).reshape(info.shape)
    store.close()
    return found


def assert_same(got, expected):
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.fixture(params=["local", "memory", "s3", "hub"])
def put(request, tmp_path, monkeypatch):
    """A function that brings a folder to a kind of place and gives its name there."""
    name = tmp_path.name.replace("_", "-").strip("-")

    def local(folder):
        return str(folder), None

    def memory(folder):
        fsspec.filesystem("memory").put(str(folder), f"/{name}", recursive=True)
        return f"memory://{name}", None

    def s3(folder):
        server = request.getfixturevalue("s3")
        client = server.client()
        for file in sorted(folder.rglob("*")):
            key = f"{name}/{file.relative_to(folder).as_posix()}"
            client.put_object(Bucket=server.bucket, Key=key, Body=file.read_bytes())
        return server.url(name), server.storage_options

    def hub(folder):
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        request.getfixturevalue("hub").add_repo(f"org/{name}", folder)
        return f"org/{name}", None

    yield {"local": local, "memory": memory, "s3": s3, "hub": hub}[request.param]
    if request.param == "memory":
        memory_fs = fsspec.filesystem("memory")
        if memory_fs.exists(f"/{name}"):
            memory_fs.rm(f"/{name}", recursive=True)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_from_every_place(put, tmp_path, layout):
    expected = layout(tmp_path / "model")
    name, options = put(tmp_path / "model")
    checkpoint = open_checkpoint(name, storage_options=options)
    assert_same(read_tensors(checkpoint, options), expected)
    assert checkpoint.config == CONFIG
    assert checkpoint.url == name
    local_files = {p.name: p.stat().st_size for p in (tmp_path / "model").iterdir()}
    assert {path: info.size for path, info in checkpoint.files.items()} == local_files
    assert open_checkpoint(name, storage_options=options).fingerprint == checkpoint.fingerprint
    assert pickle.loads(pickle.dumps(checkpoint)) == checkpoint


def test_tensors_keep_the_order_of_their_files(tmp_path):
    sharded(tmp_path)
    names = list(open_checkpoint(tmp_path).tensors)
    assert [name.split(".")[0] for name in names] == [f"shard{n}" for n in range(3) for _ in "abc."]


def test_preference_is_that_of_from_pretrained(tmp_path):
    torch.save(tensors(3), tmp_path / "pytorch_model.bin")
    assert_same(read_tensors(open_checkpoint(tmp_path)), tensors(3))
    sharded_tensors = sharded(tmp_path)
    assert_same(read_tensors(open_checkpoint(tmp_path)), sharded_tensors)
    single(tmp_path)
    assert_same(read_tensors(open_checkpoint(tmp_path)), tensors())


def test_a_file_or_an_index_may_be_named(tmp_path):
    everything = sharded(tmp_path)
    single(tmp_path)
    torch.save(tensors(4), tmp_path / "other.pt")
    index = open_checkpoint(tmp_path / "model.safetensors.index.json")
    assert_same(read_tensors(index), everything)
    assert "other.pt" in index.files
    alone = open_checkpoint(str(tmp_path / "other.pt"))
    assert_same(read_tensors(alone), tensors(4))
    assert list(alone.files) == ["other.pt"]
    assert alone.root == str(tmp_path)
    assert alone.config is None


def test_a_hub_revision_file_and_folder(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    single(tmp_path / "repo")
    save_file(tensors(5), write_config(tmp_path / "repo/unet") / "model.safetensors")
    first = hub.add_repo("org/revised", tmp_path / "repo")
    hub.commit("org/revised", {"config.json": b'{"model_type": "other"}'})
    assert open_checkpoint("org/revised").config == {"model_type": "other"}
    for old in (
        open_checkpoint(f"org/revised@{first}"),
        open_checkpoint("hf://org/revised", revision=first),
    ):
        assert old.revision == first
        assert old.config == CONFIG
    assert_same(read_tensors(open_checkpoint("hf://org/revised/unet")), tensors(5))
    assert_same(
        read_tensors(open_checkpoint("hf://org/revised/unet/model.safetensors")), tensors(5)
    )


def test_a_cached_snapshot_path_is_a_directory(hub, tmp_path):
    from huggingface_hub import snapshot_download

    single(tmp_path / "repo")
    hub.add_repo("org/cached", tmp_path / "repo")
    snapshot = snapshot_download("org/cached", cache_dir=tmp_path / "cache")
    assert_same(read_tensors(open_checkpoint(snapshot)), tensors())


def test_only_headers_are_read(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = write_config(tmp_path / "big")
    weight_map = {}
    for n in range(4):
        save_file({f"w{n}": torch.zeros(1_000_000)}, folder / f"m{n}.safetensors")
        weight_map[f"w{n}"] = f"m{n}.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    hub.add_repo("org/big", folder)
    with hub.recording() as seen:
        open_checkpoint("org/big")
    assert sum(request.sent_bytes for request in seen) < 4 * 140_000
    assert sum(request.host in hub.storage_url for request in seen) == 4
    assert len(seen) < 20


def test_a_hub_that_cannot_be_reached_is_told_with_what_is_not_here(monkeypatch):
    def unreachable(store):
        raise ReadFailed("Could not read the file list.", fix="try again")

    monkeypatch.setattr("distmerge.checkpoints.hub_store.HubStore.files", unreachable)
    with pytest.raises(ReadFailed, match=r"there is no 'lawx' in /.*, so the Hub was asked"):
        open_checkpoint("lawx")
    with pytest.raises(ReadFailed, match=r"Fix: for a folder: check its path; .* Hub: try again"):
        open_checkpoint("lawx")
    with pytest.raises(ReadFailed) as raised:
        open_checkpoint("hf://org/lawx")
    assert "so the Hub was asked" not in str(raised.value)


def test_several_models_at_once_and_the_first_error_counts(tmp_path):
    for n in range(12):
        save_file(tensors(n), write_config(tmp_path / str(n)) / "model.safetensors")
    names = [tmp_path / str(n) for n in range(12)]
    for n, checkpoint in enumerate(open_checkpoints(names)):
        assert_same(read_tensors(checkpoint), tensors(n))
    with pytest.raises(CheckpointNotFound, match="gone-first"):
        open_checkpoints([names[0], tmp_path / "gone-first", tmp_path / "gone-second"])


# What is no checkpoint --------------------------------------------------------------------------


def test_tied_tensors_of_a_torch_file_are_aliases(tmp_path):
    shared = torch.randn(4, 4)
    torch.save({"wte.weight": shared, "lm_head.weight": shared}, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["wte.weight"]
    assert checkpoint.aliases == {"lm_head.weight": "wte.weight"}


def test_an_index_may_list_an_alias(tmp_path):
    shared = torch.randn(4, 4)
    torch.save({"wte.weight": shared, "lm_head.weight": shared}, tmp_path / "a.bin")
    weight_map = {"wte.weight": "a.bin", "lm_head.weight": "a.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.aliases == {"lm_head.weight": "wte.weight"}
    assert checkpoint.notices == ()


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"readme.md": b"hi"},
        {"sub/model.safetensors": b""},
        {"optimizer.pt": b"", "rng_state_0.pth": b"", "training_args.bin": b""},
    ],
    ids=lambda files: ",".join(files) or "empty",
)
def test_not_a_checkpoint_says_what_is_there(tmp_path, files):
    for path, data in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data)
    with pytest.raises(CheckpointError, match="not a checkpoint") as caught:
        open_checkpoint(tmp_path)
    assert all(path in str(caught.value) for path in files)


def test_an_adapter_alone_is_refused_and_beside_weights_noticed(tmp_path):
    save_file(tensors(), tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        open_checkpoint(tmp_path)
    save_file(tensors(1), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert_same(read_tensors(checkpoint), tensors(1))
    assert any("adapter_model" in notice for notice in checkpoint.notices)


def test_devices_are_no_model():
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=r"^/dev is not a checkpoint"):
        open_checkpoint("/dev")
    assert time.monotonic() - began < 30


def test_folders_count_as_files_do(tmp_path, monkeypatch):
    monkeypatch.setattr(local_store, "MOST_FILES", 20)
    for n in range(21):
        (tmp_path / str(n)).mkdir()
    with pytest.raises(CheckpointError, match="more than 20 files"):
        open_checkpoint(tmp_path)


def test_loose_files_that_share_a_key_are_ambiguous(tmp_path):
    save_file(tensors(), tmp_path / "a.safetensors")
    save_file(tensors(), tmp_path / "b.safetensors")
    with pytest.raises(MalformedCheckpoint, match="more than one file"):
        open_checkpoint(tmp_path)
    assert_same(read_tensors(open_checkpoint(tmp_path / "b.safetensors")), tensors())


def test_a_folder_of_torch_files_of_any_name(tmp_path):
    first, second = tensors(1, "xy"), tensors(2, "zw")
    torch.save(first, tmp_path / "part-1.pt")
    torch.save({"state_dict": second, "epoch": 3}, tmp_path / "part-2.ckpt")
    torch.save({"state": {0: torch.ones(3)}}, tmp_path / "optimizer.pt")
    checkpoint = open_checkpoint(tmp_path)
    assert_same(read_tensors(checkpoint), first | second)
    torch.save(first, tmp_path / "again.bin")
    with pytest.raises(MalformedCheckpoint, match="more than one file"):
        open_checkpoint(tmp_path)


def test_of_loose_files_in_two_formats_safetensors_are_read_and_the_others_noticed(tmp_path):
    save_file(tensors(), tmp_path / "mine.safetensors")
    torch.save(tensors(1), tmp_path / "mine.pt")
    checkpoint = open_checkpoint(tmp_path)
    assert_same(read_tensors(checkpoint), tensors())
    assert checkpoint.notices == ("mine.pt is beside mine.safetensors and not read.",)


# Hostile and broken indexes ---------------------------------------------------------------------


def rewrite_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "target",
    [
        "/etc/passwd",
        "../secret/model.safetensors",
        "..\\secret.safetensors",
        "sub/../../x.safetensors",
        "http://evil/x.safetensors",
        "C:/x.safetensors",
        "",
    ],
)
def test_index_entries_that_point_outside(tmp_path, target):
    save_file(tensors(), write_config(tmp_path / "secret") / "model.safetensors")
    sharded(tmp_path / "model")
    rewrite_index(tmp_path / "model", lambda m: m.update({"shard0.model.a.weight": target}))
    with pytest.raises(MalformedCheckpoint, match="outside"):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("target", [7, None, ["a"]])
def test_an_index_entry_that_is_no_name(tmp_path, target):
    sharded(tmp_path)
    rewrite_index(tmp_path, lambda m: m.update({"shard0.model.a.weight": target}))
    with pytest.raises(MalformedCheckpoint, match="doesn't name a file for every") as raised:
        open_checkpoint(tmp_path)
    assert "'shard0.model.a.weight'" in str(raised.value)
    assert raised.value.fix


@pytest.mark.parametrize("text", ["nonsense", "[]", '"\\ud800"'])
def test_a_config_that_is_no_json_object_has_a_fix(tmp_path, text):
    sharded(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(MalformedCheckpoint, match=r"config\.json is not") as raised:
        open_checkpoint(tmp_path)
    assert "fetch or copy the checkpoint again" in str(raised.value.fix)


def test_missing_shards_are_named(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(MalformedCheckpoint, match="1 of the 3") as caught:
        open_checkpoint(tmp_path)
    assert "model-00002-of-00003.safetensors" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_shard_cut_short_is_named(tmp_path):
    sharded(tmp_path)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(MalformedCheckpoint, match="model-00002-of-00003"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{" * 100_000, "\xff", "null"],
    ids=range(8),
)
def test_an_index_that_is_none(tmp_path, text):
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(MalformedCheckpoint, match="index"):
        open_checkpoint(tmp_path)


def test_an_absurdly_large_index_is_not_read(tmp_path):
    sharded(tmp_path)
    with (tmp_path / "model.safetensors.index.json").open("r+b") as file:
        file.truncate(200_000_001)
    with pytest.raises(MalformedCheckpoint, match="too large"):
        open_checkpoint(tmp_path)


def test_a_key_that_its_file_lacks(tmp_path):
    sharded(tmp_path)
    rewrite_index(
        tmp_path,
        lambda m: m.update({"shard0.model.a.weight": "model-00003-of-00003.safetensors"}),
    )
    with pytest.raises(MalformedCheckpoint, match=r"1 tensors that their files don't hold"):
        open_checkpoint(tmp_path)


def test_keys_that_the_index_forgot_are_used_and_noticed(tmp_path):
    everything = sharded(tmp_path)
    rewrite_index(tmp_path, lambda m: m.pop("shard1.model.b.weight"))
    checkpoint = open_checkpoint(tmp_path)
    assert_same(read_tensors(checkpoint), everything)
    assert any("shard1.model.b.weight" in notice for notice in checkpoint.notices)


def test_the_index_decides_between_two_holders(tmp_path):
    everything = sharded(tmp_path)
    path = tmp_path / "model-00001-of-00003.safetensors"
    twice = load_file(path) | {"shard1.model.b.weight": torch.zeros(5, 3, dtype=torch.bfloat16)}
    save_file(twice, path)
    assert_same(read_tensors(open_checkpoint(tmp_path)), everything)
    rewrite_index(tmp_path, lambda m: m.pop("shard1.model.b.weight"))
    with pytest.raises(MalformedCheckpoint, match="more than one file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "\xff", r'{"a": {"b": ["\ud800"]}}', r'{"\udc00": 1}', "[" * 10**5]
)
def test_a_broken_config(tmp_path, text):
    single(tmp_path)
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(MalformedCheckpoint, match=r"config\.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "data", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\0" * 600]
)
def test_weights_that_are_none(tmp_path, data):
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MalformedCheckpoint, match=name.replace(".", r"\.")):
            open_checkpoint(tmp_path / name)


# What is not there ------------------------------------------------------------------------------


def test_a_bare_name_is_neither_here_nor_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointNotFound, match="here or on the Hub") as caught:
        open_checkpoint("org/no-such-model")
    assert str(tmp_path) in str(caught.value)
    assert caught.value.fix
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointNotFound, match="HF_HUB_OFFLINE"):
        open_checkpoint("org/no-such-model")


def test_a_one_segment_id(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    single(tmp_path / "repo")
    sha = hub.add_repo("tiny-gpt", tmp_path / "repo")
    checkpoint = open_checkpoint("tiny-gpt@main")
    assert checkpoint.revision == sha
    assert checkpoint.root == "hf://tiny-gpt"
    assert_same(read_tensors(checkpoint), tensors())
    shutil.copytree(tmp_path / "repo", tmp_path / "tiny-gpt")
    assert open_checkpoint("tiny-gpt").revision is None


def test_missing_files_by_url(s3):
    for name in ("absent/model.safetensors", "absent", "absent/model.safetensors.index.json"):
        with pytest.raises(CheckpointNotFound, match="absent"):
            open_checkpoint(s3.url(name), storage_options=s3.storage_options)
    with pytest.raises(CheckpointNotFound):
        open_checkpoint("memory://absent")


@pytest.mark.parametrize("kind", ["folder", "no archive", "nothing"])
def test_an_archive_that_is_none(tmp_path, kind):
    place = tmp_path / kind
    if kind == "folder":
        place.mkdir()
    elif kind == "no archive":
        place.write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(f"zip://x::{place}")
    assert kind in raised.value.headline
    assert raised.value.fix


def test_an_unknown_scheme():
    with pytest.raises(CheckpointError, match="nosuchscheme"):
        open_checkpoint("nosuchscheme://x/y")

"""Which files of the donor come along, and that they arrive unchanged."""

import os
from pathlib import Path

import pytest
import xxhash
from run.family import names_below, save_model
from run.merging import small_models

import distmerge
from distmerge.checkpoints.local_store import LocalStore
from distmerge.checkpoints.tensors import Checkpoint, FileInfo, TensorInfo
from distmerge.errors import DistmergeError
from distmerge.run.merge import plan
from distmerge.write import donor_files
from distmerge.write.donor_files import copy_donor_files, files_to_copy, skipped_files
from distmerge.write.output import open_output


def _paths(text):
    return text.split()


COPIED = _paths("""
    tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json
    vocab.txt merges.txt tokenizer.model spiece.model sentencepiece.bpe.model source.spm
    tokenizer.model.v3 tekken.json chat_template.jinja chat_template.json
    additional_chat_templates/tool_use.jinja preprocessor_config.json processor_config.json
    video_preprocessor_config.json generation_config.json configuration_custom.py
    modeling_custom.py nested/code/module.py 1_Pooling/config.json modules.json
    sentence_bert_config.json config_sentence_transformers.json unet/config.json model_index.json
    scheduler/scheduler_config.json LICENSE LICENSE.txt USE_POLICY.md NOTICE docs/README.md
    images/figure.png stopwords.pt.json vocab.pt.txt params.json figure.xml onnx/config.json
    speaker_embeddings/de_1.npy original/params.json original/tokenizer.model special.index.txt
""")

WEIGHTS = _paths("""
    model.safetensors model-00001-of-00002.safetensors model.safetensors.index.json
    model.fp16.safetensors model.safetensors.index.fp16.json consolidated.safetensors
    pytorch_model.bin pytorch_model-00001-of-00002.bin pytorch_model.bin.index.json
    adapter_model.safetensors adapter_model.bin 2_Dense/model.safetensors 2_Dense/pytorch_model.bin
    weights.pt original/consolidated.00.pth last.ckpt tf_model.h5 tf_model.h5.index.json
    flax_model.msgpack flax_model.msgpack.index.json model.onnx onnx/model.onnx
    onnx/model.onnx_data onnx/model.onnx.data onnx/model_fp16.onnx_data_1 model.Q4_K_M.gguf
    model.gguf.part1of2 ggml-model-q4_0.bin model.ggml model.tflite rust_model.ot weights.npz
    model.params model_state.pdparams coreml/model.mlmodel coreml/m.mlpackage/Manifest.json
    coreml/m.mlpackage/Data/com.apple.CoreML/weights/weight.bin openvino_model.xml
    openvino_model.bin saved_model/saved_model.pb saved_model/variables/variables.index
    saved_model/variables/variables.data-00000-of-00001 model.ckpt-1000.index model.ckpt-1000.meta
    MODEL.SAFETENSORS model.safetensors.incomplete graph.xml graph.bin
""")

TRAINING = _paths("""
    optimizer.pt optimizer.bin scheduler.pt scaler.pt rng_state.pth rng_state_0.pth
    trainer_state.json training_args.bin training_args.json checkpoint-500/tokenizer.json
    global_step100/mp_rank_00_model_states.pt runs/Jan01/events.out.tfevents.1.host
    optimizer_0.safetensors
""")

NOT_TAKEN_OVER = _paths("""
    config.json distmerge.json mergekit_config.yml .distmerge/abc/receipt.json README.md readme.md
    .gitattributes .gitignore .git/config .github/workflows/ci.yml adapter_config.json
    .cache/huggingface/download/tokenizer.json.lock __pycache__/modeling_custom.cpython-311.pyc
    ../outside.json /etc/passwd
""")


def listing(paths, size=100):
    return {path: FileInfo(path, size, "tag") for path in paths}


def test_exactly_the_files_that_are_not_weights_are_copied():
    files = listing(COPIED + WEIGHTS + TRAINING + NOT_TAKEN_OVER)
    assert [info.path for info in files_to_copy(files)] == sorted(COPIED)


def test_every_file_is_copied_or_has_a_reason():
    files = listing(COPIED + WEIGHTS + TRAINING + NOT_TAKEN_OVER)
    reasons = skipped_files(files)
    assert {info.path for info in files_to_copy(files)} | set(reasons) == set(files)
    assert all(reasons[path] == "weights or their index" for path in WEIGHTS)
    assert all(reasons[path] == "training state" for path in TRAINING)
    assert "adapter" in reasons["adapter_config.json"]


def test_an_xml_is_an_openvino_graph_only_beside_its_weights():
    assert [info.path for info in files_to_copy(listing(["figure.xml", "a/graph.xml"]))] == [
        "a/graph.xml",
        "figure.xml",
    ]


def test_a_huge_unknown_file_stays_behind_with_its_size():
    files = listing(["blob.dat"], size=3 << 30)
    assert files_to_copy(files) == []
    assert skipped_files(files)["blob.dat"].startswith("3.0 GiB")


@pytest.fixture
def donor(tmp_path):
    folder = tmp_path / "donor"
    contents = {
        "tokenizer.json": b'{"a": 1}',
        "spiece.model": bytes(range(256)) * 40,
        "1_Pooling/config.json": b"{}",
        "empty.txt": b"",
        "config.json": b"{}",
        "weights-of-no-known-name": b"12345678",
        "model.safetensors": b"x" * 64,
    }
    for path, content in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    store = LocalStore(str(folder))
    tensors = {"w": TensorInfo("F32", (2,), "weights-of-no-known-name", 0, 8)}
    return Checkpoint(str(folder), str(folder), tensors, store.files()), store


@pytest.mark.parametrize("piece", [1000, 8 << 20])
def test_copies_arrive_byte_for_byte_with_their_checksums(donor, tmp_path, monkeypatch, piece):
    monkeypatch.setattr(donor_files, "PIECE_BYTES", piece)
    checkpoint, store = donor
    copied = copy_donor_files(checkpoint, store, open_output(str(tmp_path / "out"), None))
    paths = ["1_Pooling/config.json", "empty.txt", "spiece.model", "tokenizer.json"]
    assert list(copied) == paths
    for path in paths:
        original = (Path(checkpoint.root) / path).read_bytes()
        assert (tmp_path / "out" / path).read_bytes() == original
        assert copied[path] == f"xxh3_128:{xxhash.xxh3_128_hexdigest(original)}"
    written = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(written) == len(paths)


def test_a_file_that_changes_under_the_copy_is_an_error_and_leaves_nothing(
    donor, tmp_path, monkeypatch
):
    monkeypatch.setattr(donor_files, "PIECE_BYTES", 1000)
    checkpoint, store = donor
    (Path(checkpoint.root) / "spiece.model").write_bytes(b"cut short")
    output = open_output(str(tmp_path / "out"), None)
    with pytest.raises(DistmergeError):
        copy_donor_files(checkpoint, store, output)
    assert not any("spiece" in file.name for file in (tmp_path / "out").rglob("*"))


@pytest.fixture
def linked(tmp_path):
    """A model whose weights and tokenizer are links, with others that lead away."""
    theirs, folder = tmp_path / "theirs", Path(save_model(small_models(1)[0], tmp_path / "model"))
    (theirs / "keys").mkdir(parents=True)
    (theirs / "keys/id").write_text("secret")
    (theirs / "vocab.json").write_text("{}")
    (folder / "model.safetensors").rename(theirs / "weights")
    (folder / "own").mkdir()
    (folder / "own/part.txt").write_text("own")
    for name, target in (
        ("model.safetensors", "../theirs/weights"),
        ("vocab.json", "../theirs/vocab.json"),
        ("source.spm", "../theirs/keys/id"),
        ("notes.txt", "../theirs/keys/id"),
        ("optimizer.pt", "../theirs/keys/id"),
        ("ml", str(theirs / "keys")),
        ("again.txt", "own/part.txt"),
    ):
        (folder / name).symlink_to(target)
    return folder


def test_of_links_that_lead_away_only_a_models_files_are_followed(linked, tmp_path):
    made = {"merge_method": "linear", "models": [str(linked)], "parameters": {"weight": 1.0}}
    told = [text for text in plan(made).request.warnings if "another place" in text]
    assert [text.split(" of ")[0] for text in told] == ["ml, notes.txt, source.spm"]
    distmerge.merge(made, str(tmp_path / "out"))
    assert {"vocab.json", "again.txt", "own/part.txt"} <= names_below(tmp_path / "out")
    assert b"secret" not in {p.read_bytes() for p in (tmp_path / "out").rglob("*.*")}
    assert not names_below(tmp_path / "out") & {"notes.txt", "source.spm", "ml/id"}


def test_a_snapshot_of_the_hub_cache_is_links_to_its_blobs(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/c0ffee"
    (snapshot / "1_Pooling").mkdir(parents=True)
    blobs.mkdir()
    for path in ("notes.txt", "1_Pooling/any.txt"):
        (blobs / Path(path).name).write_text(path)
        (snapshot / path).symlink_to(
            os.path.relpath(blobs / Path(path).name, (snapshot / path).parent)
        )
    (tmp_path / "by-another-name").symlink_to(snapshot)
    for root in (snapshot, tmp_path / "by-another-name"):
        store = LocalStore(str(root))
        assert set(store.files()) == {"notes.txt", "1_Pooling/any.txt"}
        assert store.left_out() == {}
    assert set(LocalStore(str(snapshot / "1_Pooling")).files()) == {"any.txt"}


@pytest.mark.parametrize("store", [".git/annex/objects/Xk/9Q/SHA256E-s2--ab.json", ".dvc/cache/ab"])
def test_links_into_a_store_that_names_files_by_content_are_followed(tmp_path, store):
    kept, folder = tmp_path / store, tmp_path / "model"
    for made in (kept.parent, folder):
        made.mkdir(parents=True)
    kept.write_text("{}")
    names = {"config.json", "target.spm", "tokenizer.model.v3", "bpe.codes"}
    for name in (*names, "notes.txt"):
        (folder / name).symlink_to(kept)
    assert set(LocalStore(str(folder)).files()) == names


def test_many_links_that_are_left_are_one_warning(tmp_path):
    folder = Path(save_model(small_models(1)[0], tmp_path / "model"))
    (tmp_path / "x").write_text("x")
    for number in range(40):
        (folder / f"note\n{number}.txt").symlink_to(tmp_path / "x")
    made = {"merge_method": "linear", "models": [str(folder)], "parameters": {"weight": 1.0}}
    (told,) = [text for text in plan(made).request.warnings if "another place" in text]
    assert "more of " in told
    assert "aren't copied" in told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("name", "how", "told"),
    [
        ("config.json", "folder", "is a folder"),
        ("config.json", "pipe", "is no regular file"),
        ("tokenizer.json", "{", "is no JSON object"),
        ("tokenizer.json", "version https://git-lfs" + " " * (1 << 20), "is no JSON object"),
    ],
)
def test_a_donors_file_that_is_none_is_warned_of(tmp_path, name, how, told):
    folder = Path(save_model(small_models(1)[0], tmp_path / "model"))
    (folder / name).unlink(missing_ok=True)
    if how == "folder":
        (folder / name).mkdir()
    elif how == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).write_text(how)
    made = {"merge_method": "linear", "models": [str(folder)], "parameters": {"weight": 1.0}}
    warnings = plan(made).request.warnings
    assert any(text.startswith(f"{name} of ") and told in text for text in warnings)

"""What people type, and where it leads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distmerge.checkpoints.location import (
    Location,
    is_far,
    is_safe_path,
    locate,
    split_hub_root,
)
from distmerge.credentials import redact
from distmerge.errors import CheckpointError, CheckpointNotFound


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with a model, a file with a space and a folder named like a Hub id."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("legal model/model.safetensors", "org/name/model.safetensors", "a@b/x.bin"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(b"")
    return tmp_path


def local(here: Path, path: str, file: str | None = None) -> Location:
    return Location("local", str(here / path), file=file)


@pytest.mark.parametrize("name", ["legal model", "./legal model/", "~/legal model", "file://{}"])
def test_directories(here, name):
    assert locate(name.format(here / "legal model")) == local(here, "legal model")
    assert locate(here / "legal model") == local(here, "legal model")


def test_encoded_file_url(here):
    assert locate(f"file://{here}/legal%20model") == local(here, "legal model")
    assert locate(f"file://{here}/a@b/x.bin") == local(here, "a@b", "x.bin")


def test_single_file_and_index(here):
    (here / "org/name/model.safetensors.index.json").write_text("{}")
    assert locate("legal model/model.safetensors") == local(
        here, "legal model", "model.safetensors"
    )
    assert locate("org/name/model.safetensors.index.json").file == "model.safetensors.index.json"


def test_a_directory_wins_over_a_hub_id(here):
    assert locate("org/name") == local(here, "org/name")
    assert locate("a@b") == local(here, "a@b")
    assert locate("hf://org/name") == Location("hub", "hf://org/name")


@pytest.mark.parametrize(
    ("name", "root", "revision"),
    [
        ("org/other", "hf://org/other", None),
        ("org/other/", "hf://org/other", None),
        ("org/other@v1.0", "hf://org/other", "v1.0"),
        ("gpt2", "hf://gpt2", None),
        ("gpt2@refs/pr/3", "hf://gpt2", "refs/pr/3"),
        ("Org-1/a.b_c-d", "hf://Org-1/a.b_c-d", None),
    ],
)
def test_bare_hub_ids(here, name, root, revision):
    assert locate(name) == Location("hub", root, revision=revision, bare=True)


@pytest.mark.parametrize(
    ("name", "root", "file", "revision"),
    [
        ("hf://org/m", "hf://org/m", None, None),
        ("hf://org/m@abc/", "hf://org/m", None, "abc"),
        ("hf://org/m@a%2Fb/unet", "hf://org/m/unet", None, "a/b"),
        ("hf://org/m@refs/pr/7/unet/x.bin", "hf://org/m/unet", "x.bin", "refs/pr/7"),
        ("hf://org/m/x.safetensors", "hf://org/m", "x.safetensors", None),
        ("hf://gpt2@main/x.safetensors", "hf://gpt2", "x.safetensors", "main"),
    ],
)
def test_hub_urls(name, root, file, revision):
    assert locate(name) == Location("hub", root, file=file, revision=revision)


@pytest.mark.parametrize(
    ("name", "root", "file"),
    [
        ("s3://bucket/a b/", "s3://bucket/a b", None),
        ("s3://bucket", "s3://bucket", None),
        ("s3://bucket/x.safetensors", "s3://bucket", "x.safetensors"),
        ("s3://bucket/x.ckpt/", "s3://bucket/x.ckpt", None),
        ("memory://m/pytorch_model.bin", "memory://m", "pytorch_model.bin"),
        ("memory://model.safetensors", "memory://", "model.safetensors"),
        ("simplecache::s3://b/m", "simplecache::s3://b/m", None),
        ("s3://b/m.safetensors.index.json", "s3://b", "m.safetensors.index.json"),
    ],
)
def test_urls(name, root, file):
    assert locate(name) == Location("url", root, file=file)


@pytest.mark.parametrize(
    "name",
    ["./gpt2", "/no/where", "a/b/c", "C:\\models\\legal", "~/gpt2", "nope.safetensors", "o/x.bin"],
)
def test_paths_that_are_not_there(here, name):
    with pytest.raises(CheckpointNotFound, match="no file or directory"):
        locate(name)


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "pipe"])
def test_what_is_no_file_of_bytes_is_refused(here, name):
    os.mkfifo("pipe")
    with pytest.raises(CheckpointError, match=f"'{name}' is neither a directory nor a regular"):
        locate(name)


@pytest.mark.parametrize("name", ["/", "//", "/tmp/..", "file:///"])
def test_all_of_the_machine_is_no_model(name):
    with pytest.raises(CheckpointError, match="all of this machine"):
        locate(name)


def test_a_user_that_is_not_there(here):
    with pytest.raises(CheckpointNotFound, match="no file or directory '~nobody-of"):
        locate("~nobody-of-that-name/model")


def test_a_path_object_is_never_a_hub_id(here):
    with pytest.raises(CheckpointNotFound):
        locate(Path("gpt2"))


@pytest.mark.parametrize(
    "name", ["", "  ", "hf://", "hf://org/m@", "hf://org/m/../x", "hf://a b/c"]
)
def test_names_that_mean_nothing(name):
    with pytest.raises(CheckpointError):
        locate(name)


def test_two_revisions_or_one_for_a_directory(here):
    assert locate("gpt2@v1", revision="v1").revision == "v1"
    assert locate("gpt2", revision="v1").revision == "v1"
    with pytest.raises(CheckpointError, match="two revisions"):
        locate("gpt2@v1", revision="v2")
    with pytest.raises(CheckpointError, match="no revisions"):
        locate("legal model", revision="v2")
    with pytest.raises(CheckpointError, match="no revisions"):
        locate("s3://bucket/x", revision="v2")


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        ("ftp://user:hunter22@host/model", "hunter22"),
        ("https://host/m.safetensors?X-Amz-Signature=abcdef01&x=1", "abcdef01"),
        ("https://host/m.bin?a=1&Policy=p&Key-Pair-Id=KEYID", "KEYID"),
    ],
)
def test_credentials_in_urls_are_refused_and_not_repeated(url, secret):
    with pytest.raises(CheckpointError, match="credentials") as caught:
        locate(url)
    assert secret not in str(caught.value)
    assert secret not in redact(f"GET {url} failed")


def test_redaction_keeps_the_rest():
    assert redact("s3://bucket/a@b.c:d/x") == "s3://bucket/a@b.c:d/x"
    assert redact("Bearer hf_abcdefghijklmnop said") == "Bearer *** said"
    assert redact("token hf_abcdefghijklmnop!") == "token hf_***!"


def test_hub_roots_come_apart():
    assert split_hub_root("hf://org/m") == ("org/m", "")
    assert split_hub_root("hf://org/m/a/b") == ("org/m", "a/b")
    assert split_hub_root("hf://gpt2") == ("gpt2", "")


@pytest.mark.parametrize(
    "path",
    ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./x", "C:x", "a\\b", "s3://b/x", "a\0"],
)
def test_unsafe_paths(path):
    assert not is_safe_path(path)


@pytest.mark.parametrize("path", ["x", "a/b.json", "..x", "a b/c:d", ".distmerge/lease"])
def test_safe_paths(path):
    assert is_safe_path(path)
    assert os.path.normpath(path) == path


@pytest.mark.parametrize(
    ("root", "far"),
    [
        ("/models/law", False),
        ("file:///models/law", False),
        ("memory://shelf", False),
        ("s3://bucket/law", True),
        ("hf://org/law", True),
        ("simplecache::s3://bucket/law", True),
    ],
)
def test_what_is_behind_a_network(root, far):
    assert is_far(root) is far


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000, "/" + "y" * 300, "a\0b", "circle"])
def test_names_that_no_file_system_has(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(CheckpointError) as caught:
        locate(name)
    assert len(str(caught.value)) < 1200
    assert caught.value.fix

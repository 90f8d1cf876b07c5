"""The manifest: what it keeps, what it leaves out, and that it notices a change to itself."""

import json
import random
import re
from datetime import UTC, datetime

import pytest
import torch
import xxhash

from distmerge.checkpoints.tensors import Checkpoint, FileInfo, TensorInfo
from distmerge.credentials import redact
from distmerge.errors import VerificationFailed
from distmerge.write.manifest import (
    InputRecord,
    Manifest,
    ShardRecord,
    SkippedTensor,
    checksum,
    library_versions,
)

NOTHING = f"xxh3_128:{xxhash.xxh3_128_hexdigest(b'')}"


def checkpoint(url="org/base"):
    return Checkpoint(
        url,
        "/somewhere/else",
        {"w": TensorInfo("F32", (2,), "model.safetensors", 80, 88)},
        {
            "model.safetensors": FileInfo("model.safetensors", 88, "etag", "v7"),
            "tokenizer.json": FileInfo("tokenizer.json", 5, "other"),
        },
        revision="3f1c",
    )


def manifest(**changes):
    fields = {
        "distmerge_version": "0.1.0",
        "expression": "org/base + 0.5 * (org/légal - org/base)",
        "digest": "abc",
        "recipe": "merge_method: linear\n",
        "seed": 7,
        "inputs": [InputRecord.of(checkpoint())],
        "kernel": "cpu:AVX512",
        "shards": [ShardRecord(file="model.safetensors", size=88, checksum=NOTHING, tensors=["w"])],
        "files": {"config.json": NOTHING},
        "skipped": [SkippedTensor(model="org/base", key="b", reason="a buffer")],
        "lost_delta_share": 0.25,
        "methods": {"linear": "123"},
        "created": datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC),
    }
    return Manifest(**{**fields, **changes})


def test_what_is_written_is_plain_json_with_every_field():
    written = json.loads(manifest().to_json())
    assert list(written) == [
        "format_version", "distmerge_version", "expression", "digest", "recipe", "seed", "inputs",
        "versions", "kernel", "out_dtype", "shards", "files", "mappings", "skipped",
        "lost_delta_share", "methods", "created", "checksum",
    ]  # fmt: skip
    assert written["created"] == "2025-01-02T03:04:05Z"
    assert written["inputs"] == [
        {
            "url": "org/base",
            "revision": "3f1c",
            "fingerprint": checkpoint().fingerprint,
            "files": {"model.safetensors": {"size": 88, "tag": "etag", "version": "v7"}},
        }
    ]
    assert written["versions"]["torch"] == torch.__version__
    assert "/somewhere/else" not in manifest().to_json().decode()


def test_it_reads_back_equal_and_writes_the_same_bytes():
    data = manifest().to_json()
    assert Manifest.from_json(data) == manifest()
    assert Manifest.from_json(data).to_json() == data


def test_created_is_now_unless_given():
    now = manifest(created=datetime.now(UTC)).created
    fields = manifest().model_dump(exclude={"created"})
    assert abs((Manifest(**fields).created - now).total_seconds()) < 60


def test_its_own_checksum_is_that_of_the_bytes_with_the_checksum_blanked():
    data = manifest().to_json()
    said = json.loads(data)["checksum"]
    blank = re.sub(rb'xxh3_128:\w+(?="\n}\n$)', b"xxh3_128:" + b"0" * 32, data)
    assert said == f"xxh3_128:{xxhash.xxh3_128_hexdigest(blank)}"
    assert checksum(b"abc") == f"xxh3_128:{xxhash.xxh3_128_hexdigest(b'abc')}"


def test_a_flipped_bit_anywhere_is_noticed():
    data = manifest().to_json()
    chosen = random.Random(0)
    for place in range(len(data)):
        altered = bytearray(data)
        altered[place] ^= 1 << chosen.randrange(8)
        with pytest.raises(VerificationFailed, match=r"distmerge\.json"):
            Manifest.from_json(bytes(altered))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "no format_version"),
        (b'{"format_version": "1"}', "no format_version"),
        (b'{"format_version": 2}', "of format 2"),
        (b'{"format_version": 1}', "own checksum"),
    ],
)
def test_what_is_no_manifest_is_refused_with_a_reason(data, said):
    with pytest.raises(VerificationFailed, match=said):
        Manifest.from_json(data)


def test_a_manifest_with_a_field_missing_is_refused_by_name():
    fields = {**json.loads(manifest().to_json()), "checksum": f"xxh3_128:{'0' * 32}"}
    del fields["seed"]
    blank = (json.dumps(fields, indent=2) + "\n").encode()
    with pytest.raises(VerificationFailed) as caught:
        Manifest.from_json(blank.replace(b"0" * 32, xxhash.xxh3_128_hexdigest(blank).encode()))
    assert any(fact.startswith("seed:") for fact in caught.value.facts)


def test_checksums_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="checksum"):
        ShardRecord(file="a", size=1, checksum="sha256:00", tensors=[])


SECRETS = [
    ("s3://KEYID:wJalr/XUtn+FEMI@bucket/m", "s3://***@bucket/m"),
    ("https://user:pass@host:80/m", "https://***@host:80/m"),
    ("https://token@host/m", "https://***@host/m"),
    ("https://h/m?sig=abc%2B&a=1", "https://h/m?sig=***&a=1"),
    ("https://h/m?X-Amz-Credential=AA&X-Amz-Signature=bb", None),
    ("secret: wJalrXUtn", "secret: ***"),
    ("{aws_secret_access_key: wJalr, a: 1}", "{aws_secret_access_key: ***, a: 1}"),
    ('"hf_token": "hf_abcdefghij"', '"hf_token": ***'),
    ("api_key='two words'", "api_key=***"),
    ("AKIAIOSFODNN7EXAMPLE", "***"),
]


@pytest.mark.parametrize(("text", "expected"), SECRETS)
def test_credentials_are_taken_out(text, expected):
    hidden = redact(text)
    assert "***" in hidden
    if expected is not None:
        assert hidden == expected
    for secret in ("wJalr", "pass", "abc%2B", "=AA", "=bb", "abcdefghij", "two words", "AKIA"):
        assert secret not in hidden
    assert redact(hidden) == hidden


@pytest.mark.parametrize(
    "text",
    [
        "hf://org/name@main",
        "hf://gpt2@main",
        "org/a@v1 + 0.5 * (s3://bucket/b - org/a@v1)",
        "http://host:9000/bucket/model@v2",
        "s3://bucket/a:b@c",
        "tokenizer:\n  source: union\n  tokens:\n    <|im_end|>:\n      source: org/a",
        "kind: model_token\ntoken: <|im_start|>",
        "merge_method: ties\nparameters: {density: 0.2}",
    ],
)
def test_what_holds_no_credentials_stays(text):
    assert redact(text) == text


def test_nothing_stored_in_a_manifest_holds_credentials():
    secret = "s3://KEYID:wJalr/XUtn@bucket/m"
    data = manifest(
        expression=f"0.5 * {secret}",
        recipe=f"models: [{{model: {secret}}}]",
        inputs=[InputRecord.of(checkpoint(secret))],
        mappings=[f"a of {secret} is b"],
        skipped=[SkippedTensor(model=secret, key="k", reason="r")],
    ).to_json()
    assert b"wJalr" not in data
    assert b"KEYID" not in data
    assert data.count(b"s3://***@bucket/m") == 5


def test_versions_are_those_of_what_is_installed():
    versions = library_versions()
    assert versions["torch"] == torch.__version__
    assert {"python", "safetensors", "transformers"} <= set(versions)

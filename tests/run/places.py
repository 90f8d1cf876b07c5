"""The kinds of places that a merge may go to, for tests that hold for all of them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from run.family import names_below

BEFORE_A_RECEIPT: Mapping[str, tuple[str, str, int]] = {
    kind: (f"{output}.write_bytes", r"\.distmerge/.*/model-.*\.json$", 3)
    for kind, output in (("local", "LocalOutput"), ("s3", "FsspecOutput"), ("hub", "HubOutput"))
}
"""For `run_until`: with the third shard written and its receipt not."""


@dataclass
class Place:
    """Where a merge goes, and how to look at it past our own code."""

    kind: str
    url: str
    files: Callable[[], dict[str, bytes]]
    """What readers see, by path; the run's own files too where they lie beside."""
    unfinished: Callable[[], list[str]]
    """What else is there: uploads, branches, temporary files."""
    options: dict[str, Any] = field(default_factory=dict)

    def names(self) -> set[str]:
        return {*self.files(), *self.unfinished()}

    @property
    def before_a_receipt(self) -> tuple[str, str, int]:
        return BEFORE_A_RECEIPT[self.kind]


@pytest.fixture(params=["local", "s3", "hub"])
def place(request, tmp_path, monkeypatch) -> Iterator[Place]:
    """A place where nothing is yet, of each kind."""
    name = f"place-{uuid.uuid4().hex[:8]}"
    (tmp_path / "space").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "space"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "space"))
    if request.param == "local":
        out = tmp_path / "out"

        def files() -> dict[str, bytes]:
            return {path: (out / path).read_bytes() for path in names_below(out)}

        yield Place("local", str(out), files, list)
    elif request.param == "s3":
        s3 = request.getfixturevalue("s3")

        def objects() -> dict[str, bytes]:
            client, found = s3.client(), {}
            for key in s3.keys(f"{name}/"):
                body = client.get_object(Bucket=s3.bucket, Key=key)["Body"].read()
                found[key.removeprefix(f"{name}/")] = body
            return found

        options = {"storage_options": s3.storage_options}
        yield Place("s3", s3.url(name), objects, lambda: s3.unfinished_uploads(name), options)
    else:
        hub, repo = request.getfixturevalue("hub"), f"org/{name}"
        monkeypatch.setenv("HF_TOKEN", hub.token)

        def published() -> dict[str, bytes]:
            return {k: v for k, v in hub.files(repo).items() if k != ".gitattributes"}

        def unfinished() -> list[str]:
            waiting = [path.name for path in (tmp_path / "space").glob("distmerge-*")]
            return waiting + [branch for branch in hub.branches(repo) if branch != "main"]

        yield Place("hub", f"hf://{repo}", published, unfinished)
        hub.remove_repo(repo)

"""The boundary between uploading clients and repositories: creation, branches, commits."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from aiohttp import web
from servers.hub_answers import STATE, refusal, repository, writer
from servers.hub_reads import MODEL, REPO, commit_asked
from servers.hub_repository import (
    MAIN,
    Blob,
    BlobStore,
    Commit,
    Repository,
    StaleParent,
    UnknownRevision,
    is_large,
)

PART_BYTES = 8 << 20
"""Larger uploads go to storage in parts of this size."""


def add_write_routes(app: web.Application) -> None:
    """The routes that change something."""
    app.router.add_post("/api/repos/create", create_repository)
    app.router.add_delete("/api/repos/delete", delete_repository)
    app.router.add_post("/api/validate-yaml", accept_yaml)
    app.router.add_post(f"{MODEL}/branch/{{branch}}", create_branch)
    app.router.add_delete(f"{MODEL}/branch/{{branch}}", delete_branch)
    app.router.add_post(f"{MODEL}/preupload/{{revision}}", preupload)
    app.router.add_post(f"{MODEL}/commit/{{revision}}", create_commit)
    app.router.add_post(f"/{REPO}.git/info/lfs/objects/batch", start_uploads)
    app.router.add_post("/api/uploads/{sha256}/verify", verify_upload)
    app.router.add_post("/api/uploads/{sha256}/complete", complete_upload)


async def create_repository(request: web.Request) -> web.Response:
    """A new repository with one commit: a `.gitattributes`."""
    user, state, asked = writer(request), request.app[STATE], await request.json()
    repo_id = f"{asked.get('organization') or user.name}/{asked['name']}"
    url = f"{state.endpoint}/{repo_id}"
    if repo_id in state.repositories:
        message = {"error": "You already created this model repo", "url": url}
        return web.json_response(message, status=409)
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    repo = Repository(repo_id, private=private)
    attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
    repo.commit({".gitattributes": state.blobs.add(".gitattributes", attributes)}, "initial commit")
    state.repositories[repo_id] = repo
    return web.json_response({"url": url, "name": repo_id, "id": "0" * 24})


async def delete_repository(request: web.Request) -> web.Response:
    """A repository that is no more."""
    user, state, asked = writer(request), request.app[STATE], await request.json()
    repo_id = f"{asked.get('organization') or user.name}/{asked['name']}"
    if state.repositories.pop(repo_id, None) is None:
        raise refusal(404, "RepoNotFound", "Repository not found")
    return web.json_response({})


async def accept_yaml(request: web.Request) -> web.Response:
    """Model card metadata, never found wanting."""
    return web.json_response({"errors": [], "warnings": []})


async def create_branch(request: web.Request) -> web.Response:
    """A branch at a revision, `main`'s head unless asked otherwise."""
    writer(request)
    repo, name = repository(request), request.match_info["branch"]
    if name in repo.branches:
        raise refusal(409, "", f"Reference already exists: {name}")
    asked = await request.json() if request.can_read_body else {}
    start = asked.get("startingPoint") or MAIN
    try:
        repo.branches[name] = repo.commit_at(start).sha
    except UnknownRevision:
        raise refusal(404, "RevisionNotFound", f"Invalid rev id: {start}") from None
    return web.json_response({})


async def delete_branch(request: web.Request) -> web.Response:
    """A branch that is no more; its commits stay."""
    writer(request)
    repo, name = repository(request), request.match_info["branch"]
    if name == MAIN:
        raise refusal(403, "", "Cannot delete the default branch")
    if repo.branches.pop(name, None) is None:
        raise refusal(404, "RevisionNotFound", f"Invalid rev id: {name}")
    return web.json_response({})


async def preupload(request: web.Request) -> web.Response:
    """For each file: does it travel with the commit or go to the large file storage first?"""
    writer(request)
    present = commit_asked(request, repository(request)).files
    answers = []
    for file in (await request.json())["files"]:
        path = file["path"]
        mode = "lfs" if is_large(path, file["size"]) else "regular"
        answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        if path in present:
            answer["oid"] = present[path].etag
        answers.append(answer)
    return web.json_response({"files": answers})


async def start_uploads(request: web.Request) -> web.Response:
    """Where to send each large file, or nowhere if storage has it."""
    writer(request)
    repository(request)
    state, asked = request.app[STATE], await request.json()
    objects = []
    for wanted in asked["objects"]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if not state.blobs.holds(wanted["oid"]):
            answer["actions"] = _upload_actions(request, wanted["oid"], wanted["size"])
        objects.append(answer)
    return web.json_response(
        {"transfer": "basic", "objects": objects}, content_type="application/vnd.git-lfs+json"
    )


async def verify_upload(request: web.Request) -> web.Response:
    """Whether storage has what the client says it sent."""
    writer(request)
    sha256, asked = request.match_info["sha256"], await request.json()
    blobs = request.app[STATE].blobs
    if not blobs.holds(sha256) or blobs.path(sha256).stat().st_size != asked["size"]:
        raise refusal(400, "", f"Object {sha256} was not uploaded")
    return web.json_response({})


async def complete_upload(request: web.Request) -> web.Response:
    """Parts become one object. The URL's own signature is what authorizes it."""
    state, sha256 = request.app[STATE], request.match_info["sha256"]
    numbers = [part["partNumber"] for part in (await request.json())["parts"]]
    parts = [state.blobs.folder / f"{sha256}.part{number}" for number in numbers]
    whole = state.blobs.folder / f"{sha256}.whole"
    with whole.open("wb") as stream:
        for part in parts:
            stream.write(part.read_bytes())
            part.unlink()
    state.blobs.adopt(sha256, whole)
    return web.json_response({})


@dataclass
class Change:
    """A commit as the client describes it, line by line."""

    title: str = ""
    parent: str | None = None
    files: dict[str, Blob | None] = field(default_factory=dict)


async def create_commit(request: web.Request) -> web.Response:
    """Put files, copies and deletions on a branch in one step, if its head is as expected."""
    writer(request)
    state, repo, branch = request.app[STATE], repository(request), request.match_info["revision"]
    if branch not in repo.branches:
        raise refusal(404, "RevisionNotFound", f"Invalid rev id: {branch}")
    proposed = request.query.get("create_pr") == "1"
    lines = [json.loads(line) for line in (await request.read()).splitlines() if line.strip()]
    change = _read_change(lines, repo.commit_at(branch), state.blobs)
    try:
        commit = repo.commit(
            change.files,
            change.title,
            branch=branch,
            parent=change.parent,
            pull_request=proposed,
        )
    except StaleParent:
        message = "A commit has happened since. Please refresh and try again."
        raise refusal(412, "", message) from None
    url = f"{state.endpoint}/{repo.id}/commit/{commit.sha}"
    answer = {"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""}
    if proposed:
        number = len(repo.pull_requests)
        answer["pullRequestUrl"] = f"{state.endpoint}/{repo.id}/discussions/{number}"
    return web.json_response(answer)


def _read_change(lines: list[dict[str, Any]], head: Commit, blobs: BlobStore) -> Change:
    change = Change()
    for line in lines:
        kind, value = line["key"], line["value"]
        if kind == "header":
            change.title, change.parent = value["summary"], value.get("parentCommit")
        elif kind == "file":
            content = base64.b64decode(value["content"])
            change.files[value["path"]] = blobs.add(value["path"], content)
        elif kind == "lfsFile":
            change.files[value["path"]] = _uploaded(blobs, value)
        elif kind in ("deletedFile", "deletedFolder"):
            change.files.update(_deletions(head, value["path"], whole=kind == "deletedFolder"))
        else:
            raise refusal(400, "", f"Unknown operation: {kind}")
    return change


def _uploaded(blobs: BlobStore, value: dict[str, Any]) -> Blob:
    if not blobs.holds(value["oid"]):
        message = f"An LFS pointer pointed to a file that does not exist: {value['path']}"
        raise refusal(400, "", f"Your push was rejected. {message}")
    return blobs.blob(value["oid"], large=True)


def _deletions(head: Commit, path: str, *, whole: bool) -> dict[str, Blob | None]:
    folder = path.rstrip("/") + "/"
    gone = [file for file in head.files if (file.startswith(folder) if whole else file == path)]
    if not gone:
        raise refusal(404, "EntryNotFound", f"{path} does not exist")
    return dict.fromkeys(gone)


def _upload_actions(request: web.Request, sha256: str, size: int) -> dict[str, Any]:
    state = request.app[STATE]
    ours = f"{state.endpoint}/api/uploads/{quote(sha256)}"
    verify = {"href": f"{ours}/verify"}
    if size <= PART_BYTES:
        return {"upload": {"href": state.sign(f"/uploads/{sha256}/0")}, "verify": verify}
    numbers = range(1, math.ceil(size / PART_BYTES) + 1)
    parts = {str(number): state.sign(f"/uploads/{sha256}/{number}") for number in numbers}
    header = {"chunk_size": str(PART_BYTES), **parts}
    return {"upload": {"href": f"{ours}/complete", "header": header}, "verify": verify}

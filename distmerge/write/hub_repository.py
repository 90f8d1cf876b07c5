"""The boundary between an output and the requests that read and write a repository of the Hub.

huggingface_hub's public calls alone. Every request is repeated while the network fails or another
worker's commit comes in between.
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar, cast

from distmerge.checkpoints.hub_account import HubAccount
from distmerge.checkpoints.location import HUB_SCHEME, locate
from distmerge.checkpoints.retry import DEFAULT_POLICY, RetryPolicy, http_status, retrying
from distmerge.checkpoints.storage_options import quoted
from distmerge.checkpoints.tensors import FileInfo
from distmerge.errors import CheckpointError, OutputError, ReadFailed

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

Answer = TypeVar("Answer")
MAIN = "main"
"""The branch that is meant where none is named."""
_TAKEN = (409, 412)
"""What the Hub answers to one of two commits that come at once."""


PATIENCE = 300.0
"""Seconds for any request but an upload: huggingface_hub itself would wait for ever."""


class BranchBusy(ConnectionError):
    """Another commit came first; asking again helps."""


class HubRepository:
    """One model repository. A revision or repository that doesn't exist holds nothing."""

    def __init__(
        self, name: str, account: HubAccount, policy: RetryPolicy = DEFAULT_POLICY
    ) -> None:
        self.name = name
        self._account = account
        self._policy = policy

    @property
    def _api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi(endpoint=self._account.endpoint, token=self._account.token)

    def create(self) -> None:
        """Make the repository, private, unless it is there."""
        self._asking(lambda: self._api.create_repo(self.name, private=True, exist_ok=True))

    def branches(self) -> list[str]:
        """The names of all branches."""
        found = self._asking(lambda: _or_none(lambda: self._api.list_repo_refs(self.name)))
        return [] if found is None else [branch.name for branch in found.branches]

    def create_branch(self, branch: str, start: str | None = None) -> None:
        """Make a branch at a revision (the default branch if None), unless it is there."""

        def make() -> None:
            self._api.create_branch(self.name, branch=branch, revision=start, exist_ok=True)

        self._asking(make)

    def delete_branch(self, branch: str) -> None:
        """Remove a branch; a missing one is no error."""
        self._asking(lambda: _or_none(lambda: self._api.delete_branch(self.name, branch=branch)))

    def head(self, revision: str) -> str | None:
        """The commit that a revision is now."""
        info = self._asking(
            lambda: _or_none(lambda: self._api.model_info(self.name, revision=revision))
        )
        return None if info is None else info.sha

    def first_commit(self) -> str:
        """The oldest commit, in which a repository holds next to nothing."""
        commits = self._asking(lambda: self._api.list_repo_commits(self.name))
        return commits[-1].commit_id

    def files(self, revision: str) -> dict[str, FileInfo]:
        """Every file at a revision."""
        from huggingface_hub.hf_api import RepoFile

        def listed() -> list[Any]:
            return list(self._api.list_repo_tree(self.name, recursive=True, revision=revision))

        entries = self._asking(lambda: _or_none(listed)) or []
        return {
            entry.path: FileInfo(
                entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id
            )
            for entry in entries
            if isinstance(entry, RepoFile)
        }

    def read(self, revision: str, path: str) -> bytes:
        """All of one file.

        Raises
            FileNotFoundError: it, its branch or the repository isn't there.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        endpoint = self._account.endpoint
        url = hf_hub_url(self.name, path, revision=revision, endpoint=endpoint)

        def get() -> bytes:
            response = get_session().get(url, headers=build_hf_headers(token=self._account.token))
            hf_raise_for_status(response)
            return bytes(response.content)

        data = self._asking(lambda: _or_none(get))
        if data is None:
            raise FileNotFoundError(f"{HUB_SCHEME}{self.name}/{path}")
        return data

    def upload(self, branch: str, addition: CommitOperationAdd) -> None:
        """Send a large file's content ahead of the commit that will name it."""
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            are_progress_bars_disabled,
            disable_progress_bars,
        )

        if not are_progress_bars_disabled():
            disable_progress_bars()  # one of ours is on the screen

        def send() -> None:
            self._api.preupload_lfs_files(self.name, [addition], revision=branch)

        self._asking(send, limited=False)

    def commit(
        self,
        branch: str,
        operations: Sequence[Any],
        title: str,
        *,
        text: str = "",
        parent: str | None = None,
        pull_request: bool = False,
    ) -> CommitInfo:
        """All operations in one commit.

        parent: what the branch's head has to be.
        """

        def send() -> CommitInfo:
            try:
                return self._api.create_commit(
                    self.name,
                    operations,
                    commit_message=title,
                    commit_description=text,
                    revision=branch,
                    parent_commit=parent,
                    create_pr=pull_request,
                )
            except Exception as error:
                if parent is None and http_status(error) in _TAKEN:
                    raise BranchBusy(f"another commit on {branch} came first") from None
                raise

        return self._asking(send)

    def delete(self, branch: str, path: str, title: str) -> None:
        """Remove one file; a missing one is no error."""
        from huggingface_hub import CommitOperationDelete, errors

        try:
            self.commit(branch, [CommitOperationDelete(path)], title)
        except OutputError as error:
            if not isinstance(error.__cause__, errors.EntryNotFoundError):
                raise

    def _asking(self, action: Callable[[], Answer], *, limited: bool = True) -> Answer:
        place = HUB_SCHEME + self.name
        try:
            return retrying(
                lambda: _within(PATIENCE, action) if limited else action(),
                what=place,
                explain=lambda error: explain_writing(error, place, self._account.secrets),
                policy=self._policy,
                secrets=self._account.secrets,
            )
        except ReadFailed as error:
            raise OutputError(
                f"Could not reach the output {place}.", *error.facts, fix=error.fix
            ) from error.__cause__


def explain_writing(
    error: Exception, place: str, secrets: Sequence[str] = ()
) -> OutputError | None:
    """What a final refusal means to the person who named the output.

    secrets: taken out of what the Hub says.
    """
    from huggingface_hub import errors

    status = http_status(error)
    if isinstance(error, errors.HFValidationError):
        return OutputError(f"{place} can't be the name of a model on the Hub.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return OutputError(
            f"{place} can't be written while the Hub is switched off.", fix="unset HF_HUB_OFFLINE"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return OutputError(f"{place} has lost a file that was written there.")
    if status in (401, 403) or isinstance(error, errors.RepositoryNotFoundError):
        return OutputError(
            f"You may not write {place}.",
            f"the Hub says: {_last_line(error, secrets)}",
            fix="hf auth login, or set HF_TOKEN to a token with write access to it",
        )
    return None


def _within(seconds: float, action: Callable[[], Answer]) -> Answer:
    """The answer of `action`, or TimeoutError; it is left alone then."""
    answers: queue.SimpleQueue[tuple[Answer | None, BaseException | None]] = queue.SimpleQueue()

    def act() -> None:
        try:
            answers.put((action(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=act, name="distmerge-hub", daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:.0f} s") from None
    if error is not None:
        raise error
    return cast(Answer, answer)


def _or_none(action: Callable[[], Answer]) -> Answer | None:
    """None where the repository, the revision or the file isn't there, as far as the caller may
    know."""
    from huggingface_hub import errors

    with suppress(
        errors.RevisionNotFoundError, errors.RepositoryNotFoundError, errors.EntryNotFoundError
    ):
        return action()
    return None


def _last_line(error: Exception, secrets: Sequence[str]) -> str:
    lines = [line.strip() for line in quoted(error, secrets).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def repository_and_branch(url: str) -> tuple[str, str]:
    """Repository and branch of hf://org/name[@branch]."""
    try:
        place = locate(url)
    except CheckpointError as error:
        raise OutputError(error.headline, *error.facts, fix=error.fix) from error
    repo, branch = place.root.removeprefix(HUB_SCHEME), place.revision or MAIN
    if repo.count("/") != 1 or place.file is not None:
        raise OutputError(
            f"{url} can't be written: an output on the Hub is a repository of its own.",
            fix=f"write to {HUB_SCHEME}org/name or {HUB_SCHEME}org/name@branch",
        )
    if branch.startswith(("refs/", "distmerge-")) or re.fullmatch(r"[0-9a-f]{40}", branch):
        raise OutputError(
            f"{url} can't be written: {branch} is not a branch of yours.",
            fix="name a branch; --pr opens a pull request",
        )
    return repo, branch

"""The boundary between storage options and the account that the Hub is asked with."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from distmerge.checkpoints.storage_options import by_prefix, options_for, secret_values
from distmerge.checkpoints.store import StorageOptions


@dataclass(frozen=True, slots=True)
class HubAccount:
    """Where the Hub is and who asks."""

    endpoint: str
    token: str | None = field(repr=False)
    """None for the environment's: HF_TOKEN, or what `hf auth login` has stored."""
    secrets: tuple[str, ...] = field(default=(), repr=False)
    """What is taken out of exceptions that are quoted: the options' values."""


def hub_account(url: str, storage_options: StorageOptions | None = None) -> HubAccount:
    """The account for an hf:// URL. Options count only if they were given for its prefix: a token
    that is meant for another store must not be sent to the Hub."""
    mine = options_for(url, storage_options) if by_prefix(storage_options or {}) else {}
    address = str(mine.get("endpoint") or endpoint()).rstrip("/")
    return HubAccount(address, mine.get("token"), secret_values(mine))


def endpoint() -> str:
    """The Hub's address as the environment gives it now."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")

"""The boundary between text that people may see and the secrets that can hide in it.

Every error's sentences, every record of an output and every line of a log go through `redact`.
Secrets that don't look like any (a storage option's value) are never made a part of a text.
"""

from __future__ import annotations

import re

_PASSWORD = re.compile(r"(\w://)[^/@\s]*:[^/@\s]*@")
_SECRET_VALUE = re.compile(
    r"([?&][^=&\s]*(?:sig|token|key|secret|credential|password|policy)[^=&\s]*=)[^&\s'\"]+",
    re.IGNORECASE,
)
_BARE_TOKEN = re.compile(r"\b(hf_|Bearer )[A-Za-z0-9._-]{8,}")
# In hf://name@revision there is no login to hide.
_URL_LOGIN = re.compile(r"\b(?!hf:)([a-z][a-z0-9+.-]*)://([^\s'\"`<>]*)@", re.IGNORECASE)
_PORT = re.compile(r"\d+/")
_FIELD_SECRET = re.compile(
    r"((?<![\w-])[\"']?[\w-]*(?:secret|passw(?:or)?d|api_?key|access_?key|account_?key|credential"
    r"|(?:access|auth|hf|sas|session|security)[_-]token)[\w-]*[\"']?[ \t]*[:=][ \t]*)"
    r"(\"[^\"\n]*\"|'[^'\n]*'|[^\s,}\]\[{&]+)",
    re.IGNORECASE,
)
_KEY_ID = re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b")


def redact(text: str) -> str:
    """The text with logins in URLs, signatures, tokens and secret fields replaced by `***`."""
    text = _PASSWORD.sub(r"\1***@", _URL_LOGIN.sub(_hide_login, text))
    text = _SECRET_VALUE.sub(r"\1***", text)
    text = _BARE_TOKEN.sub(r"\1***", text)
    return _KEY_ID.sub("***", _FIELD_SECRET.sub(r"\1***", text))


def carries_credentials(url: str) -> bool:
    """Whether a URL holds a login or a signature."""
    return bool(_PASSWORD.search(url) or _SECRET_VALUE.search(url))


def _hide_login(url: re.Match[str]) -> str:
    """A secret may hold slashes and an at sign, so a login runs to the URL's last one."""
    scheme, login = url.groups()
    user, colon, secret = login.partition(":")
    is_path = "/" in user or (scheme.startswith("http") and _PORT.match(secret))
    if is_path or not (user or colon):
        return url.group()
    return f"{scheme}://***@"

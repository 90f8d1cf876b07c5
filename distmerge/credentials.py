"""The boundary between text that people may see and the secrets that can hide in it.

Every error's sentences, every record of an output and every line of a log go through `redact`.
Secrets that don't look like any (a storage option's value) are never made a part of a text.
"""

from __future__ import annotations

import re

# Repeats are bounded: a long word made of such names would take time that grows with its square.
_PASSWORD = re.compile(r"(\w://)[^/@\s:]{0,500}:[^/@\s]{0,1000}@")
_SECRET_VALUE = re.compile(
    r"([?&][^=&\s]{0,100}(?:sig|token|key|secret|credential|password|policy)[^=&\s]{0,100}=)[^&\s'\"]+",
    re.IGNORECASE,
)
_BARE_TOKEN = re.compile(r"\b(hf_|Bearer )[A-Za-z0-9._-]{8,}")
# In hf://name@revision there is no login to hide. Slashes of well-known schemes may be miscounted.
_URL_LOGIN = re.compile(
    r"\b(?!hf:)((?:https?|s3a?|s?ftp|gc?s|abfss?|az):/{0,4}|[a-z][a-z0-9+.-]{0,30}://)([^\s'\"`<>]{0,1000})@",
    re.IGNORECASE,
)
_BARE_LOGIN = re.compile(
    r"(?<![\w.:/@+*-])(//)?(?!\d+:|hf:|mailto:|sha256:)[\w.+-]+:[^\s/@:'\"`<>,(){}\[\]]+@(?=\w)"
)
_PORT = re.compile(r"\d+/")
_FIELD = (
    r"[\"']?[\w-]{0,100}(?:secret|passw(?:or)?d|pass_?phrase|authorization|credential"
    r"|(?:private|api|access|account)[_-]?key"
    r"|(?:access|api|auth|hf|sas|session|security)[_-]token)[\w-]{0,100}[\"']?[ \t]*"
)
_FIELD_SECRET = re.compile(
    rf"((?<![\w-]){_FIELD}[:=][ \t]*)"
    # behind a tag or an anchor of YAML's
    r"(?:[!&][\w!:./-]*[ \t]+)*"
    r"(\"(?:[^\"\\\n]|\\.)*\"|'[^'\n]*'|\{[^{}\n]*\}|\[[^\[\]\n]*\]"
    r"|(?:(?:basic|bearer|digest|token)[ \t]+)?[^\s,}\]\[{&]+)",
    re.IGNORECASE,
)
_FIELD_LINE = re.compile(rf"([ \t]*(?:-[ \t]+)*)({_FIELD}:)(?:[ \t]+(\S.*))?", re.IGNORECASE)
_KEY_ID = re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b")


def redact(text: str) -> str:
    """The text with logins in URLs, signatures, tokens and secret fields replaced by `***`."""
    text = _PASSWORD.sub(r"\1***@", _URL_LOGIN.sub(_hide_login, text))
    text = _BARE_LOGIN.sub(lambda found: f"{found[1] or ''}***@", text)
    text = _SECRET_VALUE.sub(r"\1***", text)
    text = _BARE_TOKEN.sub(r"\1***", text)
    text = _hide_blocks(text) if "\n" in text else text
    return _KEY_ID.sub("***", _FIELD_SECRET.sub(r"\1***", text))


def names_secret(name: str) -> bool:
    """Whether a field of that name holds a secret."""
    return bool(re.fullmatch(_FIELD, name, re.IGNORECASE))


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
    return f"{scheme}***@"


def _hide_blocks(text: str) -> str:
    """In YAML a secret may run to the end of its line, and over all lines that lie deeper."""
    shown: list[str] = []
    hidden: re.Match[str] | None = None
    for line in text.split("\n"):
        if hidden is not None and _belongs(line, hidden):
            continue
        hidden = _FIELD_LINE.fullmatch(line)
        shown.append(f"{hidden[1]}{hidden[2]} ***" if hidden else line)
    return "\n".join(shown)


def _belongs(line: str, field: re.Match[str]) -> bool:
    """Whether a line is a part of the value of the field above it."""
    bare, width = line.lstrip(" \t"), len(field[1])
    deep = len(line) - len(bare)
    if not bare:  # an empty line ends no value
        return True
    return deep > width or (deep == width and not field[3] and bare[0] == "-")

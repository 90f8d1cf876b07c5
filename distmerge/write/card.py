"""The boundary between a merge and the people who find it on the Hub: the model card.

The metadata block is read by huggingface_hub's own classes. It isn't written by them: to import
them takes half a second, which models without metadata can do without. Only Hub ids are named
as base models, and a licence only when all parents agree on it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distmerge.checkpoints.location import HUB_SCHEME, split_hub_root
from distmerge.checkpoints.store import Store
from distmerge.checkpoints.tensors import Checkpoint, FileInfo
from distmerge.credentials import redact
from distmerge.errors import printable

_LARGEST_READ = 1 << 20
_LICENSE_FIELDS = ("license", "license_name", "license_link")
_UNNAMED = {"other", "unknown"}
_PLAIN = re.compile(r"[^<>`]{1,200}")
"""Text on one line that can't be taken for HTML or code; see `_plain`."""


@dataclass(frozen=True, slots=True)
class License:
    """What a README's metadata says about the licence, in the Hub's own words."""

    ids: tuple[str, ...]
    """The Hub's identifiers, such as `apache-2.0`; `other` when it is named below."""
    name: str | None = None
    link: str | None = None

    @property
    def is_known(self) -> bool:
        """Whether two equal ones are surely the same licence."""
        return bool(self.name or self.link) or not _UNNAMED.intersection(self.ids)

    def __str__(self) -> str:
        return self.name or ", ".join(self.ids)


@dataclass(frozen=True, slots=True)
class Parent:
    """One of the models that went into a merge, as the card names it."""

    hub_id: str | None
    """`org/name`, for models that came from the Hub by that name only."""
    name: str
    """What readers see."""
    license: License | None = None
    """None when unknown."""


def parent_of(checkpoint: Checkpoint, store: Store) -> Parent:
    """The parent that an opened checkpoint is; its README is read for the licence."""
    hub_id = _hub_id(checkpoint)
    name = hub_id or re.split(r"[/\\]", checkpoint.own_url.rstrip("/\\"))[-1]
    return Parent(hub_id=hub_id, name=name, license=read_license(store))


def read_license(store: Store) -> License | None:
    """The licence that the README's metadata names, else config.json; None when neither does."""
    files = store.files()
    if (readme := files.get("README.md")) is not None:
        found = _license(_front_matter(_read(store, readme).decode(errors="replace")))
        if found is not None:
            return found
    if (config := files.get("config.json")) is not None and config.size <= _LARGEST_READ:
        return _license(_json_object(_read(store, config)))
    return None


def license_warnings(parents: Sequence[Parent]) -> list[str]:
    """What the user should look at in the parents' licences: what they say of themselves, no
    judgement of what follows."""
    known = dict.fromkeys(p for p in parents if p.license is not None and p.license.is_known)
    unknown = dict.fromkeys(_shown(p.name) for p in parents if p not in known)
    warnings = []
    if len({parent.license for parent in known}) > 1:
        listed = ", ".join(f"{_shown(parent.name)} ({parent.license})" for parent in known)
        warnings.append(
            f"The models' licences differ: {listed}. The model card names none of them as the "
            "merge's; read them before you share it."
        )
    if unknown:
        warnings.append(
            f"No licence is named in README.md or config.json of {', '.join(unknown)}. The model "
            "card names none for the merge; look where the model comes from before you share it."
        )
    return warnings


def model_card(
    *,
    name: str,
    parents: Sequence[Parent],
    base: str | None,
    method: str,
    expression: str,
    recipe_text: str | None,
    dtype: str,
    library_version: str,
    library: str | None = None,
) -> str:
    """README.md: the Hub's metadata, then what was merged and how.

    Args
        name: the title.
        parents: every model that went in, the base too.
        base: the base's name as readers should see it, where there is one.
        expression: the formula; credentials are taken out of it, as out of the recipe.
        recipe_text: the recipe's YAML, where there was one.
        dtype: what was written.
        library: what the Hub is to offer for loading it.
    """
    import yaml

    agreed = _agreed_license(parents)
    fields = {
        "base_model": list(dict.fromkeys(p.hub_id for p in parents if p.hub_id)),
        "library_name": library,
        "tags": ["merge", "distmerge"],
        "base_model_relation": "merge",
        **_license_fields(agreed),
    }
    given = {name: value for name, value in fields.items() if value}
    data = yaml.safe_dump(given, sort_keys=False, allow_unicode=True).strip()
    body = _body(name, parents, base, method, dtype, library_version)
    body += ["## Formula", "", *_fenced(expression, ""), ""]
    if recipe_text is not None:
        body += ["## Recipe", "", *_fenced(recipe_text, "yaml"), ""]
    body += ["`distmerge.json` pins every input and holds the checksums of all files.", ""]
    return f"---\n{data}\n---\n\n" + "\n".join(body)


def _body(
    name: str,
    parents: Sequence[Parent],
    base: str | None,
    method: str,
    dtype: str,
    library_version: str,
) -> list[str]:
    distinct = dict.fromkeys(parents)
    facts = [f"- Method: `{method}`", f"- Dtype: `{dtype}`"]
    if base is not None:
        facts.insert(1, f"- Base: {_shown(base)}")
    warnings = [f"> {warning}" for warning in license_warnings(parents)]
    return [
        f"# {_shown(name)}",
        "",
        f"A merge of pretrained models, made with distmerge {library_version}.",
        "",
        *facts,
        "",
        "## Models",
        "",
        *map(_listed, distinct),
        "",
        *(["## Licence", "", *warnings, ""] if warnings else []),
    ]


def _listed(parent: Parent) -> str:
    name = _shown(parent.name)
    link = f"[{name}](https://huggingface.co/{parent.hub_id})" if parent.hub_id else name
    return f"- {link}, licence: {parent.license or 'not named'}"


def _shown(name: str) -> str:
    return printable(redact(name))


def _fenced(text: str, language: str) -> list[str]:
    """A code block whose fence is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", redact(text).rstrip(), fence]


def _agreed_license(parents: Sequence[Parent]) -> License | None:
    licenses = {parent.license for parent in parents}
    (agreed, *others) = licenses or {None}
    return agreed if agreed is not None and agreed.is_known and not others else None


def _license_fields(license: License | None) -> dict[str, Any]:
    if license is None:
        return {}
    ids = license.ids[0] if len(license.ids) == 1 else list(license.ids)
    return {"license": ids, "license_name": license.name, "license_link": license.link}


def _license(fields: dict[str, Any]) -> License | None:
    named = fields.get("license")
    ids = [_plain(part) for part in (named if isinstance(named, list) else [named]) if part]
    if not ids or None in ids:  # some of its licences would not be all of them
        return None
    name, link = _plain(fields.get("license_name")), _plain(fields.get("license_link"))
    return License(tuple(sorted(one for one in ids if one)), name, link)


def _plain(given: Any) -> str | None:
    """A value from another model's files, if the card can say it on one line."""
    text = given.strip() if isinstance(given, str) else ""
    return text if text.isprintable() and _PLAIN.fullmatch(text) else None


def _front_matter(readme: str) -> dict[str, Any]:
    """The README's metadata block, {} when there is none that can be read."""
    import yaml
    from huggingface_hub import ModelCard

    if not readme.lstrip("\ufeff \t\r\n").startswith("---"):
        return {}
    try:
        card = ModelCard(readme.lstrip("\ufeff"), ignore_metadata_errors=True)
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return {}  # what its author wrote there can be anything
    return {field: card.data.get(field) for field in _LICENSE_FIELDS}


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _read(store: Store, file: FileInfo) -> bytes:
    content = bytearray(min(file.size, _LARGEST_READ))
    store.read_into(file, 0, memoryview(content))
    return bytes(content)


def _hub_id(checkpoint: Checkpoint) -> str | None:
    if not checkpoint.root.startswith(HUB_SCHEME):
        return None
    return split_hub_root(checkpoint.root)[0]

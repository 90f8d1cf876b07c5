"""What a recipe says of the output's chat template, and the files that templates are kept in.

chat_template: auto        the one that most of the models have
chat_template: chatml      a format by its name
chat_template: "{% for ..."    a template
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from importlib.resources import files
from typing import Any

from distmerge.checkpoints.heads import parse_json
from distmerge.errors import MalformedCheckpoint, RecipeError
from distmerge.expressions.tokenizer_files import CONFIG, TEMPLATE, TEMPLATES, TokenizerFiles

AUTO = "auto"
FORMATS = ("alpaca", "chatml", "exaone", "llama3", "mistral")
"""Those of the names that mergekit knows, too."""
_OF_PROCESSORS = "chat_template.json"
_EXAMPLE = "chat_template: auto, one of " + ", ".join(FORMATS) + ", or a template in Jinja"


def check_template(given: str) -> str:
    """What a recipe may say. Raises RecipeError: no known name, or Jinja that doesn't parse."""
    if given == AUTO or given in FORMATS:
        return given
    if "{" not in given:
        near = difflib.get_close_matches(given, [AUTO, *FORMATS], 1)
        fix = f"did you mean {near[0]!r}?" if near else _EXAMPLE
        raise RecipeError(f"there is no chat template {given[:40]!r}", fix=fix)
    _parse(given)
    return given


def named_template(name: str) -> str | None:
    """The template of a format, or the template that was given; None for `auto`."""
    if name in FORMATS:
        place = files("distmerge.expressions") / "chat_formats" / f"{name}.jinja"
        return place.read_text(encoding="utf-8").rstrip("\n")
    return None if name == AUTO else name


def most_common(templates: Iterable[str | None]) -> str | None:
    """Of equally many, the first; None if there are none."""
    counts = Counter(template.strip() for template in templates if template)
    return max(counts, key=counts.__getitem__, default=None)


def template_in(held: Mapping[str, bytes], whose: str) -> str | None:
    """The template in a model's files, as transformers finds it.

    Raises
        RecipeError: a file that should be JSON isn't.
    """
    if TEMPLATE in held:
        return held[TEMPLATE].decode(errors="replace")
    for name in (CONFIG, _OF_PROCESSORS):
        found = _object(held[name], name, whose).get("chat_template") if name in held else None
        if isinstance(found, list):  # several, by name
            named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
            found = named.get("default")
        if isinstance(found, str) and found:
            return found
    return None


def with_template(
    template: str, tokenizer: TokenizerFiles, present: Collection[str], whose: str
) -> TokenizerFiles:
    """The output's tokenizer with that template, in the file and where older readers look.

    present: the paths of the donor's files.
    """
    told = dict(tokenizer.files)
    if CONFIG in told:
        config = {**_object(told[CONFIG], CONFIG, whose), "chat_template": template}
        told[CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    told.pop(_OF_PROCESSORS, None)
    told[TEMPLATE] = template.encode()
    others = {path for path in present if path.startswith(TEMPLATES)} | {_OF_PROCESSORS}
    return TokenizerFiles(told, tokenizer.dropped | others)


def _object(content: bytes, name: str, whose: str) -> Mapping[str, Any]:
    try:
        return parse_json(content, f"{name} of {whose}")
    except MalformedCheckpoint as error:
        raise RecipeError(error.headline, *error.facts, fix="fetch the file again") from None


def _parse(template: str) -> None:
    """Raises RecipeError. What transformers adds to Jinja is known: `{% generation %}` marks
    answers, and loops have break and continue. Nothing is computed, constants neither."""
    from jinja2 import TemplateSyntaxError, nodes, pass_context
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    ours = {"generation"}

    class Generation(Extension):
        tags = ours

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    known = ImmutableSandboxedEnvironment(
        extensions=[Generation, "jinja2.ext.loopcontrols"],
        optimized=False,
        # What asks for the context is left for later, and the constant that it is given too.
        finalize=pass_context(lambda context, value: value),
    )
    known.intercepted_binops = frozenset(known.default_binop_table)  # operators are, as well
    try:
        known.compile(template)
    except TemplateSyntaxError as error:
        said = (error.message or "it is not Jinja").rstrip(".")
        raise RecipeError(
            f"the template's line {error.lineno} is not Jinja: {said}",
            fix="mend the template, or name one: " + ", ".join([AUTO, *FORMATS]),
        ) from None

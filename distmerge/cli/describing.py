"""`distmerge methods`: what can be written after `merge_method:`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distmerge.cli import options
from distmerge.cli.failures import reported
from distmerge.run.progress import printable

if TYPE_CHECKING:
    from distmerge.methods.method import MergeMethod, Parameter


@reported
def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One method: all about it.")
    ] = None,
    trace: options.Trace = False,
) -> None:
    """List the merge methods, or describe one.

    NAME is one of the list, or file.py:function.
    """
    from distmerge.cli.tables import console, table
    from distmerge.methods.registry import find_method, method_names

    if name is None:
        found = [find_method(known) for known in method_names()]
        rows = [(m.name, ", ".join(m.parameters), first_sentence(m)) for m in found]
        console().print(table("", ("method", "parameters", "what it does"), rows))
        return
    method = find_method(name)
    print(printable("\n\n".join([method.name, _documentation(method), *_needs(method)])))
    if method.parameters:
        rows = [(p.name, describe_type(p), describe_default(p)) for p in method.parameters.values()]
        console().print(table("", ("parameter", "value", "default"), rows))


def first_sentence(method: MergeMethod) -> str:
    """Of the method's docstring, on one line."""
    paragraph = " ".join(_documentation(method).split("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".")


def describe_type(parameter: Parameter) -> str:
    """What a parameter takes, in words: `0 to 1, one for each model`."""
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

    try:
        words = _words(TypeAdapter(parameter.annotation).json_schema())
    except (PydanticSchemaGenerationError, PydanticUserError):  # a type of the user's own
        words = getattr(parameter.annotation, "__name__", str(parameter.annotation))
    return words + (", one for each model" if parameter.per_model else "")


def describe_default(parameter: Parameter) -> str:
    """As YAML would say it."""
    if parameter.default is inspect.Parameter.empty:
        return "required"
    return json.dumps(parameter.default, default=str).strip('"')


def _documentation(method: MergeMethod) -> str:
    return inspect.getdoc(method.function) or "No description."


def _needs(method: MergeMethod) -> list[str]:
    least, most = method.models
    count = f"{least}" if least == most else f"{least} to {most}" if most else f"{least} or more"
    besides = ", besides the base" if method.takes_base and not method.counts_base else ""
    lines = [f"models: {count}{besides}"]
    if method.takes_base:
        lines.append(f"base_model: {'required' if method.base_required else 'optional'}")
    lines += [f"{name}: a checkpoint beside each model" for name in method.inputs[1:]]
    if method.from_call is not None:
        keywords = list(inspect.signature(method.from_call).parameters.values())[1:]
        shown = "".join(f", {p.name}={p.default!r}" for p in keywords)
        lines.append(f"in Python: {method.name}(models{shown})")
    return ["\n".join(lines)]


def _words(schema: Mapping[str, Any]) -> str:
    """A JSON schema in words."""
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_words(kind) for kind in schema["anyOf"]))
    names = {"number": "a number", "integer": "a whole number", "boolean": "true or false"}
    words = names.get(schema.get("type", ""), schema.get("type", "anything"))
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if low is not None and high is not None:
        return f"{words}, {low:g} to {high:g}"
    if low is not None:
        return f"{words}, {low:g} or more" if "minimum" in schema else f"{words}, above {low:g}"
    return f"{words}, {high:g} at most" if high is not None else words

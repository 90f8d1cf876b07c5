"""`distmerge explain`: what each tensor of a merge would be made of."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from distmerge.cli import options
from distmerge.cli.failures import reported
from distmerge.cli.merging import read_request, warn_of_plan
from distmerge.run.progress import printable

if TYPE_CHECKING:
    from distmerge.expressions.alignment import Skipped
    from distmerge.plan.explain import Explained

_ANY_MEMORY = "1000TB"
"""Nothing is merged, so nothing is refused for want of it."""


@reported
def explain(
    recipe: options.RecipeArgument,
    key: Annotated[
        str | None, typer.Argument(metavar="[KEY]", help="A tensor's name, or a glob: '*mlp*'.")
    ] = None,
    out_dtype: options.OutDtype = None,
    as_json: options.AsJson = False,
    overrides: options.Overrides = None,
    strict: options.Strict = False,
    trace: options.Trace = False,
) -> None:
    """Show what each tensor would be made of, from headers.

    Its method and the parameters that hold for it, the models, layers and files it comes from,
    its dtype; what is left out, and why. Equal layers stand together.
    """
    from distmerge.plan import explain as explaining
    from distmerge.run import merge as running

    request = read_request(recipe, overrides, strict=strict)
    decided = running.plan(request, out_dtype=out_dtype, allowed_mem=_ANY_MEMORY)
    warn_of_plan(decided, request)
    if as_json:
        print(json.dumps(explaining.to_json(decided, key), indent=2, ensure_ascii=False))
        return
    wanted, skipped = explaining.explain(decided, key)
    print(printable(decided.expression))
    _show(wanted, skipped)


def _show(wanted: list[Explained], skipped: list[Skipped]) -> None:
    from distmerge.cli.tables import console, table
    from distmerge.plan.explain_text import grouped, row

    out = console()
    if wanted:
        rows = [(*row(group)[:1], len(group), *row(group)[1:]) for group in grouped(wanted)]
        out.print(table("", ("tensors", "#", "written", "made of"), rows))
    if skipped:
        counts = Counter((s.model, s.reason) for s in skipped)
        first = {(s.model, s.reason): s.key for s in reversed(skipped)}
        lost = [(m, n, first[m, reason], reason) for (m, reason), n in counts.items()]
        out.print(table("Left out", ("model", "tensors #", "such as", "because"), lost))

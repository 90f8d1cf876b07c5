"""The named documents of a recipe, each as a merge of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distmerge.checkpoints.location import is_safe_path
from distmerge.errors import RecipeError
from distmerge.expressions.request import MergeRequest
from distmerge.plan.plan import Plan
from distmerge.write.output import open_output
from distmerge.write.publish import check_intermediate, check_outside

Intermediate = tuple[MergeRequest, str, dict[str, Any]]


def intermediates(
    decided: Plan, folder: str, out: str, options: Mapping[str, Any]
) -> list[Intermediate]:
    """What to merge, where to, and with which options, for each named document that is used.

    out: where the merge that uses them goes, as its store spells it.

    They are copies for people to look at: the merge that uses them computes them itself, without
    the rounding that a file brings.

    Raises
        RecipeError: a name that can't be a folder's.
        OutputError: the folder isn't one to write to, or is a model's.
        OutputExists: a document's place is a model's, or the output's.
    """
    request, found = decided.request, []
    open_output(folder, request.storage_options)
    check_outside(folder, "The folder for intermediate merges", decided.checkpoints)
    for name, inner in request.intermediates:
        if not is_safe_path(name):
            raise RecipeError(
                f"{name!r} can't be a folder's name, so its merge can't be written.",
                fix="give the document another 'name:'",
            )
        own = {**options, "keep_intermediates": None, "out_dtype": None, "seed": request.seed}
        place = f"{folder.rstrip('/')}/{name}"
        check_intermediate(open_output(place, request.storage_options), out, decided.checkpoints)
        found.append((inner, place, own))
    return found

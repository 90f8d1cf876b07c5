"""The merge loop: request, plan, lease, units, publication. Engines and stores do the work."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

from distmerge.checkpoints.store import OutputStore
from distmerge.errors import OutputError, RecipeError
from distmerge.expressions.compute_pool import one_torch_thread
from distmerge.expressions.lazy import LazyStateDict, open_lazy
from distmerge.expressions.nodes import Expression, TensorLeaf, leaves
from distmerge.expressions.recipe import load_recipe
from distmerge.expressions.request import MergeRequest, request_for
from distmerge.plan.memory import RAY
from distmerge.plan.plan import Plan, make_plan
from distmerge.plan.sizes import parse_size
from distmerge.run.engine import Engine, LocalEngine
from distmerge.run.event_log import kept_events
from distmerge.run.events import (
    Event,
    Listener,
    silent,
    tell_plan,
    tell_publishing,
    told_bytes,
)
from distmerge.run.finish import finish, names_of_files
from distmerge.run.intermediates import intermediates
from distmerge.run.journal import ask_model
from distmerge.run.options import MergeOptions as MergeOptions
from distmerge.run.worker import OnBytes, WorkerSettings
from distmerge.write.lease import LeaseKeeper, lease
from distmerge.write.output import open_output, output_name
from distmerge.write.publish import (
    Published,
    check_apart,
    check_free,
    check_names,
    check_room,
    clean_staging,
    clear_stale,
    look,
    unpublish,
)
from distmerge.write.shard import Receipt, read_receipt


@one_torch_thread()
def merge(what: Any, out: str, *, listener: Listener = silent, **options: Any) -> LazyStateDict:
    """Merge and publish.

    Parameters
        what: a recipe (path, YAML text, dict), an expression, a lazy state dict or a plan.
        out: local directory or fsspec URL of the output.
        listener: told what happens, see `distmerge.run.events`.
        options: the fields of `MergeOptions`.

    Returns
        The written checkpoint, opened lazily.

    Raises
        DistmergeError: one of its kinds; what can be known from headers before anything is read.
    """
    settings, out = MergeOptions.of("merge", options, listener=listener), output_name(out)
    started = time.monotonic()
    given = what if isinstance(what, Plan) else None
    request = given.request if given else as_request(what, settings)
    output = open_output(out, request.storage_options, pull_request=settings.pull_request)
    published = look(output)
    decided = given or plan_request(request, settings, sending=output.buffers)
    output.begin(decided.digest)
    if published.holds(decided.digest):
        published = look(output)  # now with what an earlier run may have left
    url, summary = out, None
    if not published.holds(decided.digest):
        check_place(decided, output, published, settings)
    if settings.keep_intermediates is not None:
        for inner, place, own in intermediates(
            decided, settings.keep_intermediates, output.root, options
        ):
            merge(inner, place, listener=listener, **own)
    if not published.holds(decided.digest):
        summary = _write(decided, output, settings, listener)
    elif published.unfinished:  # it was killed between its last two steps
        with lease(output):
            clean_staging(output)
    if summary is None:
        listener(Event("notice", {"text": f"{out} holds this merge already."}))
    else:
        url = summary.get("url", out)
        seconds = time.monotonic() - started
        listener(Event("done", {"url": out, "seconds": seconds, **summary}))
    return open_lazy(url, storage_options=request.storage_options)


def _write(
    decided: Plan, output: OutputStore, settings: MergeOptions, listener: Listener
) -> dict[str, Any] | None:
    """Run and publish, alone; what the `done` event tells. None if another run has just done
    the same."""
    with lease(output) as held:
        published = look(output)  # again: now nobody else writes
        if published.holds(decided.digest):
            return None
        make_way(decided, output, published, settings)
        with kept_events(output, decided.digest, held, listener) as (log, told):
            try:
                receipts = _run(decided, settings, output, held, told)
            except OutputError:
                held.check()  # another run, which has taken over, may be why
                raise
            held.check()
            tell_publishing(receipts, told)
            summary = finish(decided, output, receipts, log.close)
            clean_staging(output)
        return summary


def make_way(
    decided: Plan, output: OutputStore, published: Published, settings: MergeOptions
) -> None:
    """Take away whatever isn't this merge's; for who holds the lease. Raises OutputExists."""
    check_free(output, published, overwrite=settings.replaces)
    output.remove_temporaries()
    check_room(output, decided.shard_sizes, settings.processes)
    unpublish(output, published)
    clear_stale(output, decided.digest, {unit.path for unit in decided.units})


def plan(what: Any, out: str | None = None, **options: Any) -> Plan:
    """Decide everything that a merge would do, from recipe and headers alone.

    With `out`, also refuses what `merge` would refuse there. Parameters as for `merge`.
    """
    settings = MergeOptions.of("plan", options)
    request = as_request(what, settings)
    output = None
    if out is not None:
        output = open_output(out, request.storage_options, pull_request=settings.pull_request)
    sending = (output or open_output(".")).buffers  # a local one, where none is named
    decided = plan_request(request, settings, sending=sending)
    if output is not None:
        published = look(output)
        if not published.holds(decided.digest):
            check_place(decided, output, published, settings)
            check_room(output, decided.shard_sizes, settings.processes)
    return decided


def check_place(
    decided: Plan, output: OutputStore, published: Published, settings: MergeOptions
) -> None:
    """Raises OutputExists if something there would be lost."""
    check_free(output, published, overwrite=settings.replaces)
    check_apart(output, decided.checkpoints)
    check_names(output, names_of_files(decided))


def as_request(what: Any, settings: MergeOptions) -> MergeRequest:
    """Whatever was given, as the one thing that is planned."""
    options = settings.storage_options or {}
    if isinstance(what, MergeRequest):
        request = what
    elif isinstance(what, LazyStateDict):
        request = what.request()
    elif isinstance(what, Expression):
        request = request_for(what)
    else:
        recipe = load_recipe(what, overrides=settings.overrides, strict=settings.strict)
        request = recipe.request(storage_options=settings.storage_options)
        request = replace(request, strict=settings.strict)
    return replace(
        request,
        out_dtype=_dtype(settings.out_dtype) or request.out_dtype,
        seed=request.seed if settings.seed is None else settings.seed,
        storage_options={**request.storage_options, **options},
    )


def _dtype(name: str | None) -> str | None:
    if name is None:
        return None
    from distmerge.expressions.dtypes import parse_dtype

    return parse_dtype(name, eight_bits=True)


def plan_request(request: MergeRequest, settings: MergeOptions, *, sending: int = 0) -> Plan:
    """Plan under the options' memory, workers and shard size.

    sending: what the output's store holds in memory of a shard that is written.
    """
    if settings.engine not in ("local", "ray"):
        raise RecipeError(f"There is no engine {settings.engine!r}.", fix="--engine local, or ray")
    if settings.engine == "ray" and any(isinstance(x, TensorLeaf) for x in leaves(request.root)):
        raise RecipeError(
            "A state dict in memory can't be merged on a cluster.",
            fix="save it first and open it from there, or engine='local'",
        )
    return make_plan(
        request,
        allowed_mem=parse_size(settings.allowed_mem),
        besides=RAY if settings.engine == "ray" else 0,
        sending=sending,
        workers=settings.processes * settings.threads,
        threads=settings.threads,
        max_shard_size=None
        if settings.max_shard_size is None
        else parse_size(settings.max_shard_size),
        device=settings.device,
    )


def _run(
    decided: Plan,
    settings: MergeOptions,
    output: OutputStore,
    held: LeaseKeeper,
    listener: Listener,
) -> list[Receipt]:
    """Run the units that have no receipt yet; all receipts, in the units' order."""
    files = output.list()
    done = {
        unit.shard: read_receipt(output, files, decided.digest, unit.shard, unit.path)
        for unit in decided.units
    }
    todo = [unit for unit in decided.units if done[unit.shard] is None]
    tell_plan(decided, todo, listener)
    if not todo:
        return [receipt for receipt in done.values() if receipt is not None]
    todo.sort(key=lambda unit: -unit.size)  # the longest first: none is left over at the end
    with ExitStack() as stack:
        # The output's own name for its place: workers may be in another directory.
        engine = open_engine(decided, settings, output.root, told_bytes(listener), listener)
        stack.callback(_sweep, output, held)
        stack.callback(engine.close)
        known = ask_model(decided, engine, output) if decided.asks_model else {}
        for receipt in engine.merge(todo, known):
            held.check()
            done[receipt.shard] = receipt
            finished = sum(receipt is not None for receipt in done.values())
            data = {"shard": receipt.shard, "done": finished, "total": len(decided.units)}
            moved = {"bytes_read": receipt.bytes_read, "bytes_written": receipt.size}
            where = {"node": receipt.node} if receipt.node else {}
            listener(Event("unit", data | moved | where))
    return [receipt for receipt in done.values() if receipt is not None]


def _sweep(output: OutputStore, held: LeaseKeeper) -> None:
    """Remove what workers that died, or were stopped, had begun."""
    with suppress(OutputError):  # the next run does it too; a failure of the run is to be told
        held.check()
        output.remove_temporaries()


def open_engine(
    decided: Plan, settings: MergeOptions, out: str, on_bytes: OnBytes, listener: Listener
) -> Engine:
    """Start the engine that the options name."""
    worker = WorkerSettings(
        output=out,
        digest=decided.digest,
        memory=decided.memory,
        threads=settings.threads,
        seed=decided.request.seed,
        device=settings.device,
        allow_non_finite=settings.allow_non_finite,
        storage_options=decided.request.storage_options,
    )
    if settings.engine == "local":
        return LocalEngine(worker, on_bytes)
    from distmerge.run.ray_engine import RayEngine

    return RayEngine(
        worker,
        workers=settings.processes,
        as_needed=settings.workers is None,
        address=settings.address,
        kernel=decided.kernel,
        listener=listener,
    )

"""The boundary between the demo's models and whoever types `distmerge demo`.

Trains three small GPT-2s, merges the fine-tunes on both engines, loads the results as pipelines,
and shows what each model writes and how well it reads both domains.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distmerge.demo.perplexity import PerplexityRow, merge_margin, perplexity_table
from distmerge.demo.recipes import MERGES, write_recipes
from distmerge.demo.sweeping import show_sweep, sweep_strengths, swept_shortfall
from distmerge.demo.training import DemoModels, no_progress_bars, train_models
from distmerge.errors import OutputExists
from distmerge.expressions.compute_pool import one_torch_thread
from distmerge.plan.sizes import format_size
from distmerge.run.events import Event
from distmerge.run.merge import merge
from distmerge.run.options import EngineName
from distmerge.run.progress import format_seconds, printable

if TYPE_CHECKING:
    from transformers import Pipeline

ENGINES: tuple[EngineName, ...] = ("local", "ray")
WORKERS = 2
SHARD_SIZE = "1MB"
"""Small, so that a model of 4 MB makes several units of work."""
PROMPTS = {"law": "The appeal is dismissed, and the", "cooking": "Bake at 200 degrees for"}
"""By the domain that they are about."""


def run(folder: Path) -> list[PerplexityRow]:
    """Walk through training, merging and judging, below `folder`; what is there is used again.

    Returns
        A row for each of base, law, cooking, average and ties.

    Raises
        OutputExists: the folder holds something else.
        SystemExit: with one sentence, if no merge is better than base and both parents, or the
            engines' bytes differ; exit code 1.
    """
    screen = Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=True)
    _check_folder(folder)
    models = _train(folder / "models", screen)
    recipes = write_recipes(models, folder)
    outputs = _merge(recipes, folder / "merges", screen)
    places = {"base": models.base, "law": models.law, "cooking": models.cooking, **outputs}
    # Two of torch's threads are slower than one on models as small as these.
    with _quiet_transformers(), one_torch_thread():
        pipes = {name: _pipeline(place) for name, place in places.items()}
        _show_texts(pipes, screen)
        table = judge(pipes, models.held_out)
        tokenizer = pipes["base"].tokenizer
        swept = sweep_strengths(recipes["ties"], folder / "sweep", models.held_out, tokenizer)
        show_sweep(swept, screen)
    screen.print(perplexities(table))
    if sentence := shortfall(table) or swept_shortfall(swept[0], table, MERGES):
        raise SystemExit(sentence)
    _show_way_on(folder, recipes["ties"], screen)
    return table


def _check_folder(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "models").is_dir():
        raise OutputExists(
            f"{folder} holds something else than an earlier demo.", fix="distmerge demo new-folder"
        )


def judge(
    pipes: Mapping[str, Pipeline], held_out: Mapping[str, Sequence[str]]
) -> list[PerplexityRow]:
    """How well each pipeline's model reads the texts of each domain."""
    tokenizer = next(iter(pipes.values())).tokenizer
    modules = {name: pipe.model for name, pipe in pipes.items()}
    return perplexity_table(modules, held_out, tokenizer=tokenizer)


def shortfall(table: Sequence[PerplexityRow]) -> str | None:
    """Why the merges did not pay, in one sentence; None if the best of them has a lower mean
    log-perplexity over the domains than base and each parent."""
    margin = merge_margin(table, MERGES)
    if margin > 0:
        return None
    rival = min((row for row in table if row.name not in MERGES), key=lambda row: row.mean)
    return (
        f"No merge reads the two domains better than {rival.name} alone: "
        f"the best is {abs(margin):.3f} nats per token behind."
    )


# Training and merging ----------------------------------------------------------------------------


def _train(folder: Path, screen: Console) -> DemoModels:
    screen.print("Three small GPT-2s, trained here once, in about a minute:", style="bold")
    screen.print("  base     has read everyday texts, and a little of law and cooking")
    screen.print("  law      is base that went on with law")
    screen.print("  cooking  is base that went on with cooking")
    with _current_line(screen) as show:
        models = train_models(folder, progress=show)
    screen.print(f"They are in {folder}.\n")
    return models


@contextmanager
def _current_line(screen: Console) -> Iterator[Callable[[str], None]]:
    """Shows the latest line beside a spinner; where nothing can spin, every line."""
    if not screen.is_terminal:
        yield lambda line: screen.print(f"  {line}")
        return
    with screen.status("") as status:
        yield lambda line: status.update(printable(line))


def _merge(recipes: Mapping[str, Path], folder: Path, screen: Console) -> dict[str, Path]:
    """Run each recipe on each engine; the directories that the local engine wrote."""
    screen.print(f"Merged block by block, with {WORKERS} workers:", style="bold")
    written: dict[tuple[str, EngineName], Path] = {}
    for engine in ENGINES:
        with _session(engine):
            for name, recipe in recipes.items():
                out = folder / f"{name}-{engine}"
                screen.print(f"  {name:8} {engine:5}  ", end="")
                screen.print(_merge_once(recipe, out, engine))
                written[name, engine] = out
    for name in recipes:
        same = compare([written[name, engine] for engine in ENGINES])
        screen.print(f"  {name:8} both   {same}")
    screen.print()
    return {name: written[name, "local"] for name in recipes}


def _merge_once(recipe: Path, out: Path, engine: EngineName) -> str:
    """What was done, in words."""
    told: dict[str, Event] = {}
    merge(
        str(recipe),
        str(out),
        engine=engine,
        workers=WORKERS,
        max_shard_size=SHARD_SIZE,
        overwrite=True,  # merges of an earlier demo; one that is still right is left as it is
        listener=lambda event: told.update({event.kind: event}),
    )
    if "done" not in told:
        return "is there from an earlier demo"
    plan, done = told["plan"].data, told["done"].data
    read, wrote = (format_size(done[key]) for key in ("bytes_read", "bytes_written"))
    seconds = format_seconds(done["seconds"])
    return f"{plan['units']} shards, {read} read, {wrote} written, {seconds}"


@contextmanager
def _session(engine: EngineName) -> Iterator[None]:
    """One Ray for all merges, where each would start its own."""
    if engine == "local":
        yield
        return
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(
            address="local",  # one that already runs here may be somebody else's
            num_cpus=WORKERS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def compare(outputs: Sequence[Path]) -> str:
    """Says that all outputs have the same weight files, byte for byte; raises SystemExit if not."""
    found = [_digests(out) for out in outputs]
    if any(digests != found[0] for digests in found):
        places = " and ".join(str(out) for out in outputs)
        raise SystemExit(f"The engines' weights differ: compare {places}.")
    overall = hashlib.sha256("".join(found[0].values()).encode()).hexdigest()
    return f"the same bytes in all {len(found[0])} files ({overall[:12]})"


def _digests(out: Path) -> dict[str, str]:
    """Name -> SHA-256 of every weight file and of the index."""
    files = sorted(out.glob("*.safetensors*"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# Judging and showing -----------------------------------------------------------------------------


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without bars, and without the warning that a text is longer than the context: such a text
    is read through several windows."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        with no_progress_bars():
            yield
    finally:
        transformers_logging.set_verbosity(before)


def _pipeline(place: Path) -> Pipeline:
    import transformers

    make: Any = transformers.pipeline
    loaded: Pipeline = make("text-generation", str(place), device="cpu")
    return loaded


def _show_texts(pipes: Mapping[str, Pipeline], screen: Console) -> None:
    screen.print("Loaded as transformers pipelines, each goes on with a prompt:", style="bold")
    length = {"min_new_tokens": 12, "max_new_tokens": 24}
    for prompt in PROMPTS.values():
        screen.print(f"  {prompt} ...", style="italic")
        for name, pipe in pipes.items():
            generate: Any = pipe
            text = generate(prompt, do_sample=False, **length)[0]["generated_text"]
            rest = " ".join(text[len(prompt) :].split())
            screen.print(f"    {name:8} ... {printable(rest)}")
    screen.print()


def perplexities(table: Sequence[PerplexityRow]) -> Table:
    """The table as a person reads it: perplexities, lower is better, the best one marked."""
    shown = Table(
        title="Perplexity on texts that none of them has read (lower is better)",
        box=SIMPLE_HEAD,
        title_justify="left",
    )
    domains = list(table[0].nats)
    shown.add_column("model")
    for heading in (*domains, "mean"):
        shown.add_column(heading, justify="right")
    shown.add_column()
    best = min(table, key=lambda row: row.mean)
    for row in table:
        numbers = [math.exp(nats) for nats in (*(row.nats[d] for d in domains), row.mean)]
        cells = [row.name, *(f"{number:.2f}" for number in numbers)]
        style, mark = ("bold", "best") if row is best else ("", "")
        shown.add_row(*(Text(cell, style) for cell in (*cells, mark)))
    return shown


def _show_way_on(folder: Path, recipe: Path, screen: Console) -> None:
    merges = folder / "merges"
    screen.print(f"Models, merges and a recipe for each merge lie in {folder}. Try next:")
    for command in (
        ["plan", recipe],
        ["merge", recipe, merges / "denser", "--set", "parameters.density=0.5"],
        ["inspect", merges / "ties-local"],
        ["verify", merges / "ties-local"],
        ["methods"],
    ):
        screen.print("  distmerge", shlex.join(str(word) for word in command))

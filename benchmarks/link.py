"""The row that asks whether a long, narrow link is used: from S3 and the Hub, through a relay."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench, middle
from benchmarks.models import weight_bytes, weight_files
from benchmarks.results import Check, Result
from benchmarks.servers import DELAY, loopback_hub, loopback_s3, relay
from benchmarks.shapes import flat

MB, MiB = 10**6, 2**20
ALLOWED = 1024 * MiB


def link_row(bench: Bench) -> list[Result]:
    """Linear merges of three models: the link's share is told by the relay."""
    models = bench.family(_shape(bench))
    return [_from_s3(bench, models), _from_hub(bench, models)]


def _shape(bench: Bench) -> Any:
    nbytes = _size(bench)
    return flat(f"link-{nbytes // MB}", tensors=24, elements=nbytes // 48 // 1024 * 1024)


def _size(bench: Bench) -> int:
    return (96 if bench.small else 512) * MB


def _rate(bench: Bench) -> int:
    return 40 * MB if bench.small else 100 * MB


def _from_s3(bench: Bench, models: Sequence[Path]) -> Result:
    shares, peaks = [], []
    with loopback_s3() as server:
        put_models(server, models)
        for _ in range(bench.runs):
            with relay(server.endpoint, _rate(bench)) as link:
                options = server.storage_options
                options["client_kwargs"]["endpoint_url"] = link.url
                names = [server.url(model.name) for model in models]
                peaks.append(_merge(bench, names, models, {"storage_options": options}))
            shares.append(link.share(_rate(bench)))
    return _told(bench, "S3", shares, peaks)


def _from_hub(bench: Bench, models: Sequence[Path]) -> Result:
    """What holds the Hub's large files is behind the link; the Hub itself is near."""
    shares, peaks = [], []
    with loopback_hub() as hub:
        for model in models:
            hub.add_repo(f"link/{model.name}", model)
        for _ in range(bench.runs):
            with relay(hub.storage_url, _rate(bench)) as link:
                hub.cdn_url = link.url
                env = {
                    "HF_ENDPOINT": hub.endpoint,
                    "HF_HUB_OFFLINE": "0",
                    "HF_HOME": str(bench.work / "huggingface"),
                }
                names = [f"hf://link/{model.name}" for model in models]
                peaks.append(_merge(bench, names, models, {}, env))
            shares.append(link.share(_rate(bench)))
    return _told(bench, "the Hub", shares, peaks)


def _merge(
    bench: Bench,
    names: Sequence[str],
    models: Sequence[Path],
    fields: Mapping[str, Any],
    env: Mapping[str, str] | None = None,
) -> int:
    """Bytes resident, at most."""
    bench.clear()
    recipe = {
        "merge_method": "linear",
        "models": [{"model": name} for name in names],
        "parameters": {"weight": 1.0},
        **fields,
    }
    path = bench.write_recipe("link", json.dumps(recipe))
    usage = bench.merge(path, "--allowed-mem", str(ALLOWED), env=env)
    bench.drop_output(weight_bytes(models[0]))
    return usage.peak


def _told(bench: Bench, place: str, shares: Sequence[float], peaks: Sequence[int]) -> Result:
    share, peak = middle(shares), max(peaks)
    size, rate = _size(bench) // MB, _rate(bench) // MB
    work = f"linear, 3 x {size} MB from {place}, {DELAY} ms and {rate} MB/s away"
    measured = f"{share:.0%} of the link, {peak / MB:,.0f} MB"
    met = share >= 0.8 and peak <= ALLOWED
    return Check("link", work, measured, f"80%, {ALLOWED / MB:,.0f} MB", met)


def put_models(server: Any, models: Sequence[Path]) -> None:
    """Copy the models to the server, past the relay."""
    client = server.client()
    for model in models:
        for file in (*weight_files(model), *model.glob("*.json")):
            with file.open("rb") as body:
                key = f"{model.name}/{file.name}"
                client.put_object(Bucket=server.bucket, Key=key, Body=body)

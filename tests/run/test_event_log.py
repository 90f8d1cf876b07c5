"""What happened in a run is kept in its output, wherever that is, and however the run ended."""

from __future__ import annotations

import json
import signal
import threading
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from run.family import save_model
from run.merging import SMALL, small_models
from run.places import Place
from run.stopping import merge as merge_it
from run.stopping import run_until

import distmerge
from distmerge.errors import MethodError, OutputLocked
from distmerge.run.event_log import EventLog, kept_events
from distmerge.run.events import Event, silent
from distmerge.write.clean import clean
from distmerge.write.lease import LEASE_FILE, Lease, lease
from distmerge.write.local_output import LocalOutput
from distmerge.write.output import open_output
from distmerge.write.verify import verify

LOG = "distmerge.events.jsonl"
BROKEN = """
def broken(models, *, key: str, layer_name=""):
    if layer_name == key:
        raise ZeroDivisionError("no such luck, nor its token")
    return models[0]
"""
DIGEST = "d" * 32


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("small")
    return [save_model(m, folder / str(i)) for i, m in enumerate(small_models(2))]


def recipe(models: list[str], method: str = "linear", **parameters: Any) -> dict[str, Any]:
    named = [{"model": model} for model in models]
    return {"merge_method": method, "models": named, "parameters": parameters or {"weight": 1.0}}


def lines(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.decode().splitlines()]


def kept_in(place: Place) -> list[dict[str, Any]]:
    """The log of a run that has not ended, by way of the output's store: on the Hub it lies on
    a branch."""
    output = open_output(place.url, place.options.get("storage_options"))
    digests = {p.split("/")[1] for p in place.files() if p.startswith(".distmerge/")}
    digests |= {b.removeprefix("distmerge-") for b in place.unfinished() if len(b) > 32}
    (digest,) = digests - {"lease.json"}
    output.begin(digest)
    return lines(output.read_bytes(f".distmerge/{digest}/events.jsonl"))


def test_a_merge_leaves_its_log_beside_the_manifest(place: Place, models):
    distmerge.merge(recipe(models), place.url, max_shard_size=SMALL, **place.options)
    files = place.files()
    told = lines(files[LOG])
    kinds = Counter(event["event"] for event in told)
    assert (kinds["plan"], kinds["unit"], kinds["publish"]) == (1, 4, 1)
    assert told[-1]["event"] == "publish"
    sizes = {name: len(data) for name, data in files.items() if name.endswith(".safetensors")}
    units = [event for event in told if event["event"] == "unit"]
    assert {unit["shard"]: unit["bytes_written"] for unit in units} == sizes
    assert told[-1]["bytes_written"] == sum(sizes.values())
    assert not [name for name in place.names() if ".distmerge" in name]
    checked = verify(place.url, storage_options=place.options.get("storage_options"))
    assert checked.ok
    assert not [note for note in checked.notes if LOG in note]


def test_a_failed_merge_leaves_its_log_with_what_is_unfinished(place: Place, models, tmp_path):
    (tmp_path / "my.py").write_text(BROKEN)
    made = recipe(models, f"{tmp_path / 'my.py'}:broken", key="b")
    with pytest.raises(MethodError):
        distmerge.merge(made, place.url, max_shard_size=SMALL, **place.options)
    told = kept_in(place)
    assert told[0]["event"] == "plan"
    assert told[-1]["event"] == "failed"
    assert told[-1]["error"] == "MethodError"
    assert told[-1]["text"].startswith("broken failed on b")
    assert LOG not in place.files()
    clean(place.url, storage_options=place.options.get("storage_options"))
    assert place.names() == set()


@pytest.mark.full
def test_a_killed_merge_leaves_its_log_and_the_next_goes_on_with_it(place: Place, models, tmp_path):
    options = {"max_shard_size": SMALL, "workers": 1, **place.options}
    code = run_until(
        *place.before_a_receipt, tmp_path / "mark", merge_it, recipe(models), place.url, options
    )
    assert code == -signal.SIGKILL
    assert [event["event"] for event in kept_in(place)][:1] == ["plan"]
    distmerge.merge(recipe(models), place.url, **options)
    plans = [e for e in lines(place.files()[LOG]) if e["event"] == "plan"]
    assert [plan["resumed"] for plan in plans] == [0, 2]


def test_a_model_that_is_replaced_or_read_leaves_no_log_behind(models, tmp_path):
    out = tmp_path / "out"
    distmerge.merge(recipe(models), str(out))
    distmerge.merge(recipe(models, weight=0.5), str(out), overwrite=True)
    first = (out / LOG).read_text()
    assert [event["event"] for event in lines(first.encode())].count("plan") == 1
    distmerge.merge(recipe([str(out), models[0]]), str(tmp_path / "next"))
    own = (tmp_path / "next" / LOG).read_text()
    assert own != first
    assert [event["event"] for event in lines(own.encode())].count("plan") == 1


class Counted(LocalOutput):
    """A local output that beats fast, and counts what it writes."""

    heartbeat = 0.02

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.written: Counter[str] = Counter()
        self.changed = threading.Condition()

    def write_bytes(self, path: str, data: bytes) -> None:
        super().write_bytes(path, data)
        with self.changed:
            self.written[path.rpartition("/")[2]] += 1
            self.changed.notify_all()

    def until_beats(self, count: int) -> None:
        with self.changed:
            last = self.written["lease.json"] + count
            assert self.changed.wait_for(lambda: self.written["lease.json"] >= last, timeout=60)


def test_the_log_is_written_with_heartbeats_and_only_if_there_is_news(tmp_path):
    output = Counted(tmp_path)
    path = tmp_path / ".distmerge" / DIGEST / "events.jsonl"
    with lease(output) as held, kept_events(output, DIGEST, held, silent) as (log, told):
        for number in range(100):
            told(Event("unit", {"shard": str(number)}))
        output.until_beats(2)
        once = output.written["events.jsonl"]
        assert 1 <= once <= output.written["lease.json"]
        assert len(lines(path.read_bytes())) == 100
        told(Event("progress", {"bytes_read": 1, "bytes_written": 0}))
        output.until_beats(3)
        assert output.written["events.jsonl"] == once, "bytes alone are no news"
        told(Event("unit", {"shard": "last"}))
        whole = log.close()
        output.until_beats(3)
        assert output.written["events.jsonl"] <= once + 1
        assert len(lines(whole)) == 101
    assert "lease.json" not in [p.name for p in tmp_path.rglob("*")]


def test_a_run_that_was_taken_over_leaves_the_others_log_alone(tmp_path):
    output = LocalOutput(tmp_path)
    other = json.dumps(asdict(replace(Lease.mine(60.0), owner="another", host="elsewhere")))

    def run() -> None:
        with lease(output) as held, kept_events(output, DIGEST, held, silent) as (log, told):
            log.keep()
            output.write_bytes(LEASE_FILE, other.encode())
            output.write_bytes(f".distmerge/{DIGEST}/events.jsonl", b"theirs\n")
            told(Event("notice", {"text": "mine"}))
            held.check()

    with pytest.raises(OutputLocked):
        run()
    assert (tmp_path / ".distmerge" / DIGEST / "events.jsonl").read_bytes() == b"theirs\n"


def test_credentials_in_a_sentence_are_not_kept(tmp_path):
    log = EventLog(LocalOutput(tmp_path), DIGEST)
    url = "s3://user:planted-secret@bucket/x"
    log(Event("notice", {"text": f"read {url}", "notices": [url], "places": {"a": url}}))
    (line,) = lines(log.close())
    assert "planted" not in json.dumps(line)
    assert line["text"] == "read s3://***@bucket/x"

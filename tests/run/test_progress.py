"""What is shown of a merge, to people and to programs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading

import pytest
from run.family import save_model
from run.merging import small_models

from distmerge.cli.app import app
from distmerge.errors import OutputError
from distmerge.run.events import Event
from distmerge.run.json_lines import JsonWatcher
from distmerge.run.log_file import logged
from distmerge.run.progress import (
    BarWatcher,
    LineWatcher,
    Tally,
    format_seconds,
    printable,
    summary,
    watching,
)

GB = 10**9


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def plan(**data) -> Event:
    known = {"units": 4, "bytes_in": 6 * GB, "bytes_out": 2 * GB, "tensors": 30}
    return Event("plan", {**known, **data})


def moved(read: int, written: int = 0) -> Event:
    return Event("progress", {"bytes_read": read, "bytes_written": written})


def done(**data) -> Event:
    known = {"url": "out", "seconds": 65.4, "bytes_read": 6 * GB, "bytes_written": 2 * GB}
    return Event("done", {**known, "tensors": 30, "lost_delta_share": None, "notices": [], **data})


def test_rates_and_time_left():
    clock = Clock()
    tally = Tally(clock)
    tally.note(plan())
    assert tally.seconds_left is None
    clock.now += 4
    tally.note(moved(2 * GB, GB // 2))
    tally.note(Event("unit", {"shard": "x", "done": 1, "total": 4}))
    assert tally.rates == (0.5 * GB, 0.125 * GB)
    assert tally.share == pytest.approx(2.5 / 8)
    assert tally.seconds_left == pytest.approx(5.5 / 0.625)
    assert str(tally) == ("1/4 shards, 2 GB read (500 MB/s), 500 MB written (125 MB/s), 8.8 s left")


def test_on_a_cluster_the_fastest_and_the_slowest_node_are_named():
    clock = Clock()
    tally = Tally(clock)
    tally.note(plan())
    clock.now += 4
    for node, read in (("10.0.0.1/aa", GB), ("10.0.0.2/bb", GB // 4), ("10.0.0.1/aa", GB)):
        tally.note(Event("progress", {"bytes_read": read, "bytes_written": 0, "node": node}))
    assert tally.node_rates == {"10.0.0.1/aa": GB / 2, "10.0.0.2/bb": GB / 16}
    told = "2 nodes, from 10.0.0.1/aa 500 MB/s to 10.0.0.2/bb 62.5 MB/s"
    assert told in str(tally)
    tally.nodes.pop("10.0.0.2/bb")
    assert "nodes" not in str(tally)


def test_rates_are_recent_ones():
    clock = Clock()
    tally = Tally(clock)
    tally.note(plan(bytes_in=1000 * GB))
    for _ in range(100):  # fast at first
        clock.now += 1
        tally.note(moved(2 * GB))
    for _ in range(60):
        clock.now += 1
        tally.note(moved(GB))
    assert tally.rates[0] == pytest.approx(GB)


def test_a_resumed_run_counts_what_is_left():
    clock = Clock()
    tally = Tally(clock)
    tally.note(plan(resumed=2))
    assert str(tally).startswith("2/4 shards")
    clock.now += 1
    tally.note(moved(2 * GB))
    assert tally.share == pytest.approx(0.25)
    assert tally.seconds_left == pytest.approx(3.0)


def test_reading_more_than_planned_is_no_negative_time():
    clock = Clock()
    tally = Tally(clock)
    tally.note(plan())
    clock.now += 1
    tally.note(moved(20 * GB))
    assert tally.share == 1.0
    assert tally.seconds_left is None


def test_plain_lines_come_every_few_seconds_and_hold_no_control_characters():
    clock, stream = Clock(), io.StringIO()
    watch = LineWatcher(stream, interval=5.0, clock=clock, told=["known already"])
    watch(Event("notice", {"text": "known already"}))
    watch(Event("notice", {"text": "a name with \x1b[31mred\x1b[0m"}))
    watch(plan())
    for _ in range(12):
        clock.now += 1
        watch(moved(GB // 2))
    watch(Event("retry", {"shard": "model.safetensors", "attempt": 2, "reason": "worker lost"}))
    watch(done(lost_delta_share=0.1234, notices=["licences differ", "known already"]))
    watch.close()
    text = stream.getvalue()
    assert all(c.isprintable() or c == "\n" for c in text)
    assert text.splitlines() == [
        "Note: a name with \\x1b[31mred\\x1b[0m",
        "30 tensors in 4 shards: 6 GB to read, 2 GB to write.",
        "0/4 shards, 2.5 GB read (500 MB/s), 0 bytes written (0 bytes/s), 11 s left",
        "0/4 shards, 5 GB read (500 MB/s), 0 bytes written (0 bytes/s), 6.0 s left",
        "Again, attempt 2: model.safetensors, since worker lost",
        "Note: licences differ",
        "30 tensors, 2 GB, in 1:05 min: out",
        "12.3% of what the merge changed was lost to rounding.",
    ]


def test_json_lines_are_whole_when_several_threads_tell():
    stream = io.StringIO()
    watch = JsonWatcher(stream)
    threads = [
        threading.Thread(target=lambda: [watch(moved(i)) for i in range(200)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert len(found) == 800
    assert sum(event["bytes_read"] for event in found) == 4 * sum(range(200))
    assert {event["event"] for event in found} == {"progress"}


def test_what_else_is_printed_meanwhile_is_not_between_the_json_lines(tmp_path):
    code = """
import os
from distmerge.run.events import Event
from distmerge.run.progress import watching
print("before")
with watching(json=True) as listener:
    print("a method's own words")
    os.write(1, b"a library's, past Python\\n")
    listener(Event("notice", {"text": "é"}))
print("after")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    before, line, after = done.stdout.decode().splitlines()
    assert (before, json.loads(line)["text"], after) == ("before", "é", "after")
    assert sorted(done.stderr.decode().splitlines()) == [
        "a library's, past Python",
        "a method's own words",
    ]


def test_a_log_keeps_every_event_of_a_merge_and_of_the_one_that_goes_on(tmp_path):
    models = [save_model(m, tmp_path / str(i)) for i, m in enumerate(small_models(2))]
    recipe = {"merge_method": "linear", "models": [{"model": m} for m in models]}
    recipe["parameters"] = {"weight": 1.0}
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
    log, out = tmp_path / "events.jsonl", tmp_path / "out"
    command = ["merge", str(tmp_path / "recipe.yml"), str(out), "--event-log", str(log), "--quiet"]
    for _ in range(2):
        app(command, standalone_mode=False)
    told = [json.loads(line) for line in log.read_text().splitlines()]
    assert [t["event"] for t in told if t["event"] != "progress"] == [
        "plan", "unit", "publish", "done", "notice",
    ]  # fmt: skip
    (unit,) = [t for t in told if t["event"] == "unit"]
    written = (out / "model.safetensors").stat().st_size
    assert (unit["shard"], unit["bytes_written"]) == ("model.safetensors", written)
    assert unit["bytes_read"] >= 2 * 4 * 63 * 11 * 4
    assert all(t["time"] > 1e9 for t in told)
    assert not (out / log.name).exists()


def test_a_log_that_cannot_be_written_ends_the_merge_before_it_begins(tmp_path):
    with (
        pytest.raises(OutputError, match=r"event log .* can't be written: No such file"),
        logged(str(tmp_path / "missing" / "log"), lambda event: None),
    ):
        pass


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_leaves_sentences_and_no_bar_behind(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    watch = BarWatcher(stream)
    watch(plan())
    watch(moved(GB, GB))
    watch(Event("notice", {"text": "[bold]not markup[/bold]"}))
    watch(done())
    watch.close()
    watch.close()
    text = stream.getvalue()
    assert "\x1b[?25l" in text, "the cursor is hidden"
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "and shown again"
    assert "25 %" in text
    assert "Note: [bold]not markup[/bold]" in text
    assert text.rstrip("\n").endswith("30 tensors, 2 GB, in 1:05 min: out")


@pytest.mark.parametrize(
    ("terminal", "term", "options", "kind"),
    [
        (True, "xterm", {}, "BarWatcher"),
        (True, "dumb", {}, "LineWatcher"),
        (False, "xterm", {}, "LineWatcher"),
        (True, "xterm", {"json": True}, "JsonWatcher"),
        (False, "xterm", {"json": True, "quiet": True}, "JsonWatcher"),
        (True, "xterm", {"quiet": True}, "function"),
    ],
)
def test_who_watches(monkeypatch, terminal, term, options, kind):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr("sys.stderr", Terminal() if terminal else io.StringIO())
    with watching(**options) as listener:
        assert type(listener).__name__ == kind


def test_summary_without_a_base():
    assert summary(done().data) == ["30 tensors, 2 GB, in 1:05 min: out"]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1:00 min"), (3725, "1:02:05 h")],
)
def test_seconds(seconds, shown):
    assert format_seconds(seconds) == shown


def test_printable():
    assert printable("é\n\t\x07") == "é\n\\x09\\x07"

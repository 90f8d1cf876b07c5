"""One pass for many candidates: the bytes of single merges, each input byte read once."""

from __future__ import annotations

import pytest
from run.family import MODELS, make_family, weight_bytes
from run.merging import least_memory

import distmerge
from distmerge.checkpoints import local_store
from distmerge.errors import OutputError, SweepFailed
from distmerge.run.options import MergeOptions
from distmerge.sweeps.definition import load_sweep
from distmerge.sweeps.plan import plan_sweep
from distmerge.sweeps.run import run_sweep
from distmerge.write.local_output import LocalOutput


def places_of(sweep, out, options):
    return {one.name: one.place for one in run_sweep(sweep, str(out), options)}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("family"))


def sweep_of(family, **keys):
    base, *others = (family.path(name) for name in MODELS[:3])
    plain = {
        "merge_method": "ties",
        "base_model": base,
        "models": [{"model": m} for m in others],
        "parameters": {"density": 0.5, "weight": 1.0},
        "out_dtype": "bfloat16",
    }
    return load_sweep({**plain, **keys})


@pytest.fixture
def reads(monkeypatch):
    """Bytes that the local store was asked for."""
    counted = []
    plain = local_store.LocalStore.read_into

    def read_into(self, file, start, into):
        counted.append(len(into))
        return plain(self, file, start, into)

    monkeypatch.setattr(local_store.LocalStore, "read_into", read_into)
    return counted


@pytest.mark.parametrize("memory", ["2GiB", "tight"])
def test_a_pass_gives_the_bytes_of_single_merges(family, tmp_path, memory, reads):
    models = [family.path(name) for name in MODELS[1:4]]
    sweep = sweep_of(
        family,
        combinations={"of": models, "size": 2},
        list=[
            {"merge_method": "ties", "parameters.density": 0.2},
            {"merge_method": "dare_ties", "seed": 3},
            {"merge_method": "model_stock", "parameters": {}},
        ],
    )
    decided = plan_sweep(sweep, MergeOptions(workers=2, max_shard_size="9MB"))
    assert [len(members) for members in decided.passes] == [9]
    if memory == "tight":
        single = max(
            (least_memory(plan.request, workers=2, max_shard_size="9MB") for plan in decided.plans),
            key=lambda size: int(size[:-3]),
        )
        memory = f"{int(single[:-3]) + 150}MiB"
    options = {"workers": 2, "max_shard_size": "9MB", "allowed_mem": memory}
    decided = plan_sweep(sweep, MergeOptions(**options))
    reads.clear()
    places = places_of(sweep, tmp_path / "out", MergeOptions(**options))
    taken = sum(reads)
    for candidate, plan in zip(decided.candidates, decided.plans, strict=True):
        single = tmp_path / "single" / candidate.name
        distmerge.merge(plan.request, str(single), workers=2, max_shard_size="9MB")
        assert weight_bytes(single) == weight_bytes(places[candidate.name]), candidate.name
    if memory == "2GiB":
        assert decided.bytes_in <= taken <= decided.bytes_in * 1.05
    else:
        assert len(decided.passes) > 1
    assert decided.projected <= decided.memories[0].allowed


def test_one_that_fails_is_dropped_and_the_pass_goes_on(family, tmp_path, reads):
    lambdas = [1.0, 3e38, 0.5]
    sweep = sweep_of(
        family,
        merge_method="task_arithmetic",
        parameters={"weight": 1000.0},
        grid={"parameters.lambda": lambdas},
    )
    decided = plan_sweep(sweep, MergeOptions(workers=2))
    reads.clear()
    with pytest.raises(SweepFailed, match="1 of 3"):
        run_sweep(sweep, str(tmp_path / "out"), MergeOptions(workers=2))
    assert sum(reads) < 2.2 * decided.bytes_in, "the pass, and the one that fails alone"
    for candidate, plan in zip(decided.candidates, decided.plans, strict=True):
        if candidate.settings["parameters.lambda"] == 3e38:
            continue
        single = tmp_path / "single" / candidate.name
        distmerge.merge(plan.request, str(single), workers=2)
        assert weight_bytes(single) == weight_bytes(tmp_path / "out" / candidate.name)


def test_a_sweep_that_was_stopped_goes_on_shard_by_shard(family, tmp_path, reads, monkeypatch):
    from distmerge.run import engine

    sweep = sweep_of(family, grid={"parameters.density": [0.2, 0.4, 0.6]})
    options = MergeOptions(workers=2, max_shard_size="9MB")
    plain, ran = engine.merge_bundle, []

    def stopping(worker, bundle):
        if ran:
            raise KeyboardInterrupt
        ran.append(bundle.shard)
        return plain(worker, bundle)

    monkeypatch.setattr(engine, "merge_bundle", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, str(tmp_path / "out"), options)
    monkeypatch.setattr(engine, "merge_bundle", plain)
    decided = plan_sweep(sweep, options)
    done = decided.plans[0].units[0].bytes_in
    reads.clear()
    places = places_of(sweep, tmp_path / "out", options)
    assert sum(reads) <= (decided.bytes_in - done) * 1.05
    for candidate, plan in zip(decided.candidates, decided.plans, strict=True):
        single = tmp_path / "single" / candidate.name
        distmerge.merge(plan.request, str(single), workers=2, max_shard_size="9MB")
        assert weight_bytes(single) == weight_bytes(places[candidate.name])
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.safetensors")}
    assert places_of(sweep, tmp_path / "out", options) == places
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.safetensors")}


def refuse_to(step, name, monkeypatch):
    """A candidate's place where no shard can be begun, or none can be written."""
    plain = LocalOutput.open_write

    def refuse(*given):
        raise OutputError("There is no room.")

    def open_write(self, path):
        if not path.endswith(".safetensors") or name not in self.root:
            return plain(self, path)
        if step == "open_write":
            refuse()
        pending = plain(self, path)
        pending.write = refuse
        return pending

    monkeypatch.setattr(LocalOutput, "open_write", open_write)


@pytest.mark.parametrize("step", ["open_write", "write"])
def test_an_output_that_takes_nothing_does_not_stop_the_others(
    family, tmp_path, reads, monkeypatch, step
):
    sweep = sweep_of(family, grid={"parameters.density": [0.2, 0.4, 0.6]})
    decided = plan_sweep(sweep, MergeOptions(workers=2))
    bad = decided.candidates[0].name
    refuse_to(step, bad, monkeypatch)
    reads.clear()
    told = []
    with pytest.raises(SweepFailed, match="1 of 3"):
        run_sweep(sweep, str(tmp_path / "out"), MergeOptions(workers=2), listener=told.append)
    notices = [event.data["text"] for event in told if event.kind == "notice"]
    assert f"{tmp_path / 'out' / bad} is tried alone, since There is no room." in notices
    assert sum(reads) < 1.5 * decided.bytes_in, "the pass, and little of the one that fails alone"
    assert not list((tmp_path / "out" / bad).glob("*.safetensors"))
    for candidate, plan in list(zip(decided.candidates, decided.plans, strict=True))[1:]:
        single = tmp_path / "single" / candidate.name
        distmerge.merge(plan.request, str(single), workers=2)
        assert weight_bytes(single) == weight_bytes(tmp_path / "out" / candidate.name)

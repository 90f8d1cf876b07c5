"""Which options hold where."""

from __future__ import annotations

import pytest

from distmerge.checkpoints.fsspec_store import FsspecStore
from distmerge.checkpoints.hub_account import hub_account
from distmerge.checkpoints.retry import RetryPolicy
from distmerge.checkpoints.storage_options import (
    check_storage_options,
    options_for,
    quoted,
    secret_values,
)
from distmerge.errors import OutputError, ReadFailed, RecipeError
from distmerge.write.fsspec_output import FsspecOutput

BY_PREFIX = {
    "s3://": {"anon": True},
    "s3://bucket": {"key": "a"},
    "s3://bucket/deep/": {"key": "b"},
    "gs://x": {"token": "c"},
}


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("s3://other/model", {"anon": True}),
        ("s3://bucket", {"key": "a"}),
        ("s3://bucket/model", {"key": "a"}),
        ("s3://bucket-2/model", {"anon": True}),
        ("s3://bucket/deep/model", {"key": "b"}),
        ("s3://bucket/deeper", {"key": "a"}),
        ("gs://xy/model", {}),
        ("./model", {}),
    ],
)
def test_the_longest_prefix_counts(url, found):
    assert options_for(url, BY_PREFIX) == found


def test_options_without_prefixes_hold_everywhere():
    assert options_for("s3://bucket", {"key": "a"}) == {"key": "a"}
    assert options_for("./model", {}) == {}
    assert options_for("./model", None) == {}


def test_mixed_forms_are_refused_without_being_shown():
    check_storage_options(BY_PREFIX)
    check_storage_options({"key": "a", "client_kwargs": {"endpoint_url": "http://x"}})
    for wrong in ({**BY_PREFIX, "key": "hidden"}, {"s3://b": "hidden"}):
        with pytest.raises(RecipeError, match="mixes URL prefixes") as raised:
            check_storage_options(wrong)
        assert "hidden" not in str(raised.value)


@pytest.mark.parametrize(
    "options",
    [
        {"client_kwargs": {"endpoint_url": "hidden"}},
        {"endpoint_url": "http://127.0.0.1:9/Hidden/"},
        {"client_kwargs": {"region_name": "hidden !"}},
        {"config_kwargs": {"signature_version": "hidden"}},
        {"config_kwargs": {"s3": {"addressing_style": "hidden"}}},
    ],
)
def test_values_that_are_refused_are_told_without_being_shown(options):
    once, given = RetryPolicy(attempts=1), {"key": "a", "secret": "b", **options}
    for ask in (
        FsspecStore("s3://bucket/model", given, policy=once).files,
        lambda: FsspecOutput("s3://bucket/out", given, policy=once).exists("x"),
    ):
        with pytest.raises((ReadFailed, OutputError), match="s3://bucket") as raised:
            ask()
        assert "hidden" not in str(raised.value).lower()
        assert "***" in str(raised.value)


def test_a_value_that_is_a_word_is_left_in_other_words():
    secrets = secret_values({"s3": {"addressing_style": "path"}, "region": "auto", "k": "aB3x"})
    told = quoted(ValueError("automatic path, pathlib, auto; kAb3X1"), secrets)
    assert told == "automatic ***, pathlib, ***; k***1"


def test_values_are_taken_out_whole_and_where_they_are_nested():
    secrets = secret_values({"http": {"proxies": ["http://me:pass word@host:1/"], "x": "abc"}})
    told = quoted(ValueError("http://me:pass word@host:1/x, HOST:1, pass word, abc"), secrets)
    assert told == "***/x, ***:1, ***, abc"
    assert hub_account("hf://a/b", {"hf://": {"token": "hidden"}}).secrets == ("hidden",)

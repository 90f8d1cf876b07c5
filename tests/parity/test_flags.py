"""Every flag of mergekit-yaml and mergekit-multi 0.1.5 is taken, answered or refused by name."""

from __future__ import annotations

import re
import subprocess

import pytest
import typer.main
from parity.oracle import ensure_mergekit

from distmerge.cli.app import app
from distmerge.cli.mergekit_flags import ANSWERS, ANSWERS_WITH_VALUE, OUT, REFUSED, translated

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
OURS = {
    name
    for parameter in typer.main.get_command(app).commands["merge"].params  # type: ignore[attr-defined]
    for name in (*parameter.opts, *parameter.secondary_opts)
}


@pytest.mark.parametrize("tool", ["mergekit-yaml", "mergekit-multi"])
def test_every_flag_is_known(tool):
    command = [ensure_mergekit().with_name(tool), "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    described = re.findall(r"^  (-.*?)(?:  |$)", said, re.MULTILINE)
    flags = {flag for line in described for flag in re.findall(r"--?[a-zA-Z][\w-]*", line)}
    flags -= {"--help"}
    assert {"--cuda", "--lora-merge-cache", "--random-seed"} <= flags
    for flag in flags - REFUSED.keys():
        found, _ = translated([flag, "1"])
        known = flag in ANSWERS or flag in ANSWERS_WITH_VALUE or flag == OUT
        assert known or (found[0] in OURS), flag
    for flag in flags & REFUSED.keys():
        with pytest.raises(typer.BadParameter, match="would change the result"):
            translated([flag])

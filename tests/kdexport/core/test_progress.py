"""The lines of finished stages: one below the other, each with its target."""

import re

import pytest

from kdexport.core.progress import Reporter
from kdexport.targets import target_names


def test_the_times_of_all_stages_stand_in_one_column(capsys: pytest.CaptureFixture[str]) -> None:
    targets = target_names()
    assert len(targets) > 20
    reporter = Reporter()
    for name in ("data", "quantize-aware", *(f"compile {target}" for target in targets)):
        with reporter.stage(name):
            pass
    lines = capsys.readouterr().err.splitlines()
    assert f"compile {targets[0]}" in lines[2]
    places = {match.end() for line in lines if (match := re.search(r"0\.0 s$", line))}
    assert (len(places), len(lines)) == (1, 2 + len(targets)), lines

"""Files that are written by commands."""

from pathlib import Path

import pytest

from kdexport.core.files import require_writable_file
from kdexport.errors import OutputError


def test_reports_that_could_not_be_written_are_refused_before_anything_runs(tmp_path: Path) -> None:
    require_writable_file(None)
    require_writable_file(tmp_path / "new.xml")
    for path in (tmp_path, tmp_path / "missing" / "new.xml"):
        with pytest.raises(OutputError):
            require_writable_file(path)

"""One small bundle and one server, shared by all tests that do not change them."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import made_once
from tests.kdexport.serving.running_server import Running, running
from tests.kdexport.serving.served_bundles import make_bundle


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verified bundle that no test changes."""
    return made_once(tmp_path_factory, "zoo", make_bundle) / "bundle"


@pytest.fixture
def zoo_copy(zoo: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may damage."""
    return Path(shutil.copytree(zoo, tmp_path / "zoo"))


@pytest.fixture(scope="session")
def server(zoo: Path) -> Iterator[Running]:
    """A server with one model, ``zoo``, and short deadlines."""
    options = ("--header-timeout", "2", "--body-timeout", "4", "--max-pixels", "4000000", "--drain", "0.2")
    with running(f"zoo={zoo}", *options) as started:
        yield started
        assert started.process.poll() is None, started.log.read_text()
        log = started.log.read_text()
        assert "Traceback" not in log, log

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kdexport import plugins
from kdexport.registry import Registry
from tests.conftest import Command
from tests.kdexport.orchard import plant


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes longer than ten seconds; leave out with -m 'not slow'")


@pytest.fixture(scope="package", autouse=True)
def single_thread() -> Iterator[None]:
    """Small tensors are faster on one thread, and results do not depend on the machine's core count."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Fresh layers draw the same weights in every run and in any order of tests."""
    torch.manual_seed(1234)


@pytest.fixture
def plugged(here: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command in this process, which forgets after the test what the plugins of ``--plugin`` registered."""
    from kdexport.backends import BACKENDS
    from kdexport.students import STUDENTS
    from training.distillers import DISTILLERS, settings
    from training.teachers import TEACHERS

    registries: tuple[Registry[Any], ...] = (BACKENDS, STUDENTS, TEACHERS, DISTILLERS)
    monkeypatch.setenv(plugins.PLUGINS, "")
    for registry in registries:
        # What ships is registered for good, and only once.
        registry.names()
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(settings, "_BY_NAME", dict(settings._BY_NAME))
    monkeypatch.setattr(plugins, "_imported", dict(plugins._imported))
    return here


@pytest.fixture
def fruits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry[object]]:
    """A registry with the fruits quince and medlar."""
    plant(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("orchard")
    yield module.FRUITS
    for name in [name for name in sys.modules if name.split(".")[0] == "orchard"]:
        del sys.modules[name]

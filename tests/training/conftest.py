from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.training.small_runs import write_image_folders


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    # Threads that spin on a busy core make networks of this size a hundred times slower.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folders(tmp_path_factory.mktemp("tiny"))

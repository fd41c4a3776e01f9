"""The settings of a GPU's kernels; they are flags of torch, which a machine without a GPU has too."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdexport.errors import ConfigError
from training.devices import choose_kernels, compiled, full_float32, nondeterminism_named
from training.evaluation import predict


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32
    yield
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = before
    torch.use_deterministic_algorithms(False)


def kernels() -> tuple[bool, bool, bool, str | None]:
    cudnn = torch.backends.cudnn
    asked = torch.are_deterministic_algorithms_enabled()
    return cudnn.benchmark, cudnn.deterministic, asked, os.environ.get("CUBLAS_WORKSPACE_CONFIG")


def test_cuda_takes_the_fastest_kernels_or_those_that_repeat_their_bits() -> None:
    before = kernels()
    for deterministic in (True, False):
        choose_kernels(torch.device("cpu"), deterministic=deterministic)
        assert kernels() == before
    choose_kernels(torch.device("cuda"), deterministic=False)
    assert kernels() == (True, False, False, None)
    choose_kernels(torch.device("cuda"), deterministic=True)
    assert kernels() == (False, True, True, ":4096:8")


def test_evaluation_is_without_tf32_and_leaves_the_settings_of_the_training() -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    seen = []

    class Network(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            return images.mean((2, 3))

    predict(Network(), [(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))])
    assert seen == [(False, False)]
    with pytest.raises(KeyError), full_float32():
        raise KeyError
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (True, True)


def test_an_operation_without_a_deterministic_kernel_is_named() -> None:
    said = "adaptive_max_pool2d_backward_cuda does not have a deterministic implementation, but you set ..."
    with (
        pytest.raises(ConfigError, match="but adaptive_max_pool2d_backward_cuda has no deterministic kernel") as caught,
        nondeterminism_named(),
    ):
        raise RuntimeError(said)
    assert "train.deterministic" in caught.value.remedy
    with pytest.raises(RuntimeError, match="out of memory"), nondeterminism_named():
        raise RuntimeError("out of memory")


def test_every_cell_of_a_large_table_is_compiled_and_not_the_first_eight_only(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = []

    def noted(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., Any]:
        forms.append(graph)
        return graph.forward

    class Task(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layer = nn.Linear(3, width)

        def forward(self, images: Tensor) -> Tensor:
            return torch.relu(self.layer(images))

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=noted))
    for width in range(1, 11):
        task = compiled(Task(width), "yes", torch.device("cuda"))
        assert task(torch.zeros(2, 3)).shape == (2, width)
        assert len(forms) == width

"""The network of a reference: in evaluation mode, in float32, with weights that fit, or a clear error."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kdexport.errors import CheckpointError, ConfigError, ReparamError
from kdexport.origins.networks import import_network
from kdexport.origins.references import Reference, parse_reference

SHELF = """
import torch
from torch import nn

def body(num_classes=5):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, num_classes),
    )
def ready(num_classes=5): return body(num_classes).eval()
def training(): return body()
def half(): return body().half().eval()
def mixed():
    net = body().eval()
    net[5].double()
    return net
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "nets_to_import.py").write_text(SHELF)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("nets_to_import", None)


def reference(text: str) -> Reference:
    found = parse_reference(text)
    assert found is not None
    return found


def body(num_classes: int = 5) -> nn.Module:
    made: nn.Module = import_network(reference("nets_to_import:ready"), num_classes=num_classes).module
    return made


def export(net: nn.Module, path: Path, *shapes: tuple[int, ...], fixed: bool = False) -> None:
    batch = None if fixed else {0: torch.export.Dim("batch", min=1)}
    kind = next(net.parameters()).dtype
    inputs = tuple(torch.zeros(shape, dtype=kind) for shape in shapes)
    torch.export.save(torch.export.export(net, inputs, dynamic_shapes=None if fixed else (batch,) * len(shapes)), path)


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("ready", ""),
        ("training", "put into evaluation mode"),
        ("half", "weights in float16: cast to float32"),
        ("mixed", "weights in float64: cast to float32"),
    ],
)
def test_a_factory_network_is_in_evaluation_mode_and_float32_and_changes_are_noted(name: str, note: str) -> None:
    found = import_network(reference(f"nets_to_import:{name}"), num_classes=5)
    assert not any(part.training for part in found.module.modules())
    assert {value.dtype for value in found.module.state_dict().values()} == {torch.float32, torch.int64}
    assert len(found.notes) == bool(note)
    assert note in " ".join(found.notes)
    assert found.preprocessing is None


def test_weights_of_a_file_are_loaded_and_their_digest_and_changes_are_kept(folder: Path) -> None:
    expected = {name: value + 1 for name, value in body().state_dict().items()}
    torch.save({"state_dict": {f"module.{name}": value for name, value in expected.items()}}, folder / "net.pth")
    found = import_network(reference("nets_to_import:ready"), num_classes=5, weights="net.pth")
    assert all(torch.equal(found.module.state_dict()[name], value) for name, value in expected.items())
    assert len(found.weights_sha256) == 64
    assert any("prefix 'module.' removed" in note for note in found.notes)


@pytest.mark.parametrize(
    ("weights", "error", "words"),
    [
        ("six.pth", CheckpointError, "6 outputs"),
        ("missing.pth", CheckpointError, "'0.weight'"),
        ("nowhere.pth", CheckpointError, "no file nowhere.pth"),
        ("DEFAULT", ConfigError, "no weights named 'DEFAULT'"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: str, error: type[Exception], words: str, folder: Path) -> None:
    torch.save(body(6).state_dict(), folder / "six.pth")
    torch.save({name: value for name, value in body().state_dict().items() if name != "0.weight"}, "missing.pth")
    with pytest.raises(error, match=words):
        import_network(reference("nets_to_import:ready"), num_classes=5, weights=weights)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_a_program_computes_what_was_exported(kind: torch.dtype, folder: Path) -> None:
    net = body().to(kind)
    export(net, folder / "net.pt2", (2, 3, 16, 16))
    found = import_network(reference("net.pt2"), num_classes=None)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(found.module(images), net.float()(images), rtol=0, atol=1e-6)
    assert bool(found.notes) == (kind == torch.float16)


class Two(nn.Module):
    """Takes two images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = body()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.sub(self.net(left), self.net(right))


@pytest.mark.parametrize(
    ("shapes", "fixed", "words"),
    [
        (((2, 3, 16, 16),), True, "a fixed batch of 2"),
        (((2, 3, 16, 16),) * 2, False, "2 inputs"),
        (((2, 1, 16, 16),), False, r"\(N, 1, 16, 16\)"),
        (((2, 3, 16, 32),), False, r"\(N, 3, 16, 32\)"),
    ],
)
def test_a_program_of_other_inputs_than_a_batch_of_square_rgb_images_is_refused(
    shapes: tuple[tuple[int, ...], ...], fixed: bool, words: str, folder: Path
) -> None:
    grey = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    export(Two().eval() if len(shapes) == 2 else grey if shapes[0][1] == 1 else body(), folder / "net.pt2", *shapes,
           fixed=fixed)  # fmt: skip
    with pytest.raises(ReparamError, match=words) as refused:
        import_network(reference("net.pt2"), num_classes=None)
    assert refused.value.remedy

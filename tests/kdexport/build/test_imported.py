"""What becomes of a network of another origin: stored whole, without its code, or refused by what is wrong with it."""

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdexport.build import imported
from kdexport.build.imported import OWN_WEIGHTS, ImportRequest, import_student, judge_student
from kdexport.checkpoint import TrainedStudent, load_student
from kdexport.data.datasets import ImageSet
from kdexport.data.preprocessing_settings import PreprocessingSettings
from kdexport.errors import CheckpointError, ConfigError, KdexportError, ReparamError
from kdexport.origins import networks
from kdexport.origins.references import parse_reference
from kdexport.workspace import Workspace

CLASSES = ("ant", "bee", "cow", "dog", "elk")
SHELF = """
from dataclasses import dataclass
import torch
from torch import nn

calls = []

def body(*last, classes=5):
    calls.append(1)
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, classes), *last,
    )
    net[1].running_mean.uniform_(-1, 1)
    net[1].running_var.uniform_(0.5, 2)
    return net.eval()

class After(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.net, self.function = body(), function
    def forward(self, x): return self.function(self.net(x), x)

@dataclass
class Answer:
    logits: torch.Tensor
    features: torch.Tensor

def good(): return body()
def spread():
    # Classes of about equal size among single colours.
    torch.manual_seed(4)
    colours = torch.randn(5, 3)
    head = nn.Linear(3, 5)
    head.weight.data, head.bias.data = 2 * colours, -(colours ** 2).sum(1)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()
def six(): return body(classes=6)
def parts(): return After(lambda y, x: {"logits": y, "aux": (x, 2 * y)}).eval()
def answer(): return After(lambda y, x: Answer(y, x)).eval()
def only(): return After(lambda y, x: [y]).eval()
def softmax(): return body(nn.Softmax(1))
def sigmoid(): return body(nn.Sigmoid())
def log_softmax(): return body(nn.LogSoftmax(1))
def maps(): return After(lambda y, x: y[:, :, None, None]).eval()
def features(): return After(lambda y, x: x).eval()
def labels(): return After(lambda y, x: y.argmax(1)).eval()
def over_batch(): return After(lambda y, x: y - y.mean(0)).eval()
def branching(): return After(lambda y, x: y if y.sum() > 0 else 2 * y).eval()
def noisy(): return After(lambda y, x: nn.functional.dropout(y, 0.5, training=True)).eval()
def grey(): return nn.Sequential(nn.Conv2d(1, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
def fixed(): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 32, 5)).eval()
def broken():
    net = body()
    net[0].weight.data[0, 0, 0, 0] = float("nan")
    return net
def hooked():
    net = body()
    net[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    return net
"""

Import = Callable[..., TrainedStudent]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "nets_to_build.py").write_text(SHELF)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("nets_to_build", None)


def take(text: str, said: list[str] | None = None, *, fresh: bool = False, **changes: Any) -> TrainedStudent:
    reference = parse_reference(text)
    assert reference is not None
    settings = PreprocessingSettings(**changes.pop("preprocessing", {"image_size": 16}))
    given = {"weights": OWN_WEIGHTS, "classes": CLASSES, "provenance": {"dataset_sha256": "0" * 64}, **changes}
    request = ImportRequest(reference=reference, preprocessing=settings, **given)
    return import_student(request, Workspace(Path("ws")), (said if said is not None else []).append, fresh=fresh)


def shelf() -> Any:
    import importlib

    return importlib.import_module("nets_to_build")


IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(4)) * 2


def test_an_imported_network_computes_the_same_without_the_module_that_made_it() -> None:
    said: list[str] = []
    trained = take("nets_to_build:good", said)
    with torch.no_grad():
        expected = shelf().good()(IMAGES)
    sys.modules.pop("nets_to_build")
    Path("nets_to_build.py").unlink()
    with torch.no_grad():
        torch.testing.assert_close(load_student(trained)(IMAGES), expected, rtol=0, atol=1e-6)
    assert trained.spec.student == "nets_to_build:good"
    assert trained.spec.classes == CLASSES
    assert (trained.spec.preprocessing.image_size, trained.spec.preprocessing.resize) == (16, 18)
    assert len(said) == 1
    assert "that of ImageNet is taken" in said[0]
    assert "16 pixels" not in said[0]
    assert trained.spec.provenance["dataset_sha256"] == "0" * 64
    stored = "".join(path.read_text(errors="ignore") for path in trained.weights.parent.iterdir())
    assert str(Path.cwd()) not in stored


@pytest.mark.parametrize(
    ("name", "output"), [("parts", "logits"), ("answer", "logits"), ("only", ""), ("log_softmax", "")]
)
def test_the_chosen_output_is_the_network(name: str, output: str) -> None:
    trained = take(f"nets_to_build:{name}", output=output)
    with torch.no_grad():
        expected = shelf().good()(IMAGES)
        if name == "log_softmax":
            expected = expected.log_softmax(1)
        torch.testing.assert_close(load_student(trained)(IMAGES), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("six", CheckpointError, ["6 classes", "has 5", "ant, bee, cow and 2 more"]),
        ("parts", ConfigError, ["3 tensors", "logits (2, 5)", "aux.0 (2, 3, 16, 16)"]),
        ("softmax", ReparamError, ["probabilities", "sum is 1"]),
        ("sigmoid", ReparamError, ["probabilities", "sigmoid"]),
        ("maps", ReparamError, ["(2, 5, 1, 1)", "flatten(1)"]),
        ("features", ReparamError, ["(2, 3, 16, 16)"]),
        ("labels", ReparamError, ["int64", "(2,)"]),
        ("over_batch", ReparamError, ["alone", "batch of 2"]),
        ("branching", ReparamError, ["depends on values of the input", "nets_to_build.py, line"]),
        ("noisy", ReparamError, ["dropout"]),
        ("grey", ReparamError, ["cannot be run on images (2, 3, 16, 16)"]),
        ("fixed", ReparamError, ["cannot be run on images (2, 3, 16, 16)"]),
        ("broken", ReparamError, ["0.weight", "NaN"]),
        ("hooked", ReparamError, ["forward hook"]),
    ],
)
def test_what_cannot_be_a_student_is_refused_and_nothing_is_left(
    name: str, error: type[KdexportError], words: list[str]
) -> None:
    with pytest.raises(error) as refused:
        take(f"nets_to_build:{name}")
    said = f"{refused.value.message} {refused.value.remedy}"
    assert not [word for word in words if word not in said], said
    assert "\n" not in refused.value.message
    assert refused.value.exit_code == 2
    assert not [path for path in Path("ws").rglob("*") if path.is_file() and path.suffix]


def program(path: str, scale: float = 1.0) -> None:
    net = shelf().good()
    with torch.no_grad():
        net[5].weight *= scale
    batch = ({0: torch.export.Dim("batch", min=1)},)
    torch.export.save(torch.export.export(net, (torch.zeros(2, 3, 16, 16),), dynamic_shapes=batch), path)


def test_a_program_is_imported_once_until_something_that_it_depends_on_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []
    right = networks.import_network

    def counted(*arguments: Any, **options: Any) -> Any:
        made.append("made")
        return right(*arguments, **options)

    monkeypatch.setattr(networks, "import_network", counted)
    program("net.pt2")
    said: list[str] = []
    first = take("net.pt2", said, preprocessing={})
    assert first.spec.preprocessing.image_size == 16
    again: list[str] = []
    assert take("net.pt2", again, preprocessing={}) == first
    assert (len(made), again) == (1, said)
    assert take("net.pt2", preprocessing={"mean": (0.1, 0.2, 0.3)}).weights != first.weights
    assert take("net.pt2", preprocessing={}, classes=(*CLASSES[:4], "fox")).weights != first.weights
    assert len(made) == 3
    take("net.pt2", preprocessing={}, fresh=True)
    assert len(made) == 4
    program("net.pt2", 0.5)
    changed = take("net.pt2", preprocessing={})
    assert len(made) == 5
    assert changed.weights_sha256 != first.weights_sha256


def test_a_file_of_weights_is_known_by_its_content(monkeypatch: pytest.MonkeyPatch) -> None:
    request = ImportRequest(
        reference=parse_reference("torchvision:resnet18") or pytest.fail("no reference"), weights="net.pth",
        classes=CLASSES, preprocessing=PreprocessingSettings(), provenance={},
    )  # fmt: skip
    keys = []
    for content in (b"one", b"two", b"one"):
        Path("net.pth").write_bytes(content)
        keys.append(imported.imported(request).key)
    assert keys[0] == keys[2] != keys[1]
    monkeypatch.setattr("kdexport.workspace.tool_versions", lambda *names: dict.fromkeys(names, "99"))
    assert imported.imported(request).key != keys[0]


def test_a_factory_is_called_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    first = take("nets_to_build:good")
    assert take("nets_to_build:good", fresh=False) == first
    assert len(shelf().calls) == 2


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("net.pt2", {"weights": "other.pth"}, "contains its weights"),
        ("timm:resnet18", {}, "random weights"),
        ("torchvision:resnet18", {}, "random weights"),
        ("net.pt2", {"preprocessing": {"image_size": 24}}, "exported for images of 16 pixels; image_size is 24"),
    ],
)
def test_weights_and_sizes_that_would_not_be_used_are_refused(name: str, changes: dict[str, Any], words: str) -> None:
    program("net.pt2")
    with pytest.raises(ConfigError, match=words):
        take(name, **changes)


def test_the_notes_and_the_digest_of_the_weights_are_stored() -> None:
    net = shelf().good()
    torch.save({"state_dict": {f"module.{name}": value.half() for name, value in net.state_dict().items()}}, "net.pth")
    said: list[str] = []
    trained = take("nets_to_build:good", said, weights="net.pth")
    origin = json.loads((trained.weights.parent / "student.json").read_text())["provenance"]["origin"]
    assert origin["weights"] == "net.pth"
    assert len(origin["weights_sha256"]) == 64
    assert [f"nets_to_build:good: {note}" for note in origin["notes"]] == said
    assert any("float16" in note for note in origin["notes"])
    assert np.unique(said).size == len(said)


def judged(reorder: Callable[[Any], Any]) -> list[str]:
    """What is said of a network on 240 images, whose labels are its own answers after ``reorder``."""
    trained = take("nets_to_build:spread", preprocessing={"image_size": 16, "mean": (0.5,) * 3, "std": (0.25,) * 3})
    rng = np.random.default_rng(8)
    pixels = rng.integers(0, 256, (240, 1, 1, 3)).repeat(16, 1).repeat(16, 2).astype(np.uint8)
    inputs = (torch.from_numpy(np.moveaxis(pixels, 3, 1).copy()) / 255 - 0.5) / 0.25
    with torch.no_grad():
        answers = shelf().spread()(inputs).argmax(1).numpy()
    assert len(np.unique(answers)) == len(CLASSES)
    labels = np.asarray(reorder(answers), np.int64)
    said: list[str] = []
    judge_student(trained, ImageSet(classes=CLASSES, labels=labels, pixels=pixels, files=()), said.append)
    return said


def test_a_network_of_these_classes_is_told_its_top_1_and_nothing_else() -> None:
    assert judged(lambda answers: answers) == [
        "nets_to_build:spread: top-1 100.00% of 240 validation images, chance level 20.00%"
    ]


def test_a_network_with_its_classes_in_another_order_or_at_chance_is_warned_of() -> None:
    first, warning = judged(lambda answers: (answers + 1) % len(CLASSES))
    assert "top-1 0.00%" in first
    assert warning.startswith("Warning: nets_to_build:spread cannot have been trained for these classes")
    assert "in the order of its outputs" in warning
    _, warning = judged(lambda answers: np.random.default_rng(1).integers(0, 5, len(answers)))
    assert "not better than chance" in warning


def test_the_commands_of_the_documentation_parse_and_its_network_is_imported(folder: Path) -> None:
    import typer

    from kdexport.cli import app

    text = (Path(__file__).parents[3] / "docs" / "bring-your-own.md").read_text()
    (source,) = re.findall(r"```python\n# net\.py\n(.*?)```", text, flags=re.DOTALL)
    (block,) = re.findall(r"```sh\n(kdexport build --student net:make .*?)```", text, flags=re.DOTALL)
    commands = typer.main.get_command(app)
    parsed = {}
    for line in block.splitlines():
        _, name, *arguments = shlex.split(line)
        with commands.commands[name].make_context(name, arguments) as context:  # type: ignore[attr-defined]
            parsed[name] = context.params
    assert list(parsed) == ["build", "verify", "gate", "serve"]
    asked = parsed["build"]
    assert {str(parsed[name].get("bundle", parsed[name].get("bundles"))).strip("[]'") for name in list(parsed)[1:]} == {
        str(asked["out"])
    }
    (folder / "net.py").write_text(source)
    trained = take(
        asked["student"], weights=asked["weights"], classes=tuple("abcdefghij"),
        preprocessing={"image_size": asked["image_size"]},
    )  # fmt: skip
    assert trained.spec.image_size == 64
    sys.modules.pop("net", None)

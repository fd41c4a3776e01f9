import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from kdexport.errors import CheckpointError, ReparamError
from kdexport.origins.stored_program import read_program, store_program
from kdexport.reparam.program import original_graph


class Mixed(nn.Module):
    """Convolution, batch norm, attention, a shared layer, a constant grid and a padding mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.edge = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.twin = nn.Linear(8, 8)
        self.gain = nn.Parameter(torch.tensor(0.75))
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            self.norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
            self.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        x = self.edge(torch.relu(self.norm(self.conv(x)))) * self.gain
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + torch.arange(tokens.shape[1]).float().sin()[None, :, None]
        tokens = self.twin(self.twin(tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]))
        logits: Tensor = self.head(nn.functional.gelu(tokens.mean(1), approximate="tanh"))
        return logits


def stored(network: nn.Module, size: int = 16) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return store_program(original_graph(network.eval(), torch.zeros(2, 3, size, size)), size)


@pytest.fixture(scope="module")
def mixed() -> tuple[nn.Module, dict[str, Any], dict[str, Tensor]]:
    network = Mixed()
    return (network, *stored(network))


def reread(program: dict[str, Any], tensors: dict[str, Tensor]) -> fx.GraphModule:
    return read_program(json.dumps(program), tensors, "program.json")


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_stored_network_computes_what_its_module_computes(
    batch: int, mixed: tuple[nn.Module, dict[str, Any], dict[str, Tensor]]
) -> None:
    network, program, tensors = mixed
    images = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch)) * 3
    with torch.no_grad():
        # Eager attention in evaluation mode has a kernel of its own, which rounds in another order.
        torch.testing.assert_close(reread(program, tensors)(images), network(images), rtol=0, atol=1e-6)


def test_weights_keep_their_names_and_shared_ones_are_stored_once(
    mixed: tuple[nn.Module, dict[str, Any], dict[str, Tensor]],
) -> None:
    network, program, tensors = mixed
    own = network.state_dict()
    assert {"conv.weight", "norm.running_var", "twin.weight", "head.bias"} <= tensors.keys()
    assert all(torch.equal(tensors[name], own[name]) for name in tensors.keys() & own.keys())
    assert [name for name in tensors if name.startswith("twin")] == ["twin.weight", "twin.bias"]
    assert reread(program, tensors).state_dict().keys() == tensors.keys()


def test_a_copy_of_a_stored_network_keeps_the_shape_of_its_images(
    mixed: tuple[nn.Module, dict[str, Any], dict[str, Tensor]],
) -> None:
    _, program, tensors = mixed
    assert copy.deepcopy(reread(program, tensors)).meta["input_shape"] == (2, 3, 16, 16)


def calls(program: dict[str, Any]) -> list[dict[str, Any]]:
    return [node for node in program["nodes"] if "call" in node]


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "aten.from_file.default", "aten.add_.Tensor", "aten.rand_like.default", "aten.nothing.default",
        "prim.device.default", "operator.attrgetter", "aten.conv2d", "builtins.eval", "torch.load",
        "aten._print.default", "aten.__class__.mro",
    ],
)  # fmt: skip
def test_a_call_of_anything_but_a_pure_operator_is_refused(
    name: str, mixed: tuple[nn.Module, dict[str, Any], dict[str, Tensor]]
) -> None:
    _, program, tensors = mixed
    changed = copy.deepcopy(program)
    calls(changed)[0]["call"] = name
    with pytest.raises((CheckpointError, ReparamError)):
        reread(changed, tensors)


@pytest.mark.parametrize(
    "value",
    [
        {"node": "later"}, {"dtype": "nn"}, {"dtype": "__builtins__"}, {"device": "cuda"}, {"eval": "1"}, "a\nb",
        "x" * 300, {}, {"node": "x", "dtype": "float32"}, {"memory_format": "float32"},
    ],
)  # fmt: skip
def test_an_argument_that_is_no_plain_value_is_refused(
    value: Any, mixed: tuple[nn.Module, dict[str, Any], dict[str, Tensor]]
) -> None:
    _, program, tensors = mixed
    changed = copy.deepcopy(program)
    calls(changed)[0]["args"].append(value)
    with pytest.raises(CheckpointError):
        reread(changed, tensors)


def test_a_damaged_program_is_refused_in_one_sentence(
    mixed: tuple[nn.Module, dict[str, Any], dict[str, Tensor]],
) -> None:
    _, program, tensors = mixed
    text = json.dumps(program)
    for damaged in ("", text[:-200], "[]", "null", text.replace(program["schema"], "other/1"), "[" * 20_000):
        with pytest.raises(CheckpointError, match=r"program.json is not a stored program") as caught:
            read_program(damaged, tensors, "program.json")
        assert "\n" not in caught.value.message


def test_names_that_would_hide_something_else_are_refused(
    mixed: tuple[nn.Module, dict[str, Any], dict[str, Tensor]],
) -> None:
    _, program, tensors = mixed
    for path in ("forward", "../up", "state_dict.x", "conv", "a-b"):
        changed = copy.deepcopy(program)
        changed["weights"][path] = "parameter"
        with pytest.raises(CheckpointError):
            reread(changed, {**tensors, path: torch.zeros(1)})


def test_a_missing_and_an_unknown_weight_are_named(
    mixed: tuple[nn.Module, dict[str, Any], dict[str, Tensor]],
) -> None:
    _, program, tensors = mixed
    fewer = {name: value for name, value in tensors.items() if name != "head.bias"}
    with pytest.raises(CheckpointError, match=r"head\.bias"):
        reread(program, fewer)
    with pytest.raises(CheckpointError, match=r"another\.weight"):
        reread(program, {**tensors, "another.weight": torch.zeros(1)})

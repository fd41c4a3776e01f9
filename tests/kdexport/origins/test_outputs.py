"""One tensor of many is found by its name, at any depth, and a wrong name is answered with the right ones."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdexport.errors import ConfigError
from kdexport.origins.outputs import OneOutput, choose_output

LOGITS = torch.arange(10.0).reshape(2, 5)
OTHER = torch.zeros(2, 3, 4, 4)


@dataclass
class Answer:
    logits: Tensor
    features: Tensor


class Returns(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, images: Tensor) -> Any:
        return self.value


@pytest.mark.parametrize(
    ("value", "name", "path"),
    [
        (LOGITS, "", ()),
        ((LOGITS,), "", (0,)),
        ([[{"a": LOGITS}], 3, None], "", (0, 0, "a")),
        ((OTHER, LOGITS), "1", (1,)),
        (OrderedDict(out=LOGITS, aux=OTHER), "out", ("out",)),
        (Answer(LOGITS, OTHER), "logits", ("logits",)),
        ({"deep": (OTHER, Answer(LOGITS, OTHER))}, "deep.1.logits", ("deep", 1, "logits")),
        # A key with a dot in it is one key.
        ({"a.b": LOGITS, "a": {"c": OTHER}}, "a.b", ("a.b",)),
    ],
)
def test_the_named_output_is_the_one_that_is_returned(value: Any, name: str, path: tuple[str | int, ...]) -> None:
    found = choose_output(value, name, "net")
    assert found == path
    assert torch.equal(OneOutput(Returns(value), found)(OTHER), LOGITS)


@pytest.mark.parametrize(
    ("value", "name", "words"),
    [
        ((LOGITS, OTHER), "", ["2 tensors", "0 (2, 5)", "1 (2, 3, 4, 4)", "--output"]),
        ({"logits": LOGITS, "aux": OTHER}, "logit", ["no output 'logit'", "logits"]),
        ((LOGITS, OTHER), "2", ["no output '2'", "0, 1"]),
        (LOGITS, "logits", ["no output 'logits'"]),
        (None, "", ["0 tensors", "NoneType"]),
        ({}, "", ["0 tensors"]),
        # The class, not one of its values.
        (Answer, "", ["0 tensors"]),
    ],
)
def test_an_output_that_is_not_there_or_not_chosen_is_refused_with_the_names(
    value: Any, name: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        choose_output(value, name, "net")
    said = f"{refused.value.message} {refused.value.remedy}"
    assert not [word for word in words if word not in said], said

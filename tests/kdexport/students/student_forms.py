"""What the tests of every student share: its forms, image sizes for them, and a count of its operations."""

import pytest
import torch
from torch import Tensor, nn

from tests.kdexport.students.published_facts import FORMS

#: Height and width by form: odd, cheap, and large enough that every stage has more than one position.
ODD_SIZES = {32: (21, 17), 224: (65, 43)}

every_form = pytest.mark.parametrize(("name", "image_size"), FORMS)


def multiply_accumulates(net: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of all convolutions and linear layers, counted from their outputs for ``x``."""
    total = 0

    def count(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.Linear)
        total += output.numel() * module.weight[0].numel()

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        net(x)
    return total

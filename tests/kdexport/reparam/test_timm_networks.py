"""Networks of timm, if it is installed: what each loses, and that it computes the same."""

from typing import Any, cast

import pytest
import torch
from torch import nn

from kdexport.reparam.program import fuse_module
from tests.kdexport.hostile_values import noise, relative_difference

timm: Any = pytest.importorskip("timm", reason="timm is not installed; it is no dependency of kdexport")

#: Side of the input and the batch norms that remain.
NETWORKS: dict[str, tuple[int, int]] = {
    "convnext_atto": (64, 0),  # dropout in evaluation mode
    "levit_128s": (224, 0),  # linear layer, flattening, batch norm
    "mobileone_s0": (64, 0),  # parallel branches
    "resnet18d": (64, 0),
    "nf_resnet26": (64, 0),  # weight standardisation
}


def with_statistics(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            cast(Any, module.running_mean).copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return net


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_timm_is_merged_without_more_operations(name: str) -> None:
    side, norms = NETWORKS[name]
    torch.manual_seed(0)
    net = with_statistics(timm.create_model(name, pretrained=False, num_classes=7)).double().eval()
    fused = fuse_module(net, (noise(1, 3, side, side),))
    assert sum(count for key, count in fused.after.operators.items() if "batch_norm" in key) == norms
    assert sum(fused.after.operators.values()) < sum(fused.before.operators.values())
    assert fused.after.multiply_accumulates <= fused.before.multiply_accumulates
    x = noise(1, 3, side, side, seed=5)
    with torch.no_grad():
        assert relative_difference(fused.module(x), net(x)) < 1e-10

"""Small networks of other origins with random weights: attention, gates with Hardswish and SiLU, norms, resizing."""

import json
import sys
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn import functional

from kdexport.data.preprocessing import Preprocessing
from kdexport.graph.export import export_onnx
from kdexport.origins.stored_program import read_program, store_program
from kdexport.reparam.fold_student import fuse_student
from kdexport.reparam.program import original_graph

SIZE, CLASSES = 32, 6
PREPROCESSING = Preprocessing(image_size=SIZE, resize=SIZE, mean=(0.5, 0.4, 0.3), std=(0.3, 0.25, 0.35))


class Attention(nn.Module):
    """A block of a vision transformer with 3 heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.between, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        images, tokens, width = x.shape
        heads = self.qkv(self.before(x)).reshape(images, tokens, 3, 3, width // 3).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        x = x + self.out(mixed.transpose(1, 2).reshape(images, tokens, width))
        return cast(Tensor, x + self.down(functional.gelu(self.up(self.between(x)))))


class Transformer(nn.Module):
    """Patches of 8 pixels, a class token, positions, one block and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 8, 8)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, 24)), nn.Parameter(torch.zeros(1, 17, 24))
        self.block, self.norm, self.head = Attention(24), nn.LayerNorm(24), nn.Linear(24, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(images.shape[0], -1, -1), x], 1) + self.positions
        return cast(Tensor, self.head(self.norm(self.block(x))[:, 0]))


class TokenMean(nn.Module):
    """Linear layers on tokens, whose mean is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 16, 8, 8), nn.LayerNorm(16)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = x + self.down(functional.gelu(self.up(self.norm(x))))
        return cast(Tensor, self.head(x.mean(1)))


class Gated(nn.Module):
    """Hardswish, a depthwise convolution, squeeze and excitation, SiLU, batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.deep, self.deep_norm = nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.point, self.point_norm = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """(N,16,16,16) of (N,3,32,32)."""
        x = functional.hardswish(self.stem_norm(self.stem(images)))
        y = functional.hardswish(self.deep_norm(self.deep(x)))
        gate = functional.hardsigmoid(self.excite(functional.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return x + functional.silu(self.point_norm(self.point(y * gate)))

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.head(functional.adaptive_avg_pool2d(self.features(images), 1).flatten(1)))


class Resized(nn.Module):
    """Group norm, a batch norm that nothing absorbs, upsampling, concatenation and a kernel that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.groups, self.alone = nn.Conv2d(3, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.BatchNorm2d(16)
        self.shared, self.small = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, 2, 1)
        self.join, self.head = nn.Conv2d(32, 16, 1), nn.Linear(64, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(functional.gelu(self.groups(self.stem(images))))
        x = functional.relu(self.alone(functional.max_pool2d(x, 3, 1, 1)))
        y = functional.interpolate(functional.relu(self.small(x)), scale_factor=2, mode="nearest")
        x = functional.relu(self.join(torch.cat([self.shared(functional.relu(self.shared(x))), y], 1)))
        return cast(Tensor, self.head(functional.adaptive_avg_pool2d(x, 2).flatten(1)))


class Averaged(nn.Module):
    """Two convolutions and the mean over 256 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.first(images)), 2)
        return cast(Tensor, self.head(functional.relu(self.second(x)).mean((2, 3))))


def seeded(module: nn.Module, seed: int = 3) -> nn.Module:
    """``module`` in eval mode with weights that keep the size of activations, and statistics that are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        if value.dim() > 1 and name not in ("token", "positions"):
            fresh = noise * 1.4 / value[0].numel() ** 0.5
        elif name.endswith(("running_var", "weight")):
            fresh = 1 + noise.clamp(-2, 2) * 0.2
        else:
            fresh = noise * 0.2
        with torch.no_grad():
            value.copy_(fresh)
    return module.eval()


class GatedAttention(nn.Module):
    """Convolutions with batch norms, squeeze and excitation, then attention over 16 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.gated, self.reduce = Gated(), nn.Conv2d(16, 24, 4, 4)
        self.norm, self.block, self.head = nn.BatchNorm2d(24), Attention(24), nn.Linear(24, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.norm(self.reduce(self.gated.features(images))).flatten(2).transpose(1, 2)
        return cast(Tensor, self.head(self.block(tokens).mean(1)))


def gated_attention_network() -> nn.Module:
    """A trained network, as a factory returns it; what it prints is no result of a command."""
    sys.stdout.write("made\n")
    return seeded(GatedAttention())


def averaged_network() -> nn.Module:
    """The smallest one, as a factory returns it."""
    return seeded(Averaged())


def graph_of(module: nn.Module) -> fx.GraphModule:
    """The graph that a checkpoint of another origin holds."""
    program, weights = store_program(original_graph(seeded(module), torch.zeros(2, 3, SIZE, SIZE)), SIZE)
    return read_program(json.dumps(program), weights, "program.json")


def folded_file(module: nn.Module, path: Path) -> tuple[fx.GraphModule, nn.Module]:
    """The graph of ``module`` and its fold, which is exported to ``path``."""
    graph = graph_of(module)
    fused = fuse_student(graph).module
    export_onnx(fused, path, image_size=SIZE, opset=20, metadata={})
    return graph, fused


def pictures(count: int, seed: int) -> NDArray[np.uint8]:
    """Blocks of colour with noise, (N,S,S,3)."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(40, 216, (count, 8, 8, 3)).repeat(4, 1).repeat(4, 2)
    return (blocks + rng.integers(-30, 31, (count, SIZE, SIZE, 3))).astype(np.uint8)

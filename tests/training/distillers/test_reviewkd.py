"""Knowledge review, computed again in numpy from the text of the paper."""

from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from tests.training.distillers.numpy_layers import array, averaged, bridged, convolved, nearest, parameter
from tests.training.distillers.stage_networks import build, loss_of, random_outputs, shapes_of, small
from tests.training.small_distillation import settings_of
from training.distillers import DISTILLERS

Array = NDArray[np.float64]


@pytest.mark.parametrize(("student", "teacher"), [("mobilenetv2", "resnet8"), ("shufflenetv2", "vgg8")])
def test_reviewkd_is_a_chain_from_the_pooled_vector_to_the_shallow_stages(student: str, teacher: str) -> None:
    ours, theirs = small(student, teacher)
    distiller = build("reviewkd", ours, theirs, weight=6.0, max_channels=7)
    student_out, teacher_out = random_outputs(ours, theirs)
    levels = [(array(student_out.pooled)[:, :, None, None], array(teacher_out.pooled)[:, :, None, None])]
    for a, b in zip(reversed(ours.stages), reversed(theirs.stages), strict=False):
        levels.append((array(student_out.features[a.name]), array(teacher_out.preactivations[b.name])))
    assert len(cast(nn.ModuleList, distiller.get_submodule("links"))) == len(levels) == 4
    expected, mixture = 0.0, None
    for index, (feature, target) in enumerate(levels):
        own = bridged(feature, distiller, f"links.{index}.reduction")
        assert own.shape[1] == 7
        if mixture is not None:
            deeper = nearest(mixture, *own.shape[2:])
            weight, bias = (parameter(distiller, f"links.{index}.gates.0.{key}") for key in ("weight", "bias"))
            logits = convolved(np.concatenate([own, deeper], 1), weight) + bias.reshape(1, 2, 1, 1)
            gates = 1 / (1 + np.exp(-logits))
            own = own * gates[:, :1] + deeper * gates[:, 1:]
        mixture = nearest(own, *target.shape[2:])
        expected += context_loss(bridged(mixture, distiller, f"links.{index}.expansion"), target)
    assert not any(name.startswith("links.0.gates") for name, _ in distiller.named_parameters())
    assert loss_of(distiller, student_out, teacher_out) == pytest.approx(6 * expected, rel=1e-9)


def context_loss(prediction: Array, target: Array) -> float:
    terms, sides = [((prediction - target) ** 2).mean()], [side for side in (4, 2, 1) if side < target.shape[2]]
    terms += [((averaged(prediction, side, side) - averaged(target, side, side)) ** 2).mean() for side in sides]
    weights = [1.0, 0.5, 0.25, 0.125][: len(terms)]
    return float(sum(w * term for w, term in zip(weights, terms, strict=True)) / sum(weights))


def test_reviewkd_has_the_widths_that_are_published_for_its_pairs() -> None:
    published = {
        ("resnet32x4", "shufflenetv1"): (512, [960, 960, 480, 240], [256, 256, 128, 64]),
        ("wrn40_2", "shufflenetv1"): (512, [960, 960, 480, 240], [128, 128, 64, 32]),
        ("resnet32x4", "shufflenetv2"): (512, [1024, 464, 232, 116], [256, 256, 128, 64]),
        ("vgg13", "mobilenetv2"): (512, [1280, 160, 48, 16, 12], [512, 512, 512, 256, 128]),
        ("resnet50", "mobilenetv2"): (512, [1280, 160, 48, 16, 12], [2048, 2048, 1024, 512, 256]),
    }
    for (teacher, student), (middle, inputs, outputs) in published.items():
        with torch.device("meta"):
            distiller = DISTILLERS.build(
                "reviewkd",
                settings=settings_of("reviewkd"),
                student=shapes_of("student", student, 32),
                teacher=shapes_of("teacher", teacher, 32),
            )
        shapes = {name: tuple(p.shape) for name, p in distiller.named_parameters()}
        for index, (ours, theirs) in enumerate(zip(inputs, outputs, strict=True)):
            assert shapes[f"links.{index}.reduction.0.weight"] == (middle, ours, 1, 1)
            assert shapes[f"links.{index}.expansion.0.weight"] == (theirs, middle, 3, 3)
        assert f"links.{len(inputs)}.reduction.0.weight" not in shapes

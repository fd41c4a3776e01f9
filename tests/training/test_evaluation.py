import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdexport.errors import TrainingError
from training.evaluation import predict


class Fixed(nn.Module):
    """Returns its input, and only in evaluation mode."""

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        return images


def test_every_measure_is_what_its_definition_says() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 8, generator=generator) * 2
    labels = torch.randint(8, (200,), generator=generator)
    network = Fixed().train()
    found = predict(network, [(logits[:130], labels[:130]), (logits[130:], labels[130:])])
    assert network.training
    order = logits.argsort(1, descending=True)
    assert found.top1 == float((order[:, 0] == labels).double().mean())
    assert found.top5 == pytest.approx(float((order[:, :5] == labels[:, None]).any(1).double().mean()))
    # The calibration error, bin by bin.
    confidence, right = logits.softmax(1).max(1).values.double().numpy(), (order[:, 0] == labels).numpy()
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert found.calibration_error() == pytest.approx(error, abs=1e-6)
    confusion = np.zeros((8, 8), np.int64)
    for label, predicted in zip(labels.tolist(), order[:, 0].tolist(), strict=True):
        confusion[label, predicted] += 1
    assert np.array_equal(found.confusion(8), confusion)


def test_a_report_names_classes_their_recall_and_what_they_are_taken_for() -> None:
    one = torch.eye(3)
    logits, labels = one[[0, 0, 1, 1, 1, 2]], torch.tensor([0, 0, 0, 1, 1, 1])
    report = predict(Fixed(), [(logits, labels)]).report(["ant", "bee", "cow"])
    assert report["per_class"] == {"ant": pytest.approx(2 / 3), "bee": pytest.approx(2 / 3), "cow": None}
    assert report["confused_most"] == [["ant", "bee", 1], ["bee", "cow", 1]]
    assert report["confusion"] == [[2, 1, 0], [0, 2, 1], [0, 0, 0]]
    assert (report["images"], report["top1"], report["top5"]) == (6, pytest.approx(2 / 3), 1.0)


def test_a_network_that_is_certain_has_a_confidence_in_the_last_bin() -> None:
    logits = torch.tensor([[1e4, 0.0], [0.0, 1e4]])
    found = predict(Fixed(), [(logits, torch.tensor([0, 0]))])
    assert found.calibration_error() == pytest.approx(0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_end_the_evaluation_with_their_number(value: float) -> None:
    logits = torch.tensor([[0.0, 1.0], [value, 0.0], [1.0, 0.0]])
    with pytest.raises(TrainingError, match="not finite for 1 of 3 images"):
        predict(Fixed(), [(logits, torch.tensor([0, 1, 0]))])

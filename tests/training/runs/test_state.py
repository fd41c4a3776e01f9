from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from kdexport.errors import CheckpointError
from training.data import Batch
from training.distillers.distiller import StepContext
from training.recipe import TrainSettings
from training.runs.loop import Run, run
from training.runs.state import Resumed, load_state, save_state
from training.runs.task import StepResult


def scaler() -> torch.amp.GradScaler:
    # So high that the first steps overflow; it grows so fast that later steps overflow again.
    return torch.amp.GradScaler("cpu", init_scale=2.0**124, growth_interval=3)


def test_the_scale_of_low_precision_losses_survives_the_disk(tmp_path: Path) -> None:
    task = nn.Linear(3, 2)
    optimizer, used = torch.optim.SGD(task.parameters(), lr=0.1), scaler()
    for size in (1.0, 1e30):
        optimizer.zero_grad()
        used.scale(task(torch.full((1, 3), size)).sum()).backward()
        used.step(optimizer)
        used.update()
    state = used.state_dict()
    assert state["scale"] != 2.0**124
    save_state(tmp_path, task, optimizer, Resumed(epoch=1, history=({"top1": 0.5},)), {"scaler": state})
    resumed, extra = load_state(tmp_path, task, optimizer)
    assert resumed == Resumed(epoch=1, history=({"top1": 0.5},))
    fresh = scaler()
    fresh.load_state_dict(extra["scaler"])
    assert fresh.state_dict() == state


@pytest.mark.parametrize("damage", ["truncated", "text", "no history"])
def test_a_damaged_state_is_named_with_what_to_do(damage: str, tmp_path: Path) -> None:
    task = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    save_state(tmp_path, task, optimizer, Resumed(epoch=1, history=({"top1": 0.5},)), {})
    path = tmp_path / "resume.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "text":
        path.write_bytes(b"\xff not a state")
    else:
        save_file({"task.weight": torch.zeros(2, 3)}, path, {"epoch": "1"})
    with pytest.raises(CheckpointError, match="truncated or damaged") as caught:
        load_state(tmp_path, task, optimizer)
    assert str(path) in caught.value.message
    assert "remove" in caught.value.remedy


class Points:
    steps = 4

    def epoch(self, index: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(index)
        for _ in range(self.steps):
            points = torch.randn(6, 3, generator=generator)
            yield Batch(points, (points.sum(1) > 0).long(), torch.arange(6))


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.network = nn.Linear(3, 2)

    def forward(self, points: Tensor, _teacher: None, step: StepContext) -> StepResult:
        logits = self.network(points)
        return StepResult({"cross_entropy": nn.functional.cross_entropy(logits, step.labels)}, logits)


def trained(directory: Path, epochs: int) -> tuple[Tensor, dict[str, float]]:
    """The weight and the state of the scaler after a run on the CPU that scales its loss as fp16 does on a GPU."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler()
    task = Linear()
    job = Run(
        directory=directory,
        title="scaled",
        settings=TrainSettings(epochs=epochs, batch_size=6, learning_rate=0.2, mixed_precision="no"),
        branches=(0, 1),
        task=task,
        network=task.network,
        batches=Points(),
        evaluation=[(torch.eye(3), torch.tensor([0, 1, 0]))],
        teach=lambda _: None,
    )
    run(job, accelerator)
    return task.network.weight.detach(), accelerator.scaler.state_dict()


def test_a_resumed_run_scales_its_losses_as_an_uninterrupted_one(tmp_path: Path) -> None:
    weight, state = trained(tmp_path / "whole", 3)
    assert state["scale"] not in (2.0**124, 0.0)
    for epochs in (1, 2, 3):
        parted, kept = trained(tmp_path / "parted", epochs)
    assert kept == state
    assert torch.equal(parted, weight)

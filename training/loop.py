"""The loop: epochs of steps, a metric line for each, a state on disk after each."""

import json
import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdexport.errors import TrainingError
from kdexport.students import Tapped
from training.data import Batches, Labelled, epoch_generator
from training.distillers.distiller import StepContext
from training.progress import EpochProgress
from training.recipe import TrainSettings
from training.state import Resumed, load_state, save_state

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Metrics = dict[str, float]
#: The frozen teacher on the student's images; None where nothing is distilled.
Teach = Callable[[Tensor], Tapped | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one run needs: where it writes, what it is called, what it trains and how it is measured."""

    directory: Path
    title: str
    settings: TrainSettings
    #: Branched layers, and the branches of each.
    branches: tuple[int, int]
    task: nn.Module
    network: nn.Module
    batches: Batches
    evaluation: Iterable[Labelled]
    teach: Teach


def learning_rate(settings: TrainSettings, epoch: float) -> float:
    """The rate at a fractional epoch: linear warm-up, then steps of 0.1 or a half cosine to zero."""
    if epoch < settings.warmup_epochs:
        return settings.learning_rate * (epoch + 1e-3) / settings.warmup_epochs
    if settings.schedule == "step":
        return settings.learning_rate * 0.1 ** sum(epoch >= milestone for milestone in settings.milestones)
    span = max(settings.epochs - settings.warmup_epochs, 1e-9)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (epoch - settings.warmup_epochs) / span))


@torch.no_grad()
def top1(network: nn.Module, batches: Iterable[Labelled]) -> float:
    """Share of images whose largest logit is their label, in evaluation mode; the mode is put back."""
    was_training = network.training
    network.eval()
    correct, total = 0, 0
    for images, labels in batches:
        correct += int((network(images).argmax(1) == labels).sum())
        total += len(labels)
    network.train(was_training)
    return correct / total


def run(job: Run, accelerator: Accelerator) -> tuple[Metrics, ...]:
    """Train ``job.network`` to the end, continuing from the state in its directory; returns a metric line per epoch.

    Raises ``TrainingError`` where a loss or a weight is no longer finite; the state before that epoch is kept.
    """
    settings = job.settings
    job.directory.mkdir(parents=True, exist_ok=True)
    parameters = [p for p in job.task.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        parameters,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
    )
    resumed, extra = load_state(job.directory, job.task, optimizer)
    if accelerator.scaler is not None and "scaler" in extra:
        accelerator.scaler.load_state_dict(extra["scaler"])
    task, prepared = accelerator.prepare(job.task, optimizer)
    history = list(resumed.history)
    progress = EpochProgress(
        job.title,
        steps_per_epoch=job.batches.steps,
        epochs=settings.epochs,
        done_epochs=resumed.epoch,
        quiet=not accelerator.is_main_process,
    )
    with progress, _scalars(job.directory, resumed.epoch, accelerator) as writer:
        for epoch in range(resumed.epoch, settings.epochs):
            metrics = _epoch(job, accelerator, task, prepared, epoch, progress)
            history.append(metrics)
            if writer is not None:
                # Before the state: a kill between the two repeats the epoch and writes its line again.
                _log(job.directory, history, writer)
                extra = {} if accelerator.scaler is None else {"scaler": accelerator.scaler.state_dict()}
                save_state(job.directory, job.task, optimizer, Resumed(epoch=epoch + 1, history=tuple(history)), extra)
                progress.epoch_done(epoch + 1, metrics)
    return tuple(history)


def _epoch(
    job: Run,
    accelerator: Accelerator,
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    progress: EpochProgress,
) -> Metrics:
    settings, steps = job.settings, job.batches.steps
    # Dropout draws from the global generator: seeded per epoch, a resumed run draws the same.
    torch.manual_seed(settings.seed * 1_000_003 + epoch)
    drawn = torch.rand(steps, *job.branches, generator=epoch_generator(settings.seed + 1, epoch))
    orders = drawn.argsort(2).to(accelerator.device)
    positions = (epoch + torch.arange(steps, dtype=torch.float64) / steps).float().to(accelerator.device)
    sums: dict[str, Tensor] = {}
    started = time.monotonic()
    task.train()
    for step, batch in enumerate(job.batches.epoch(epoch)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, epoch + step / steps)
        context = StepContext(epoch=positions[step], orders=orders[step], labels=batch.labels, samples=batch.samples)
        with accelerator.autocast():
            losses = task(batch.images, job.teach(batch.images), context).losses
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(torch.stack(list(losses.values())).sum())
        optimizer.step()
        for name, value in losses.items():
            sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach()
        progress.step()
    seconds = time.monotonic() - started
    means = {f"loss/{name}": accelerator.reduce(total / steps, "mean").item() for name, total in sums.items()}
    _check_finite(means, job.task, epoch)
    accuracy = top1(job.network, job.evaluation)
    speed = steps * settings.batch_size / seconds
    return {**means, "lr": learning_rate(settings, epoch), "top1": accuracy, "images_per_s": speed}


def _check_finite(means: Metrics, task: nn.Module, epoch: int) -> None:
    bad = [name for name, value in means.items() if not math.isfinite(value)]
    # The last step may leave weights that no loss of this epoch has seen.
    floating = ((name, value) for name, value in task.state_dict().items() if value.is_floating_point())
    bad += [name for name, value in floating if not value.isfinite().all()]
    if bad:
        raise TrainingError(
            f"{bad[0]} is not finite in epoch {epoch + 1}: the run diverged.",
            remedy="Lower train.learning_rate, raise train.warmup_epochs, or lower distiller.weight.",
        )


def _scalars(directory: Path, done: int, accelerator: Accelerator) -> AbstractContextManager["SummaryWriter | None"]:
    from torch.utils.tensorboard import SummaryWriter

    # One file for all epochs: files that begin in one second are read in the order of their names, not of their age.
    return (
        SummaryWriter(str(directory / "tensorboard"), purge_step=done + 1)
        if accelerator.is_main_process
        else nullcontext()
    )


def _log(directory: Path, history: list[Metrics], writer: "SummaryWriter") -> None:
    lines = "".join(json.dumps({"epoch": i + 1, **metrics}) + "\n" for i, metrics in enumerate(history))
    (directory / "metrics.jsonl").write_text(lines)
    for name, value in history[-1].items():
        writer.add_scalar(name, value, len(history))
    writer.flush()

"""The training loop: after each epoch it writes the metrics and the state from which the run can continue."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdexport.core.files import remove_partials
from kdexport.errors import TrainingError
from kdexport.students import Tapped
from training.data import Batches, Labelled, epoch_generator
from training.devices import compiled
from training.distillers.distiller import StepContext
from training.recipe import TrainSettings
from training.runs.journal import Journal
from training.runs.progress import EpochProgress
from training.runs.state import Resumed, load_state, save_state
from training.runs.watch import REMEDY, LossWatch

Metrics = dict[str, float]
#: The frozen teacher's outputs for the student's images; None if nothing is distilled.
Teach = Callable[[Tensor], Tapped | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The parts of one run: its folder and title, what it trains and how it is evaluated."""

    directory: Path
    title: str
    settings: TrainSettings
    #: The number of branched layers, and of branches in each.
    branches: tuple[int, int]
    task: nn.Module
    network: nn.Module
    batches: Batches
    evaluation: Iterable[Labelled]
    teach: Teach
    #: Measures of how the branches differ after an epoch, by name; None without branches.
    diversity: Callable[[], Metrics] | None = None
    #: Saves the network after an epoch with the highest top-1 so far, given the metrics of that epoch.
    keep_best: Callable[[Metrics], None] | None = None
    teacher_top1: float | None = None
    #: Whether plots are drawn.
    draws: bool = True


def learning_rate(settings: TrainSettings, epoch: float) -> float:
    """The rate at a fractional epoch: a linear warm-up, then steps by a factor of 0.1, or a half cosine to 0."""
    if epoch < settings.warmup_epochs:
        return settings.learning_rate * (epoch + 1e-3) / settings.warmup_epochs
    if settings.schedule == "step":
        return settings.learning_rate * 0.1 ** sum(epoch >= milestone for milestone in settings.milestones)
    span = max(settings.epochs - settings.warmup_epochs, 1e-9)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (epoch - settings.warmup_epochs) / span))


def sgd(task: nn.Module, settings: TrainSettings) -> torch.optim.SGD:
    """The optimiser of all trainable parameters of ``task``."""
    return torch.optim.SGD(
        [p for p in task.parameters() if p.requires_grad],
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
        # One pass over all weights; with a gradient scaler it does not wait for the device to find infinite gradients.
        fused=True,
    )


@torch.no_grad()
def top1(network: nn.Module, batches: Iterable[Labelled]) -> float:
    """The fraction of images whose largest logit is their label, in evaluation mode; restores the mode."""
    was_training = network.training
    network.eval()
    correct, total = torch.zeros((), dtype=torch.int64), 0
    for images, labels in batches:
        correct = correct.to(labels.device) + (network(images).argmax(1) == labels).sum()
        total += len(labels)
    network.train(was_training)
    return correct.item() / total


def run(job: Run, accelerator: Accelerator) -> tuple[Metrics, ...]:
    """Train ``job.network`` to its last epoch, from the state in its folder if there is one; returns metrics per epoch.

    Raises ``TrainingError`` if a loss explodes, or a loss or a weight is not finite; the state before that epoch stays.
    """
    settings = job.settings
    job.directory.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        remove_partials(job.directory)
    optimizer = sgd(job.task, settings)
    resumed, extra = load_state(job.directory, job.task, optimizer)
    if accelerator.scaler is not None and "scaler" in extra:
        accelerator.scaler.load_state_dict(extra["scaler"])
    task, prepared = accelerator.prepare(job.task, optimizer)
    task = compiled(task, settings.compile, accelerator.device)
    history, diversity = list(resumed.history), list(extra.get("diversity", []))
    progress = EpochProgress(
        job.title,
        steps_per_epoch=job.batches.steps,
        epochs=settings.epochs,
        done_epochs=resumed.epoch,
        batch_size=settings.batch_size,
        quiet=not accelerator.is_main_process,
    )
    with progress, _journal(job, resumed.epoch, accelerator, progress) as journal:
        for epoch in range(resumed.epoch, settings.epochs):
            metrics = train_epoch(job, accelerator, task, prepared, epoch, progress, history)
            history.append(metrics)
            if journal is None:
                continue
            if job.diversity is not None:
                diversity.append({"epoch": epoch + 1, **job.diversity()})
            if job.keep_best is not None and metrics["top1"] > max((e["top1"] for e in history[:-1]), default=-1.0):
                job.keep_best(metrics)
            # Everything before the state: a run that is killed in between repeats the epoch and writes the same files.
            journal.write(history, diversity, last=epoch + 1 == settings.epochs)
            extra = {"diversity": diversity} if diversity else {}
            if accelerator.scaler is not None:
                extra["scaler"] = accelerator.scaler.state_dict()
            save_state(job.directory, job.task, optimizer, Resumed(epoch=epoch + 1, history=tuple(history)), extra)
            progress.epoch_done(epoch + 1, metrics)
    return tuple(history)


def train_epoch(
    job: Run,
    accelerator: Accelerator,
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    progress: EpochProgress,
    history: Sequence[Metrics],
) -> Metrics:
    """Run the steps of one epoch (from 0) and evaluate; ``history`` has the metrics of the epochs before it."""
    settings, steps = job.settings, job.batches.steps
    # Dropout draws from the global generator; one seed for each epoch lets a resumed run draw the same numbers.
    torch.manual_seed(settings.seed * 1_000_003 + epoch)
    drawn = torch.rand(steps, *job.branches, generator=epoch_generator(settings.seed + 1, epoch))
    orders = drawn.argsort(2).to(accelerator.device)
    positions = (epoch + torch.arange(steps, dtype=torch.float64) / steps).float().to(accelerator.device)
    watch = LossWatch(epoch, max(map(_total, history), default=None), progress.window)
    progress.epoch_begins(epoch + 1)
    started = time.monotonic()
    task.train()
    for step, batch in enumerate(job.batches.epoch(epoch)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, epoch + step / steps)
        context = StepContext(epoch=positions[step], orders=orders[step], labels=batch.labels, samples=batch.samples)
        with accelerator.autocast():
            losses = task(batch.images, job.teach(batch.images), context).losses
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(watch.add(losses))
        optimizer.step()
        progress.step()
    names, sums = watch.means()
    reduced = accelerator.reduce(sums, "mean").tolist()
    seconds = time.monotonic() - started
    means = {f"loss/{name}": value for name, value in zip(names, reduced, strict=True)}
    _check_finite(means, job.task, epoch)
    accuracy = top1(job.network, job.evaluation)
    speed = steps * settings.batch_size / seconds
    return {**means, "lr": learning_rate(settings, epoch), "top1": accuracy, "images_per_s": speed}


def _total(metrics: Metrics) -> float:
    return sum(abs(value) for name, value in metrics.items() if name.startswith("loss/"))


def _check_finite(means: Metrics, task: nn.Module, epoch: int) -> None:
    bad = [name for name, value in means.items() if not math.isfinite(value)]
    # The weights of the last step enter no loss of this epoch.
    floating = [(name, value) for name, value in task.state_dict().items() if value.is_floating_point()]
    finite = torch.stack([value.isfinite().all() for _, value in floating]).tolist()
    bad += [name for (name, _), holds in zip(floating, finite, strict=True) if not holds]
    if bad:
        raise TrainingError(f"{bad[0]} is not finite in epoch {epoch + 1}: the run diverged.", remedy=REMEDY)


def _journal(job: Run, done: int, accelerator: Accelerator, progress: EpochProgress) -> "Journal | nullcontext[None]":
    if not accelerator.is_main_process:
        return nullcontext()
    return Journal(
        job.directory, job.title, done=done, draws=job.draws, teacher_top1=job.teacher_top1, say=progress.say
    )

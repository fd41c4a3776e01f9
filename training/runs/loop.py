"""The training loop: after each epoch it writes the metrics and the state from which the run can continue."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdexport.core.files import remove_partials, write_text
from kdexport.core.progress import Reporter
from kdexport.errors import TrainingError
from training.data import Batch, Batches, Labelled, ResidentBatches
from training.devices import compiled
from training.distillers.distiller import StepContext
from training.evaluation import Predictions, predict
from training.recipe import TrainSettings
from training.runs.averaging import WeightAverage
from training.runs.captured import MOST_STEPS, CapturedSteps, obstacle, require_capture
from training.runs.find_lr import FoundRate, find_rate
from training.runs.journal import Journal
from training.runs.optimiser import learning_rate, optimiser
from training.runs.progress import EpochProgress
from training.runs.state import Resumed, load_state, save_state
from training.runs.step import EpochPlan, OptimisationStep, Teach, epoch_plan
from training.runs.trackers import Trackers
from training.runs.turns import Shared
from training.runs.watch import REMEDY, LossWatch

Metrics = dict[str, float]


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
    #: Mixes the images of a step: images and parts of classes from images, labels, epoch and step.
    mix: Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor | None]] | None = None
    #: The running mean of the weights that is evaluated in place of ``network``.
    average: WeightAverage | None = None
    #: Training images that are left out of the training, on which the best epoch is chosen.
    validation: Iterable[Labelled] | None = None
    #: The names of the classes, for evaluation.json; without them it is not written.
    classes: tuple[str, ...] = ()
    #: What of the run is not of this project, for example "the student timm:resnet18"; empty if nothing is.
    foreign: str = ""
    #: What trackers get as the configuration of the run.
    described: dict[str, Any] = field(default_factory=dict)
    #: Set if other runs of this process take turns with this one.
    shared: Shared | None = None

    @property
    def label(self) -> str:
        """What the run is called in lines of progress."""
        return self.title if self.shared is None else self.shared.name

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and handed over."""
        return self.network if self.average is None else self.average.network


def top1(network: nn.Module, batches: Iterable[Labelled]) -> float:
    """The fraction of images whose largest logit is their label, in evaluation mode; restores the mode."""
    return predict(network, batches).top1


def run(job: Run, accelerator: Accelerator) -> tuple[Metrics, ...]:
    """Train ``job.network`` to its last epoch, from the state in its folder if there is one; returns metrics per epoch.

    Raises ``TrainingError`` if a loss explodes, or a loss or a weight is not finite; the state before that epoch stays.
    """
    settings = job.settings
    job.directory.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        remove_partials(job.directory)
    made = optimiser(job.task, settings)
    average = job.average
    resumed, extra = load_state(job.directory, job.task, made, None if average is None else average.network)
    if accelerator.scaler is not None and "scaler" in extra:
        accelerator.scaler.load_state_dict(extra["scaler"])
    settings = _with_found_rate(job, accelerator, extra)
    job = replace(job, settings=settings)
    task, prepared = accelerator.prepare(job.task, made)
    task = compiled(task, settings.compile, accelerator.device)
    step = OptimisationStep(task, job.teach, prepared, accelerator, clip_norm=settings.clip_norm)
    history, diversity = list(resumed.history), list(extra.get("diversity", []))
    progress = EpochProgress(
        job.label,
        steps_per_epoch=job.batches.steps,
        epochs=settings.epochs,
        done_epochs=resumed.epoch,
        batch_size=settings.batch_size,
        quiet=not accelerator.is_main_process,
        lines=job.shared is not None,
    )
    with progress, _journal(job, resumed.epoch, accelerator, progress) as journal:
        captured = captured_steps(job, accelerator, step, resumed.epoch, progress)
        for epoch in range(resumed.epoch, settings.epochs):
            if out_of_patience(history, settings.patience):
                progress.say(f"{job.label}: no better epoch in the last {settings.patience}, the run ends early")
                break
            metrics, found = train_epoch(job, accelerator, step, epoch, progress, history, captured)
            history.append(metrics)
            if journal is None:
                continue
            if job.diversity is not None:
                diversity.append({"epoch": epoch + 1, **job.diversity()})
            if job.keep_best is not None and _chosen_by(metrics) > max(map(_chosen_by, history[:-1]), default=-1.0):
                job.keep_best(metrics)
            # Everything before the state: a run that is killed in between repeats the epoch and writes the same files.
            report = found.report(job.classes) if job.classes else None
            last = epoch + 1 == settings.epochs or out_of_patience(history, settings.patience)
            journal.write(history, diversity, last=last, report=report)
            kept = {"learning_rate": settings.learning_rate} if settings.find_lr else {}
            extra = kept | ({"diversity": diversity} if diversity else {})
            if accelerator.scaler is not None:
                extra["scaler"] = accelerator.scaler.state_dict()
            done = Resumed(epoch=epoch + 1, history=tuple(history))
            save_state(job.directory, job.task, made, done, extra, None if average is None else average.network)
            progress.epoch_done(epoch + 1, metrics)
    return tuple(history)


def _chosen_by(metrics: Metrics) -> float:
    """The top-1 by which epochs are compared: on the validation images if there are any."""
    return metrics.get("validation_top1", metrics["top1"])


def best_epoch(history: Sequence[Metrics]) -> Metrics:
    """The metrics of the first epoch with the highest top-1 on the validation images, or else on the test split."""
    return max(history, key=_chosen_by)


def out_of_patience(history: Sequence[Metrics], patience: int) -> bool:
    """Whether none of the last ``patience`` epochs is better on the validation images than one before; 0 is never."""
    if patience == 0 or not history:
        return False
    values = [_chosen_by(metrics) for metrics in history]
    return len(values) - 1 - values.index(max(values)) >= patience


def _with_found_rate(job: Run, accelerator: Accelerator, extra: dict[str, Any]) -> TrainSettings:
    """The settings with the learning rate of the range test, which a run that continues has in its state."""
    settings = job.settings
    if not settings.find_lr:
        return settings
    if "learning_rate" in extra:
        return settings.model_copy(update={"learning_rate": float(extra["learning_rate"])})
    found = _range_test(job, accelerator)
    if accelerator.is_main_process:
        lines = [{"learning_rate": rate, "loss": loss} for rate, loss in zip(found.rates, found.losses, strict=True)]
        write_text(job.directory / "find_lr.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        Reporter().say(f"{job.title}: learning rate {found.rate:.3g}, by the range test in find_lr.jsonl")
    return settings.model_copy(update={"learning_rate": found.rate})


def _range_test(job: Run, accelerator: Accelerator) -> FoundRate:
    """Train with growing rates on the first batches, and put weights and statistics back."""
    before = {name: value.clone() for name, value in job.task.state_dict().items()}
    made = optimiser(job.task, job.settings)
    batches = _endless(job.batches)
    job.task.train()
    torch.manual_seed(job.settings.seed)
    # With the full weight of the method, as after its ramp.
    end = torch.tensor(float(job.settings.epochs), device=accelerator.device)
    orders = torch.arange(job.branches[1], device=accelerator.device).expand(job.branches)

    def step(rate: float) -> float:
        batch = next(batches)
        for group in made.param_groups:
            group["lr"] = rate
        context = StepContext(epoch=end, orders=orders, labels=batch.labels, samples=batch.samples)
        losses: dict[str, Tensor] = job.task(batch.images, job.teach(batch.images), context).losses
        loss = torch.stack([value.float() for value in losses.values()]).sum()
        made.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter in job.task.parameters():
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
        made.step()
        return float(accelerator.reduce(loss.detach(), "mean").item())

    found = find_rate(step)
    job.task.load_state_dict(before)
    job.task.zero_grad(set_to_none=True)
    return found


def _endless(batches: Batches) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from batches.epoch(epoch)
        epoch += 1


def captured_steps(
    job: Run, accelerator: Accelerator, step: OptimisationStep, epoch: int, progress: EpochProgress
) -> CapturedSteps | None:
    """The steps as a CUDA graph; None, and a line on a GPU that says why, if they are started one by one."""
    settings, device = job.settings, accelerator.device
    reason = obstacle(settings, job.batches, accelerator, mixes=job.mix is not None, foreign=job.foreign)
    require_capture(settings, reason)
    if reason:
        if device.type == "cuda" and settings.capture != "no":
            progress.say(f"{job.label}: its steps are not captured as a CUDA graph, because {reason}")
        return None
    assert isinstance(job.batches, ResidentBatches)
    # Another teacher may draw random numbers, which come before those of its step then, or compare images.
    most = 1 if job.foreign else MOST_STEPS
    captured = CapturedSteps(step, job.task, job.batches, device, settings.batch_size, most)
    plan = epoch_plan(settings, epoch, steps=job.batches.steps, branches=job.branches, device=device)
    captured.prepare(plan, job.batches.draws(epoch), settings.seed)
    return captured


def train_epoch(
    job: Run,
    accelerator: Accelerator,
    step: OptimisationStep,
    epoch: int,
    progress: EpochProgress,
    history: Sequence[Metrics],
    captured: CapturedSteps | None = None,
) -> tuple[Metrics, Predictions]:
    """Run the steps of one epoch (from 0) and evaluate; ``history`` has the metrics of the epochs before it."""
    settings, steps = job.settings, job.batches.steps
    # Dropout draws from the global generator; one seed for each epoch lets a resumed run draw the same numbers.
    torch.manual_seed(settings.seed * 1_000_003 + epoch)
    plan = epoch_plan(settings, epoch, steps=steps, branches=job.branches, device=accelerator.device)
    step.clear()
    watch = LossWatch(epoch, max(map(_total, history), default=None), progress.window, step.sums)
    progress.epoch_begins(epoch + 1)
    started = time.monotonic()
    step.task.train()
    begun = _steps(job, step, epoch, plan) if captured is None else _replays(job, captured, epoch, plan)
    for count in begun:
        watch.steps_done(count)
        progress.steps(count)
        if job.shared is not None:
            job.shared.give_way()
    names, sums = watch.means()
    reduced = accelerator.reduce(sums, "mean").tolist()
    seconds = time.monotonic() - started
    means = {f"loss/{name}": value for name, value in zip(names, reduced, strict=True)}
    _check_finite(means, job.task, epoch)
    found = predict(job.evaluated, job.evaluation)
    images_seen = steps * settings.batch_size
    metrics = {
        **means,
        "lr": learning_rate(settings, epoch),
        **found.scalars(),
        "train_top1": int(accelerator.reduce(step.right, "sum").item()) / images_seen,
        "images_per_s": images_seen / seconds,
    }
    if job.validation is not None:
        metrics["validation_top1"] = predict(job.evaluated, job.validation).top1
    return metrics, found


def _steps(job: Run, step: OptimisationStep, epoch: int, plan: EpochPlan) -> Iterator[int]:
    """Start the steps of ``epoch`` from Python; yields the number that was started, which is 1."""
    device = step.right.device
    orders, positions, rates = plan.orders.to(device), plan.positions.to(device), plan.rates.tolist()
    for index, batch in enumerate(job.batches.epoch(epoch)):
        for group in step.optimizer.param_groups:
            group["lr"] = rates[index]
        # Both networks see the mixed image.
        images, targets = (batch.images, None) if job.mix is None else job.mix(batch.images, batch.labels, epoch, index)
        context = StepContext(
            epoch=positions[index], orders=orders[index], labels=batch.labels, samples=batch.samples, targets=targets
        )
        step(images, context)
        if job.average is not None:
            job.average.update(epoch * job.batches.steps + index + 1)
        yield 1


def _replays(job: Run, captured: CapturedSteps, epoch: int, plan: EpochPlan) -> Iterator[int]:
    """Start the steps of ``epoch``, several by one call; yields how many it started."""
    assert isinstance(job.batches, ResidentBatches)
    captured.begin(plan, job.batches.draws(epoch))
    with captured.counting_later(job.batches.steps):
        while captured.left:
            yield captured()


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
        job.directory,
        job.title,
        done=done,
        draws=job.draws,
        teacher_top1=job.teacher_top1,
        say=progress.say,
        trackers=Trackers(job.settings.trackers, job.title.replace(" ", "-"), job.described),
        described=job.described,
    )

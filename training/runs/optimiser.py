"""The optimiser of a run, and its learning rate at a time of the schedule."""

import math

import torch
from torch import nn

from training.recipe import TrainSettings


def learning_rate(settings: TrainSettings, epoch: float) -> float:
    """The rate at a fractional epoch: a linear warm-up, then steps by a factor of 0.1, or a half cosine to 0."""
    if epoch < settings.warmup_epochs:
        return settings.learning_rate * (epoch + 1e-3) / settings.warmup_epochs
    if settings.schedule == "step":
        return settings.learning_rate * 0.1 ** sum(epoch >= milestone for milestone in settings.milestones)
    span = max(settings.epochs - settings.warmup_epochs, 1e-9)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (epoch - settings.warmup_epochs) / span))


def optimiser(task: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimiser of all trainable parameters of ``task``: SGD, or AdamW (Loshchilov & Hutter, 2019).

    Both make one pass over all weights; with a gradient scaler they do not wait for the device to find infinite
    gradients.
    """
    parameters = [p for p in task.parameters() if p.requires_grad]
    on_gpu = any(parameter.is_cuda for parameter in parameters)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
            # Its steps may be captured as a CUDA graph.
            capturable=on_gpu,
        )
    return torch.optim.SGD(
        parameters,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
        fused=True,
    )

"""The steps that a GPU gets as one graph, run without a graph: they must be the loop, to the last bit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdexport.data.datasets import ImageSet
from kdexport.errors import BackendUnavailableError
from kdexport.students import Tapped
from tests.training.small_distillation import CLASSES, IMAGES, SIZE, assemble, labels_of_all
from training.data import Batches, ResidentBatches, StreamedBatches
from training.distillers import DISTILLERS
from training.recipe import DataSettings, TrainSettings
from training.runs import captured as module
from training.runs import loop
from training.runs.captured import MOST_STEPS, CapturedSteps, obstacle, require_capture
from training.runs.loop import Metrics, Run, _replays, captured_steps, train_epoch
from training.runs.optimiser import optimiser
from training.runs.progress import EpochProgress
from training.runs.state import Resumed, load_state, save_state
from training.runs.step import OptimisationStep, Teach, epoch_plan
from training.train import make_accelerator

#: Epochs of 5 steps, of which 3 are made at once, and then the 2 that are left.
CPU, BATCH, MOST, EPOCHS = torch.device("cpu"), 8, 3, 2
DATA = DataSettings(name="digits", image_size=SIZE, crop_padding=2, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))


def settings(**changes: Any) -> TrainSettings:
    base: dict[str, Any] = {"epochs": EPOCHS, "batch_size": BATCH, "mixed_precision": "no", "learning_rate": 1e-3}
    return TrainSettings.model_validate({**base, "milestones": (1,), "warmup_epochs": 0.7, "compile": "no", **changes})


def images() -> ImageSet:
    pixels = np.random.default_rng(2).integers(0, 256, (IMAGES, SIZE, SIZE, 3), dtype=np.uint8)
    return ImageSet(classes=tuple("abcde"[:CLASSES]), labels=labels_of_all().numpy(), pixels=pixels, files=())


def batches(chosen: TrainSettings, data: DataSettings = DATA) -> ResidentBatches:
    balanced = chosen.sampling == "balanced"
    return ResidentBatches(images(), data, batch_size=BATCH, seed=chosen.seed, device=CPU, balanced=balanced)


def in_batches(teach: Teach) -> Teach:
    """A teacher that reads a batch at a time: for more images its kernels might add up in another order."""

    def joined(images: Tensor) -> Tapped:
        parts = [cast(Tapped, teach(part)) for part in torch.split(images, BATCH)]
        return Tapped(
            features={name: torch.cat([part.features[name] for part in parts]) for name in parts[0].features},
            preactivations={
                name: torch.cat([part.preactivations[name] for part in parts]) for name in parts[0].preactivations
            },
            pooled=torch.cat([part.pooled for part in parts]),
            logits=torch.cat([part.logits for part in parts]),
        )

    return joined


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """A run that writes nothing, and its steps."""

    job: Run
    accelerator: Accelerator
    step: OptimisationStep
    made: torch.optim.Optimizer
    captured: CapturedSteps | None


def trainable(method: str, chosen: TrainSettings, most: int, folder: Path | None, **changes: Any) -> Trainable:
    """A run that continues from the state in ``folder``, if there is one; its steps come from the loop if most is 0."""
    parts = assemble(method, **changes)
    accelerator = make_accelerator(chosen)
    spec, own = parts.spec, batches(chosen)
    job = Run(
        directory=Path(),
        title=method,
        settings=chosen,
        branches=(len(spec.layers or ()), spec.num_branches) if spec else (0, 1),
        task=parts.task,
        network=parts.student,
        batches=own,
        evaluation=[(torch.zeros(4, 3, SIZE, SIZE), torch.arange(4))],
        teach=in_batches(parts.frozen),
    )
    made = optimiser(job.task, chosen)
    if folder is not None:
        load_state(folder, job.task, made)
    task, prepared = accelerator.prepare(job.task, made)
    step = OptimisationStep(task, job.teach, prepared, accelerator, clip_norm=chosen.clip_norm)
    steps = None
    if most:
        steps = CapturedSteps(step, parts.task, own, CPU, BATCH, most)
        # Of another epoch and seed than the first ones: nothing of the warm-up may stay.
        other = epoch_plan(chosen, 2, steps=own.steps, branches=job.branches, device=CPU)
        steps.prepare(other, own.draws(7), seed=99)
    return Trainable(job=job, accelerator=accelerator, step=step, made=made, captured=steps)


def trained(
    method: str, chosen: TrainSettings, *, most: int = 0, folder: Path | None = None, **changes: Any
) -> tuple[dict[str, Tensor], list[Metrics]]:
    """All tensors after some epochs, those of the optimiser too, and the metrics of each epoch.

    At most ``most`` steps are made at once by tables; 0 is the loop. With ``folder`` each epoch continues from there.
    """
    own = trainable(method, chosen, most, None, **changes)
    progress = EpochProgress("", steps_per_epoch=5, epochs=EPOCHS, done_epochs=0, batch_size=BATCH, quiet=True)
    history: list[Metrics] = []
    for epoch in range(EPOCHS):
        if folder is not None and epoch:
            save_state(folder, own.job.task, own.made, Resumed(epoch=epoch, history=()), {})
            own = trainable(method, chosen, most, folder, **changes)
        metrics, _ = train_epoch(own.job, own.accelerator, own.step, epoch, progress, history, own.captured)
        history.append({**metrics, "images_per_s": 0.0})
    state = {
        f"{name}.{key}": value
        for name, parameter in own.job.task.named_parameters()
        for key, value in own.made.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
    return {**own.job.task.state_dict(), **state}, history


def require_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


@pytest.fixture(name="apart")
def _apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Branches are computed one by one: together they add up their gradients in another order."""
    monkeypatch.setattr(module, "joinable", lambda _: False)


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("method", DISTILLERS.names())
def test_every_method_ends_with_the_bits_of_the_loop(method: str) -> None:
    expected, lines = trained(method, settings())
    found, same = trained(method, settings(), most=MOST)
    require_equal(found, expected)
    assert same == lines
    assert any(bool(value.ne(0).any()) for name, value in found.items() if name.endswith("momentum_buffer"))


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("most", [1, 2, 5, 8])
def test_any_number_of_steps_at_once_ends_with_the_bits_of_the_loop(most: int) -> None:
    # Each step draws the orders of its samples.
    expected, lines = trained("kdiffusion", settings(), shuffle_per="sample")
    found, same = trained("kdiffusion", settings(), most=most, shuffle_per="sample")
    require_equal(found, expected)
    assert same == lines


def test_a_run_that_was_stopped_between_two_epochs_ends_with_the_same_bits(tmp_path: Path) -> None:
    expected, lines = trained("crd", settings())
    found, same = trained("crd", settings(), most=MOST, folder=tmp_path)
    require_equal(found, expected)
    assert same == lines


def test_the_teacher_reads_the_images_of_several_steps_together() -> None:
    own = trainable("kd", settings(), MOST, None)
    assert own.captured is not None
    teach, read, done = own.step._teach, list[int](), list[int]()

    def reading(images: Tensor) -> Tapped | None:
        read.append(len(images))
        return teach(images)

    own.step._teach = reading
    for _ in _replays(own.job, own.captured, 0, epoch_plan(settings(), 0, steps=5, branches=(0, 1), device=CPU)):
        done.append(own.captured.left)
    assert done == [2, 0]
    assert read == [3 * BATCH, 2 * BATCH]


def test_the_steps_of_a_graph_are_bounded_by_the_memory_of_what_is_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    images, feature, vector = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4), torch.zeros(2, 5)
    # A map that is the same before and after its activation is there once.
    taught = Tapped(
        features={"last": feature}, preactivations={"last": feature}, pooled=vector, logits=torch.zeros(2, 7)
    )
    size = 4 * 2 * (3 * 16 + 5 * 16 + 5 + 7)
    monkeypatch.setattr(module, "_AHEAD_BYTES", 3 * size)
    assert [module.steps_together(images, taught, most) for most in (1, 2, 3, 8)] == [1, 2, 3, 3]
    monkeypatch.setattr(module, "_AHEAD_BYTES", 3 * size - 1)
    assert module.steps_together(images, taught, 8) == 2
    monkeypatch.setattr(module, "_AHEAD_BYTES", 5)
    assert module.steps_together(images, taught, 8) == 1
    monkeypatch.setattr(module, "_AHEAD_BYTES", 6 * images.nbytes)
    assert module.steps_together(images, None, 8) == 6


@pytest.mark.parametrize(("foreign", "most"), [("", MOST_STEPS), ("the teacher timm:resnet18", 1)])
def test_a_teacher_that_is_not_of_this_project_reads_one_step_at_a_time(
    foreign: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = trainable("kd", settings(capture="yes"), 0, None)
    monkeypatch.setattr(loop, "obstacle", lambda *_, **__: "")
    monkeypatch.setattr(CapturedSteps, "prepare", lambda *_: None)
    job = replace(own.job, foreign=foreign)
    steps = captured_steps(job, own.accelerator, own.step, 0, cast(EpochProgress, None))
    assert steps is not None
    assert steps._most == most


@pytest.mark.parametrize("method", ["average", "kdiffusion"])
def test_a_step_with_branches_that_are_computed_together_is_that_of_the_loop(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One step: in the next ones a network of this size makes a difference of 1e-7 ten thousand times as large.
    ends, losses = [], []
    for together in (True, False):
        if not together:
            monkeypatch.setattr(module, "joinable", lambda _: False)
        own = trainable(method, settings(), 1, None)
        assert own.captured is not None
        assert len(own.captured._joint) == (1 if together else 0)
        own.job.task.train()
        plan = epoch_plan(settings(), 1, steps=5, branches=own.job.branches, device=CPU)
        own.captured.begin(plan, cast(ResidentBatches, own.job.batches).draws(1))
        assert own.captured() == 1
        ends.append({name: value.clone() for name, value in own.job.task.state_dict().items()})
        losses.append(own.step.sums.latest.flatten().tolist())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, value in ends[0].items():
        assert (value - ends[1][name]).abs().max() <= 1e-5 * ends[1][name].abs().max(), name
    assert any(not torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({"optimizer": "adamw", "schedule": "cosine"}, {}),
        ({"nesterov": True, "clip_norm": 0.3, "label_smoothing": 0.1, "seed": 4}, {}),
        ({"sampling": "balanced", "momentum": 0.0}, {}),
        ({}, {"shuffle_per": "sample"}),
        ({}, {"layers": "multi", "shuffle_per": "layer", "guide_feature": "prediction", "target_guide": 1.0}),
    ],
)
def test_settings_of_the_training_change_both_forms_alike(changes: dict[str, Any], method: dict[str, Any]) -> None:
    chosen = settings(**changes)
    expected, lines = trained("kdiffusion", chosen, **method)
    found, same = trained("kdiffusion", chosen, most=MOST, **method)
    require_equal(found, expected)
    assert same == lines


@pytest.mark.parametrize("method", ["crd", "reviewkd"])
def test_weights_that_are_cast_together_end_with_the_bits_of_autocast(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, counted = settings(mixed_precision="bf16", epochs=1), []
    together = torch._foreach_copy_
    expected, lines = trained(method, chosen)

    def counting(to: list[Tensor], of: list[Tensor]) -> None:
        counted.append(len(to))
        together(to, of)

    monkeypatch.setattr(torch, "_foreach_copy_", counting)
    found, same = trained(method, chosen, most=MOST)
    require_equal(found, expected)
    assert same == lines
    # Both ways in each step, and in those of the warm-up: every convolution, the classifier with its bias, and the
    # links of ReviewKD, of which three have gates with a bias. The projections of CRD are computed in float32.
    parts = assemble(method)
    convolutions = sum(isinstance(part, nn.Conv2d) for part in parts.task.modules())
    gates = len(cast(Any, parts.distiller).links) - 1 if method == "reviewkd" else 0
    assert set(counted) == {convolutions + 2 + gates}


def test_a_weight_without_a_gradient_and_one_in_another_precision_are_not_cast() -> None:
    cast_, frozen, double = nn.Linear(3, 2), nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2).double()
    network, weight = nn.Sequential(cast_, frozen, double), cast_.weight
    with module._cast_together(list(network), torch.bfloat16):
        assert [cast_.weight.dtype, cast_.bias.dtype] == [torch.bfloat16] * 2
        assert [frozen.weight.dtype, double.weight.dtype] == [torch.float32, torch.float64]
        (cast_.weight.float() * torch.tensor([[1.0, 2.0, 4.0]])).sum().backward()  # type: ignore[no-untyped-call]
        assert next(network.parameters()) is weight
    assert cast_.weight is weight
    assert cast_.bias.grad is None
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1.0, 2.0, 4.0]] * 2
    with module._cast_together(list(network), None):
        assert cast_.weight is weight


def test_only_layers_that_always_run_under_autocast_are_cast() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.once, self.never, self.idle = (nn.Linear(3, 3) for _ in range(4))

        def forward(self, values: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                values = self.once(self.always(values)).float()
            return cast(Tensor, self.never(self.once(values)))

    network, values = Mixed(), torch.randn(5, 3)
    assert module._cast_layers(network, lambda: cast(None, network(values)), CPU) == [network.always]


def test_a_batch_norm_that_reads_its_count_goes_on_counting_and_one_that_runs_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reads, self.shared = nn.BatchNorm1d(3, momentum=None), nn.BatchNorm1d(3)
            self.frozen, self.idle = nn.BatchNorm1d(3).eval(), nn.BatchNorm1d(3)

        def forward(self, values: Tensor) -> Tensor:
            return cast(Tensor, self.frozen(self.shared(self.shared(self.reads(values)))))

    network, values = Twice(), torch.randn(5, 3)
    calls = module._batch_norm_calls(network, lambda: cast(None, network(values)))
    assert calls == {network.shared: 2}


def norms(network: nn.Module) -> Iterator[_BatchNorm]:
    return (found for found in network.modules() if isinstance(found, _BatchNorm))


def test_no_batch_norm_counts_in_a_step() -> None:
    chosen, seen = settings(), []
    parts = assemble("average")
    accelerator = make_accelerator(chosen)
    task, made = accelerator.prepare(parts.task, optimiser(parts.task, chosen))
    step = OptimisationStep(task, parts.frozen, made, accelerator, clip_norm=0.0)
    own = batches(chosen)
    steps = CapturedSteps(step, parts.task, own, CPU, BATCH)
    assert parts.spec is not None
    branches = (len(parts.spec.layers or ()), parts.spec.num_branches)
    plan = epoch_plan(chosen, 0, steps=2, branches=branches, device=CPU)
    steps.prepare(plan, own.draws(0), 0)
    steps.begin(plan, own.draws(0))
    parts.task.register_forward_pre_hook(
        lambda *_: seen.append([norm.num_batches_tracked for norm in norms(parts.task)])
    )
    with steps.counting_later(2):
        assert (steps(), steps.left) == (2, 0)
    assert len(seen) == 2
    assert all(count is None for counts in seen for count in counts)
    assert {int(cast(Tensor, norm.num_batches_tracked)) for norm in norms(parts.task)} == {2}


def accelerator(kind: str = "cuda", *, processes: int = 1, scaler: object = None) -> Accelerator:
    return cast(Accelerator, SimpleNamespace(device=torch.device(kind), num_processes=processes, scaler=scaler))


def reason(
    chosen: TrainSettings,
    on: Accelerator,
    *,
    data: DataSettings = DATA,
    of: Batches | None = None,
    mixes: bool = False,
    foreign: str = "",
) -> str:
    return obstacle(chosen, of or batches(chosen, data), on, mixes=mixes, foreign=foreign)


def test_what_cannot_be_captured_is_said_and_refused_where_it_is_demanded() -> None:
    auto, demanded = settings(), settings(capture="yes")
    streamed = StreamedBatches(images(), DATA, batch_size=BATCH, seed=0, device=CPU)
    told = {
        "no CUDA device": reason(auto, accelerator("cpu")),
        "2 processes": reason(auto, accelerator(processes=2)),
        "fp16": reason(auto, accelerator(scaler=object())),
        "decoded or changed": reason(auto, accelerator(), of=streamed),
        "one by one": reason(auto, accelerator(), data=DATA.model_copy(update={"erasing": 0.2})),
        "train.mixup": reason(auto, accelerator(), mixes=True),
        "train.ema": reason(settings(ema=0.9), accelerator()),
        "the student timm:resnet18 is not of this project": reason(
            auto, accelerator(), foreign="the student timm:resnet18"
        ),
    }
    assert [part for part, text in told.items() if part not in text] == []
    for text in told.values():
        require_capture(auto, text)
        with pytest.raises(BackendUnavailableError, match="cannot be captured as a CUDA graph: ") as caught:
            require_capture(demanded, text)
        assert text in caught.value.message
        assert "train.capture" in caught.value.remedy
    for chosen, foreign in ((auto, ""), (demanded, ""), (demanded, "the student timm:resnet18")):
        assert reason(chosen, accelerator(), foreign=foreign) == ""
        require_capture(chosen, "")
    assert reason(settings(capture="no"), accelerator()) != ""


def test_a_graph_with_other_losses_than_the_step_is_refused() -> None:
    names = ("cross_entropy", "diffusion")
    nan = float("nan")
    for found in ([2.0, -0.5], [2.02, -0.505], [1.99, -0.4951]):
        module._require_same(names, [2.0, -0.5], found)
    module._require_same(names, [nan, 0.0], [nan, 1e-6])
    for expected, found, bad in (
        ([2.0, -0.5], [2.05, -0.5], "cross_entropy"),
        ([2.0, -0.5], [2.0, 0.0], "diffusion"),
        ([2.0, -0.5], [2.0, nan], "diffusion"),
        ([2.0, 0.0], [2.0, 0.1], "diffusion"),
    ):
        with pytest.raises(BackendUnavailableError, match=f"another loss/{bad} as a CUDA graph") as caught:
            module._require_same(names, expected, found)
        assert caught.value.remedy == "Train without it: --set train.capture=no"


def test_the_key_is_no_part_of_the_identity_of_a_run() -> None:
    from training.recipe import load_recipe

    plain = load_recipe("digits")
    other = plain.model_copy(update={"train": plain.train.model_copy(update={"capture": "no"})})
    assert "capture" not in plain.model_dump()["train"]
    assert other.identity() == plain.identity()

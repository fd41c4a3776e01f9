"""Optimisers, averaged weights, clipped gradients, smoothed labels, mixed images, validation, trackers, range test."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kdexport.checkpoint import load_student, open_checkpoint
from kdexport.errors import BackendUnavailableError, ConfigError, TrainingError
from tests.training.small_runs import tiny_recipe
from training.augmentation import Mixer
from training.data import Batch, Labelled
from training.distillers.distiller import StepContext
from training.recipe import TrainSettings
from training.runs.averaging import WeightAverage
from training.runs.find_lr import HIGHEST, LOWEST, find_rate
from training.runs.loop import Run, best_epoch, out_of_patience, run
from training.runs.supervision import Supervision, supervision
from training.runs.task import SupervisedTask
from training.runs.trackers import require_trackers
from training.train import distil, make_accelerator, rehearse, train_teacher

CPU = torch.device("cpu")


class Images:
    """Batches of noise whose class is the channel with the largest mean."""

    steps = 3

    def epoch(self, index: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(index)
        for _ in range(self.steps):
            images = torch.randn(6, 3, 8, 8, generator=generator)
            labels = torch.randint(3, (6,), generator=generator)
            images[torch.arange(6), labels] += 1.0
            yield Batch(images, labels, torch.arange(6))


def evaluation() -> list[Labelled]:
    return [(batch.images, batch.labels) for batch in Images().epoch(9)]


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def settings(**changes: Any) -> TrainSettings:
    base: dict[str, Any] = {"epochs": 4, "batch_size": 6, "mixed_precision": "no", "learning_rate": 0.05}
    return TrainSettings.model_validate({**base, "milestones": (2,), "compile": "no", **changes})


def job(directory: Path, chosen: TrainSettings, net: nn.Module) -> Run:
    average = WeightAverage(net, chosen.ema) if chosen.ema else None
    return Run(
        directory=directory,
        title="small",
        settings=chosen,
        branches=(0, 1),
        task=SupervisedTask(net, supervision(chosen, torch.tensor([0, 1, 1, 2, 2, 2]))),
        network=net,
        batches=Images(),
        evaluation=evaluation(),
        validation=evaluation()[:1] if chosen.validation else None,
        teach=lambda _: None,
        mix=Mixer(chosen, 3) if chosen.mixup or chosen.cutmix else None,
        average=average,
        draws=False,
        classes=("ant", "bee", "cow"),
    )


def trained(directory: Path, chosen: TrainSettings) -> nn.Module:
    net = network()
    run(job(directory, chosen, net), make_accelerator(chosen))
    return net


ALL = {
    "optimizer": "adamw", "betas": (0.8, 0.99), "learning_rate": 0.01, "clip_norm": 0.3, "ema": 0.7,
    "label_smoothing": 0.2, "mixup": 0.4, "cutmix": 1.0, "class_weights": "balanced", "validation": 0.2,
}  # fmt: skip


@pytest.mark.parametrize("changes", [ALL, {"nesterov": True, "find_lr": True, "ema": 0.9}], ids=["adamw", "sgd"])
def test_a_run_that_is_continued_after_each_epoch_ends_with_the_same_bits(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    trained(whole, settings(**changes))
    for epochs in (1, 2, 3, 4):
        # The schedule by steps does not depend on the number of epochs.
        trained(stopped, settings(**changes, epochs=epochs))
    one, two = (load_file(folder / "resume.safetensors") for folder in (whole, stopped))
    assert one.keys() == two.keys()
    assert any(name.startswith("average.") for name in one)
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    lines = [
        [{**json.loads(line), "images_per_s": 0} for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (whole, stopped)
    ]
    assert lines[0] == lines[1]


def test_adamw_is_the_published_update(tmp_path: Path) -> None:
    rate, decay, (b1, b2) = 0.02, 0.1, (0.8, 0.95)
    chosen = settings(epochs=1, optimizer="adamw", learning_rate=rate, weight_decay=decay, betas=(b1, b2))
    linear = nn.Linear(192, 3, bias=False).double()
    net = nn.Sequential(nn.Flatten(), linear)
    weight = linear.weight.detach().clone()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for index, batch in enumerate(Images().epoch(0), 1):
        x = batch.images.flatten(1).double()
        error = (x @ weight.T).softmax(1) - nn.functional.one_hot(batch.labels, 3)
        gradient = error.T @ x / 6
        first, second = b1 * first + (1 - b1) * gradient, b2 * second + (1 - b2) * gradient**2
        step = first / (1 - b1**index) / ((second / (1 - b2**index)).sqrt() + 1e-8)
        weight = weight - rate * decay * weight - rate * step

    class Doubles(Images):
        def epoch(self, index: int) -> Iterator[Batch]:
            for images, labels, samples in super().epoch(index):
                yield Batch(images.double(), labels, samples)

    made = Run(
        directory=tmp_path, title="small", settings=chosen, branches=(0, 1), task=SupervisedTask(net), network=net,
        batches=Doubles(), evaluation=[(images.double(), labels) for images, labels in evaluation()],
        teach=lambda _: None, draws=False,
    )  # fmt: skip
    run(made, make_accelerator(chosen))
    # Losses are float32.
    torch.testing.assert_close(linear.weight.detach(), weight, rtol=1e-5, atol=1e-7)


def test_a_clipped_step_is_no_longer_than_the_limit_allows(tmp_path: Path) -> None:
    limit, rate = 1e-3, 0.5
    chosen = settings(epochs=1, clip_norm=limit, learning_rate=rate, momentum=0.0, weight_decay=0.0)
    before = torch.cat([p.detach().flatten() for p in network().parameters()])
    after = torch.cat([p.detach().flatten() for p in trained(tmp_path, chosen).parameters()])
    moved = float((after - before).norm())
    assert 0.3 * limit * rate < moved <= 3 * limit * rate * 1.001


def test_the_mean_of_the_weights_is_evaluated_and_its_own_statistics_too(tmp_path: Path) -> None:
    source = network().train()
    average = WeightAverage(source, 0.75)
    expected = {name: value.double().clone() for name, value in source.state_dict().items()}
    for step in range(1, 31):
        source(torch.randn(4, 3, 8, 8))
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(step)
        decay = min(0.75, (1 + step) / (10 + step))
        for name, value in source.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    kept = average.state()
    for name, value in kept.items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-5)
    assert int(kept["1.num_batches_tracked"]) == 30
    assert not any(parameter.requires_grad for parameter in average.network.parameters())


def context(labels: Tensor, targets: Tensor | None = None) -> StepContext:
    nothing = torch.zeros(0, 1, dtype=torch.int64)
    return StepContext(epoch=torch.tensor(0.0), orders=nothing, labels=labels, samples=labels, targets=targets)


def test_labels_are_smoothed_and_classes_weighted_as_published() -> None:
    logits, labels = torch.randn(5, 3, dtype=torch.float64).float(), torch.tensor([0, 2, 2, 1, 2])
    log = logits.double().log_softmax(1)
    smooth = 0.9 * nn.functional.one_hot(labels, 3) + 0.1 / 3
    found = Supervision(0.1)(logits, context(labels))
    torch.testing.assert_close(found.double(), -(smooth * log).sum(1).mean(), rtol=1e-6, atol=1e-7)
    # 2, 1 and 5 images: the same total weight for each class, and a mean of 1 over the images.
    own = supervision(settings(class_weights="balanced"), torch.tensor([0, 0, 1, 2, 2, 2, 2, 2]))
    weights = torch.tensor([8 / 6, 8 / 3, 8 / 15], dtype=torch.float64)
    assert own.weights is not None
    torch.testing.assert_close(own.weights.double(), weights, rtol=1e-6, atol=0)
    losses = -log[torch.arange(5), labels] * weights[labels]
    torch.testing.assert_close(
        own(logits, context(labels)).double(), losses.sum() / weights[labels].sum(), rtol=1e-6, atol=0
    )
    # A mixture that is all one image is that image.
    whole = nn.functional.one_hot(labels, 3).float()
    torch.testing.assert_close(own(logits, context(labels, whole)), own(logits, context(labels)))
    assert dict(own.state_dict()) == {}


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_images_are_mixed_with_their_labels_and_the_global_generator_is_left_alone(kind: str) -> None:
    chosen = settings(**{kind: 0.8})
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    mixed, targets = Mixer(chosen, 3)(images, labels, 2, 1)
    assert torch.equal(torch.rand(4), expected)
    assert targets is not None
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    part = float(targets[0].max())
    if kind == "mixup":
        own = [part * images + (1 - part) * images.roll(1, 0), (1 - part) * images + part * images.roll(1, 0)]
        assert any(torch.allclose(mixed, each, atol=1e-5) for each in own)
    else:
        pasted = (mixed == images.roll(1, 0)).all(1).float().mean((1, 2))
        assert any(torch.allclose(pasted, torch.full((6,), each), atol=1e-6) for each in (part, 1 - part))
    # Each step has a mixture of its own, which the seed, the epoch and the step decide.
    again = Mixer(chosen, 3)(images, labels, 2, 1)[0]
    assert torch.equal(again, mixed)
    assert not torch.equal(Mixer(chosen, 3)(images, labels, 2, 2)[0], mixed)
    assert not torch.equal(Mixer(settings(**{kind: 0.8}, seed=1), 3)(images, labels, 2, 1)[0], mixed)


def test_the_teacher_sees_the_mixed_images_of_the_student(tmp_path: Path) -> None:
    chosen, net = settings(epochs=1, mixup=0.5), network()
    made, taught, given = job(tmp_path, chosen, net), list[Tensor](), list[Tensor]()
    object.__setattr__(made, "teach", lambda images: taught.append(images.clone()))
    net.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0].clone()) if module.training else None)
    run(made, make_accelerator(chosen))
    originals = [batch.images for batch in Images().epoch(0)]
    assert len(taught) == len(given) == len(originals)
    for seen, used, original in zip(taught, given, originals, strict=True):
        assert torch.equal(seen, used)
        assert not torch.equal(seen, original)


def test_the_end_of_a_run_is_chosen_on_validation_images_and_never_on_the_test_split() -> None:
    history = [{"top1": t, "validation_top1": v} for t, v in ((0.1, 0.3), (0.9, 0.5), (0.2, 0.5), (0.95, 0.4))]
    assert best_epoch(history) == history[1]
    assert best_epoch([{"top1": 0.2}, {"top1": 0.4}])["top1"] == 0.4
    # Epoch 2 was the best; a later one with the same value does not replace it.
    assert [out_of_patience(history[:n], 2) for n in range(5)] == [False, False, False, False, True]
    assert not out_of_patience(history, 0)
    assert not out_of_patience(history, 3)


def test_a_student_stops_early_and_is_that_of_its_best_validation_epoch(tiny_images: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tiny_images, "distiller.name=plain", "train.epochs=6", "train.validation=0.3", "train.patience=1",
        "train.batch_size=8", "train.ema=0.5", "train.label_smoothing=0.1",
    )  # fmt: skip
    metrics = distil(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    values = [line["validation_top1"] for line in lines]
    best = values.index(max(values))
    assert metrics["validation_top1"] == max(values)
    assert len(lines) == min(best + 2, 6)
    provenance = open_checkpoint(tmp_path / "run" / "student").spec.provenance
    assert provenance["metrics"]["top1"] == lines[best]["top1"] == metrics["top1"]
    assert (tmp_path / "run" / "student" / "model.safetensors").read_bytes() == (
        tmp_path / "run" / "best" / "model.safetensors"
    ).read_bytes()
    # The mean of the weights was handed over, not the last weights.
    state = load_file(tmp_path / "run" / "resume.safetensors")
    student = load_student(open_checkpoint(tmp_path / "run" / "student")).state_dict()
    if best == len(lines) - 1:
        assert all(torch.equal(value, state[f"average.{name}"]) for name, value in student.items())
    assert any(not torch.equal(value, state[f"task.student.{name}"]) for name, value in student.items())
    # A finished run is only reported again.
    assert distil(recipe, tmp_path / "run") == metrics
    # It can be extended; here it has lost its patience.
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 8})})
    again = distil(longer, tmp_path / "run")
    assert open_checkpoint(tmp_path / "run" / "best").spec.provenance["metrics"]["top1"] == again["top1"]
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["extended_from"] == [6]
    teacher = tmp_path / "teacher"
    train_teacher(recipe, teacher)
    assert (teacher / "model.safetensors").is_file()
    assert not (teacher / "best.safetensors").exists()


def test_the_report_of_an_epoch_has_each_class(tmp_path: Path) -> None:
    trained(tmp_path, settings(epochs=2))
    report = json.loads((tmp_path / "evaluation.json").read_text())
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert report["epoch"] == 2
    assert list(report["per_class"]) == ["ant", "bee", "cow"]
    confusion = torch.tensor(report["confusion"])
    assert int(confusion.diagonal().sum()) / int(confusion.sum()) == report["top1"] == last["top1"]
    assert 0 <= last["train_top1"] <= 1


def test_the_range_test_finds_a_rate_that_converges() -> None:
    state = [1.0]

    def parabola(rate: float) -> float:
        # Gradient descent on 5 x^2, which diverges above a rate of 0.2.
        loss = 5 * state[0] ** 2
        state[0] -= rate * 10 * state[0]
        return loss

    found = find_rate(parabola)
    assert found.rates[0] == LOWEST
    assert 0.02 < found.rate < 0.2
    assert found.rate == pytest.approx(found.rates[found.losses.index(min(found.losses))] / 10)
    assert found.rates[-1] <= HIGHEST * 1.0001
    # A loss that explodes ends the test.
    exploding = find_rate(lambda rate: 1.0 - rate if rate < 0.01 else 1e9)
    assert max(exploding.rates) < 0.01
    with pytest.raises(TrainingError, match="found no learning rate"):
        find_rate(lambda rate: 1.0 + rate)


def test_a_found_rate_is_used_and_kept_with_the_state(tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in network().state_dict().items()}
    net = network()
    made = job(tmp_path, settings(epochs=1, find_lr=True, milestones=()), net)
    history = run(made, make_accelerator(made.settings))
    tried = [json.loads(line) for line in (tmp_path / "find_lr.jsonl").read_text().splitlines()]
    lowest = min(tried, key=lambda line: float(line["loss"]))
    assert history[0]["lr"] == pytest.approx(lowest["learning_rate"] / 10)
    # The test left no trace in the weights: the same rate by hand gives the same bits.
    (tmp_path / "by hand").mkdir()
    other = network()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in before.items())
    by_hand = settings(epochs=1, learning_rate=history[0]["lr"], milestones=())
    run(job(tmp_path / "by hand", by_hand, other), make_accelerator(by_hand))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())


def test_trackers_get_the_configuration_and_each_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import tracking

    calls: list[tuple[str, Any]] = []

    class Noting(tracking.GeneralTracker):  # type: ignore[misc]
        name, requires_logging_directory, main_process_only = "wandb", False, False

        def __init__(self, project: str) -> None:
            super().__init__()
            calls.append(("project", project))

        @property
        def tracker(self) -> None:
            return None

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            calls.append(("configuration", values))

        def log(self, values: dict[str, float], step: int | None = None) -> None:
            calls.append((f"epoch {step}", values))

        def finish(self) -> None:
            calls.append(("finish", None))

    module = ModuleType("wandb")
    module.__spec__ = sys.__spec__
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Noting)
    monkeypatch.setattr("training.runs.trackers.get_available_trackers", lambda: ["wandb"])
    chosen = settings(epochs=2, trackers=("wandb",))
    trained(tmp_path, chosen)
    assert [name for name, _ in calls] == ["project", "configuration", "epoch 1", "epoch 2", "finish"]
    assert calls[2][1]["top1"] == json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["top1"]


def test_trackers_that_are_unknown_or_not_installed_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'wandbb', which is unknown") as unknown:
        require_trackers(["wandbb"])
    assert "wandb" in unknown.value.remedy
    with pytest.raises(ConfigError, match="always in the folder of the run"):
        require_trackers(["tensorboard"])
    with pytest.raises(BackendUnavailableError, match="not installed") as absent:
        require_trackers(["clearml"])
    assert "pip install clearml" in absent.value.remedy


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (("distiller.name=dkd", "train.mixup=0.2"), r"train\.mixup cannot be used with dkd"),
        (("distiller.name=crd", "train.cutmix=1.0"), r"train\.cutmix cannot be used with crd"),
        (("distiller.name=crd", "train.sampling=balanced"), "repeats images in a batch"),
    ],
)
def test_methods_that_need_whole_images_refuse_mixtures(
    changes: tuple[str, ...], problem: str, tiny_images: Path
) -> None:
    with pytest.raises(ConfigError, match=problem):
        rehearse(tiny_recipe(tiny_images, *changes))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("train.patience=3", "patience has no effect without a validation above 0"),
        ("train.betas=[0.5, 0.9]", "betas has no effect without optimizer = 'adamw'"),
        ("data.policy_magnitude=5", "policy_magnitude has no effect without policy = 'randaugment'"),
        ("data.crop_scale=[0.9, 0.2]", "the first part must not be larger"),
    ],
)
def test_keys_without_an_effect_are_refused(change: str, problem: str, tiny_images: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        tiny_recipe(tiny_images, change)
    with pytest.raises(ConfigError, match="momentum has no effect without optimizer = 'sgd'"):
        tiny_recipe(tiny_images, "train.optimizer=adamw", "train.momentum=0.5")

import itertools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import Tensor, nn
from typer.testing import CliRunner

from kdexport.checkpoint import load_student, open_checkpoint
from kdexport.data.datasets import dataset_digest
from kdexport.errors import CheckpointError, ConfigError, DataError, TrainingError
from tests.training.small_runs import CLASSES, arguments, start, tiny_recipe
from training.__main__ import app
from training.data import Batch, Labelled
from training.distillers.distiller import StepContext
from training.recipe import TrainSettings
from training.runs.handover import Origin
from training.runs.loop import Run, run, top1
from training.runs.optimiser import learning_rate
from training.runs.record import claim_input
from training.runs.state import load_state
from training.runs.task import StepResult
from training.train import (
    distil,
    evaluate_student,
    evaluate_teacher,
    make_accelerator,
    prepare_teacher,
    train_student,
    train_teacher,
)

ORIGIN = Origin(dataset_sha256="d" * 64, teacher_sha256="e" * 64)
STEPS, FEATURES = 3, 4
NAMES = {
    *("loss/cross_entropy", "loss/penalty", "lr", "images_per_s"),
    *("top1", "top5", "calibration_error", "train_top1"),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class FewBatches:
    """Random points whose class is the sign of their sum."""

    steps = STEPS

    def epoch(self, index: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(index)
        for _ in range(STEPS):
            points = torch.randn(8, FEATURES, generator=generator).to(DEVICE)
            yield Batch(points, (points.sum(1) > 0).long(), torch.arange(8))


def evaluation_set() -> list[Labelled]:
    return [(batch.images, batch.labels) for batch in FewBatches().epoch(77)]


class LinearTask(nn.Module):
    """A linear classifier with a named penalty; from ``breaks_at`` on its loss is infinite."""

    def __init__(self, breaks_at: float) -> None:
        super().__init__()
        self.network = nn.Linear(FEATURES, 2)
        self.breaks_at = breaks_at
        self.seen: list[tuple[float, list[list[int]]]] = []

    def forward(self, points: Tensor, _feature: Tensor, step: StepContext) -> StepResult:
        self.seen.append((step.epoch.item(), step.orders.tolist()))
        logits = self.network(points)
        entropy = nn.functional.cross_entropy(logits, step.labels)
        if step.epoch >= self.breaks_at:
            entropy = entropy * float("inf")
        return StepResult({"cross_entropy": entropy, "penalty": self.network.weight.square().sum()}, logits)


def settings(**changes: object) -> TrainSettings:
    defaults = {"epochs": 4, "batch_size": 8, "learning_rate": 0.1, "mixed_precision": "no", "milestones": (2,)}
    return TrainSettings.model_validate({**defaults, **changes})


def job(directory: Path, task: LinearTask, chosen: TrainSettings) -> Run:
    return Run(
        directory=directory,
        title="linear",
        settings=chosen,
        branches=(2, 3),
        task=task,
        network=task.network,
        batches=FewBatches(),
        evaluation=evaluation_set(),
        teach=lambda _: None,
        draws=False,
    )


def linear(breaks_at: float = 1e9) -> LinearTask:
    torch.manual_seed(0)
    return LinearTask(breaks_at).to(DEVICE)


def lines(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return {tag: [(item.step, item.value) for item in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, 0.02), (149.99, 0.02), (150, 0.002), (179.9, 0.002), (180, 0.0002), (210, 0.00002), (239.9, 0.00002)],
)
def test_the_step_schedule_falls_tenfold_at_each_milestone(epoch: float, expected: float) -> None:
    assert learning_rate(TrainSettings(learning_rate=0.02), epoch) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("epoch", "expected"), [(2, 0.4), (3, 0.34142135623730951), (4, 0.2), (5, 0.058578643762690491), (6, 0.0)]
)
def test_the_cosine_schedule_falls_from_the_end_of_the_warm_up_to_zero(epoch: float, expected: float) -> None:
    chosen = TrainSettings(epochs=6, learning_rate=0.4, schedule="cosine", warmup_epochs=2.0)
    assert learning_rate(chosen, epoch) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_the_warm_up_rises_linearly_from_almost_nothing(schedule: str) -> None:
    chosen = TrainSettings.model_validate(
        {"epochs": 8, "learning_rate": 0.3, "schedule": schedule, "milestones": (1,), "warmup_epochs": 2.5}
    )
    assert 0 < learning_rate(chosen, 0) < 0.001 * 0.3
    rates = [learning_rate(chosen, epoch / 4) for epoch in range(10)]
    steps = {round(high - low, 12) for low, high in itertools.pairwise(rates)}
    assert steps == {round(0.3 / 10, 12)}


def test_top1_counts_the_largest_logits_and_puts_the_mode_back() -> None:
    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            assert not self.training
            return images

    network = Fixed()
    logits = torch.tensor([[0.1, 3.0, 2.0], [-1.0, -2.0, -3.0], [0.0, 0.0, 9.0]])
    batches = [(logits, torch.tensor([1, 0, 1])), (logits[:1], torch.tensor([2]))]
    assert top1(network, batches) == 2 / 4
    assert network.training
    network.eval()
    top1(network, batches)
    assert not network.training


def test_every_epoch_leaves_a_line_and_scalars_of_each_loss(tmp_path: Path) -> None:
    task, chosen = linear(), settings()
    history = run(job(tmp_path, task, chosen), make_accelerator(chosen))
    written = lines(tmp_path)
    assert [line.pop("epoch") for line in written] == [1, 2, 3, 4]
    assert written == list(history)
    assert set(written[0]) == NAMES
    assert [line["lr"] for line in written] == pytest.approx([0.1, 0.1, 0.01, 0.01])
    assert written[-1]["top1"] == top1(task.network, evaluation_set())
    drawn = scalars(tmp_path)
    assert set(drawn) == set(written[0])
    for tag, points in drawn.items():
        assert [step for step, _ in points] == [1, 2, 3, 4]
        assert [value for _, value in points] == pytest.approx([line[tag] for line in written], rel=1e-6)


def test_the_losses_of_an_epoch_are_the_means_over_its_steps(tmp_path: Path) -> None:
    task, chosen = linear(), settings(epochs=1, learning_rate=1e-12)
    expected = [
        nn.functional.cross_entropy(task.network(points), labels).item() for points, labels, _ in FewBatches().epoch(0)
    ]
    penalty = task.network.weight.square().sum().item()
    (metrics,) = run(job(tmp_path, task, chosen), make_accelerator(chosen))
    assert metrics["loss/cross_entropy"] == pytest.approx(sum(expected) / STEPS, rel=1e-5)
    assert metrics["loss/penalty"] == pytest.approx(penalty, rel=1e-5)


def test_a_step_is_sgd_with_momentum_and_weight_decay_on_the_sum_of_the_losses(tmp_path: Path) -> None:
    task, chosen = linear(), settings(epochs=2, momentum=0.7, weight_decay=0.05, milestones=(1,))
    weight, bias = (p.detach().double().cpu().clone() for p in task.network.parameters())
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for epoch, rate in ((0, 0.1), (1, 0.01)):
        for points, labels, _ in FewBatches().epoch(epoch):
            x = points.double().cpu()
            error = torch.softmax(x @ weight.T + bias, 1) - nn.functional.one_hot(labels.cpu(), 2)
            gradients = (error.T @ x / 8 + 2 * weight + 0.05 * weight, error.mean(0) + 0.05 * bias)
            velocity = [0.7 * v + g for v, g in zip(velocity, gradients, strict=True)]
            weight, bias = weight - rate * velocity[0], bias - rate * velocity[1]
    run(job(tmp_path, task, chosen), make_accelerator(chosen))
    torch.testing.assert_close(task.network.weight.double().cpu(), weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(task.network.bias.double().cpu(), bias, rtol=1e-4, atol=1e-6)


def test_every_step_has_its_place_in_the_epoch_and_a_random_order_of_its_own(tmp_path: Path) -> None:
    chosen = settings(epochs=8)
    first, second = linear(), linear()
    for name, task in (("first", first), ("second", second)):
        run(job(tmp_path / name, task, chosen), make_accelerator(chosen))
    assert [epoch for epoch, _ in first.seen] == pytest.approx([step / STEPS for step in range(8 * STEPS)])
    assert first.seen == second.seen
    orders = [order for _, order in first.seen]
    assert all(len(order) == 2 and all(sorted(layer) == [0, 1, 2] for layer in order) for order in orders)
    assert any(first != second for first, second in orders)
    distinct = [tuple(order[0]) for order in orders]
    assert len(set(distinct)) > 3
    assert any(len(set(distinct[start : start + STEPS])) > 1 for start in range(0, len(orders), STEPS))
    other = linear()
    run(job(tmp_path / "other", other, settings(epochs=8, seed=1)), make_accelerator(chosen))
    assert [order for _, order in other.seen] != orders


def test_a_diverged_run_is_refused_and_its_last_good_state_kept(tmp_path: Path) -> None:
    task, chosen = linear(breaks_at=2.5), settings(epochs=5)
    with pytest.raises(TrainingError) as caught:
        run(job(tmp_path, task, chosen), make_accelerator(chosen))
    assert caught.value.message == "loss/cross_entropy is not finite in epoch 3, steps 1 to 3: the run diverged."
    assert "learning_rate" in caught.value.remedy
    assert [line["epoch"] for line in lines(tmp_path)] == [1, 2]
    sound = linear()
    run(job(tmp_path / "sound", sound, chosen.model_copy(update={"epochs": 2})), make_accelerator(chosen))
    kept = linear()
    resumed, _ = load_state(tmp_path, kept, torch.optim.SGD(kept.parameters(), lr=1))
    assert resumed.epoch == len(resumed.history) == 2
    assert torch.equal(kept.network.weight, sound.network.weight)
    assert torch.equal(kept.network.bias, sound.network.bias)


def test_weights_that_overflow_in_the_last_step_are_refused(tmp_path: Path) -> None:
    class OneStep(FewBatches):
        steps = 1

        def epoch(self, index: int) -> Iterator[Batch]:
            yield next(super().epoch(index))

    task, chosen = linear(), settings(epochs=1, learning_rate=3e38, warmup_epochs=0.0, milestones=(5,))
    task.network.weight.data.mul_(1e4)
    whole = job(tmp_path, task, chosen)
    with pytest.raises(TrainingError, match=r"network\.weight is not finite in epoch 1"):
        run(replace(whole, batches=OneStep()), make_accelerator(chosen))
    assert not (tmp_path / "resume.safetensors").exists()


def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    chosen = settings(epochs=6, milestones=(4,), nesterov=True)
    whole, parted = linear(), linear()
    run(job(tmp_path / "whole", whole, chosen), make_accelerator(chosen))
    for epochs in (1, 4, 4, 6):
        parted = linear()
        part = chosen.model_copy(update={"epochs": epochs})
        history = run(job(tmp_path / "parted", parted, part), make_accelerator(chosen))
        assert len(history) == epochs
    assert torch.equal(whole.network.weight, parted.network.weight)
    assert torch.equal(whole.network.bias, parted.network.bias)
    timeless = [[{**line, "images_per_s": 0.0} for line in lines(tmp_path / name)] for name in ("whole", "parted")]
    assert timeless[0] == timeless[1]


def test_an_epoch_whose_line_could_not_be_written_is_run_again(tmp_path: Path) -> None:
    chosen = settings(epochs=2)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        run(job(tmp_path, linear(), chosen), make_accelerator(chosen))
    (tmp_path / "metrics.jsonl").rmdir()
    run(job(tmp_path, linear(), chosen), make_accelerator(chosen))
    assert [line["epoch"] for line in lines(tmp_path)] == [1, 2]


def test_an_epoch_that_is_run_again_is_drawn_once(tmp_path: Path) -> None:
    chosen = settings(epochs=3)
    run(job(tmp_path, linear(), chosen.model_copy(update={"epochs": 1})), make_accelerator(chosen))
    kept = (tmp_path / "resume.safetensors").read_bytes()
    run(job(tmp_path, linear(), chosen.model_copy(update={"epochs": 2})), make_accelerator(chosen))
    # The state after a kill between the line of epoch 2 and its checkpoint.
    (tmp_path / "resume.safetensors").write_bytes(kept)
    # A restarted process opens its event file in a later second.
    time.sleep(1.1)
    run(job(tmp_path, linear(), chosen), make_accelerator(chosen))
    assert [line["epoch"] for line in lines(tmp_path)] == [1, 2, 3]
    drawn = scalars(tmp_path)
    assert set(drawn) == NAMES
    assert all([step for step, _ in points] == [1, 2, 3] for points in drawn.values())


def test_no_epoch_is_lost_however_short_it_is(tmp_path: Path) -> None:
    chosen = settings(epochs=13)
    run(job(tmp_path, linear(), chosen), make_accelerator(chosen))
    assert [line["epoch"] for line in lines(tmp_path)] == list(range(1, 14))
    assert [step for step, _ in scalars(tmp_path)["loss/penalty"]] == list(range(1, 14))


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    chosen = settings(epochs=1)
    run(job(tmp_path, linear(), chosen), make_accelerator(chosen))
    other = nn.Linear(FEATURES + 1, 2)
    with pytest.raises(CheckpointError, match=r"resume\.safetensors does not fit the model"):
        load_state(tmp_path, other, torch.optim.SGD(other.parameters(), lr=1))


@pytest.fixture(scope="module")
def distilled(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("distilled")
    recipe = tiny_recipe(tiny_images, "train.epochs=2")
    train_teacher(recipe, out / "teacher")
    recipe = tiny_recipe(tiny_images, "train.epochs=2", f"teacher.checkpoint={out / 'teacher' / 'model.safetensors'}")
    train_student(recipe, out, ORIGIN)
    return out


def test_a_distilled_student_records_its_losses_and_its_origin(distilled: Path, tiny_images: Path) -> None:
    written = lines(distilled)
    assert [line["epoch"] for line in written] == [1, 2]
    tags = NAMES - {"loss/penalty"} | {"loss/diffusion"}
    measured = [json.loads(line) for line in (distilled / "diversity.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in measured] == [1, 2]
    assert set(scalars(distilled)) == tags | {"teacher_top1"} | {
        f"diversity/{name}" for name in measured[0] if name != "epoch"
    }
    assert set(written[0]) == tags | {"epoch"}
    trained = open_checkpoint(distilled / "student")
    assert trained.spec.classes == CLASSES
    assert trained.spec.image_size == 16
    provenance = trained.spec.provenance
    assert (provenance["dataset_sha256"], provenance["teacher_sha256"]) == ("d" * 64, "e" * 64)
    assert provenance["metrics"]["top1"] == written[-1]["top1"]
    assert provenance["metrics"]["best_epoch_top1"] == max(line["top1"] for line in written)
    weights = tiny_recipe(tiny_images, f"teacher.checkpoint={distilled / 'teacher' / 'model.safetensors'}")
    assert provenance["metrics"]["teacher_top1"] == evaluate_teacher(weights)
    assert str(tiny_images) not in (distilled / "student" / "student.json").read_text()
    assert str(distilled) not in (distilled / "student" / "student.json").read_text()


def test_a_distilled_student_is_the_trained_one_with_nothing_of_the_distiller(
    distilled: Path, tiny_images: Path
) -> None:
    trained = open_checkpoint(distilled / "student")
    student = load_student(trained)
    state = load_file(distilled / "resume.safetensors")
    assert {name for name in state if name.startswith("task.student.")} == {
        f"task.student.{name}" for name in student.state_dict()
    }
    assert all(torch.equal(value, state[f"task.student.{name}"]) for name, value in student.state_dict().items())
    assert len(list(student.get_submodule("conv2.0.branches").children())) == 4
    assert evaluate_student(tiny_recipe(tiny_images), distilled / "student") == lines(distilled)[-1]["top1"]


def test_nothing_half_written_is_left_behind(distilled: Path) -> None:
    assert sorted(path.name for path in distilled.iterdir()) == [
        "best",
        "curves.png",
        "diversity.jsonl",
        "diversity.png",
        "evaluation.json",
        "inputs.json",
        "metrics.jsonl",
        "resume.safetensors",
        "student",
        "teacher",
        "tensorboard",
    ]
    assert sorted(path.name for path in (distilled / "teacher").iterdir()) == [
        "curves.png",
        "evaluation.json",
        "metrics.jsonl",
        "model.safetensors",
        "resume.safetensors",
        "teacher.json",
        "tensorboard",
    ]
    for name in ("best", "student"):
        assert sorted(path.name for path in (distilled / name).iterdir()) == ["model.safetensors", "student.json"]


def test_the_best_epoch_is_kept_beside_the_last_one(distilled: Path, tiny_images: Path) -> None:
    reached = [line["top1"] for line in lines(distilled)]
    kept = open_checkpoint(distilled / "best").spec.provenance["metrics"]
    assert kept["top1"] == kept["best_epoch_top1"] == max(reached)
    # Of equal epochs the first one.
    assert kept["loss/diffusion"] == lines(distilled)[reached.index(max(reached))]["loss/diffusion"]
    assert evaluate_student(tiny_recipe(tiny_images), distilled / "best") == max(reached)


def test_only_an_epoch_above_all_before_it_is_kept_as_the_best(tmp_path: Path) -> None:
    kept: list[dict[str, float]] = []
    for epochs in (3, 7):
        chosen = settings(epochs=epochs, milestones=(50,), learning_rate=0.3)
        whole = replace(job(tmp_path, linear(), chosen), keep_best=kept.append)
        history = run(whole, make_accelerator(chosen))
    reached = [line["top1"] for line in history]
    firsts = [index for index, value in enumerate(reached) if value > max(reached[:index], default=-1)]
    assert 1 < len(firsts) < len(reached)
    assert kept == [history[index] for index in firsts]


def test_a_student_is_not_evaluated_on_other_classes(distilled: Path, tmp_path: Path, tiny_images: Path) -> None:
    other = tmp_path / "test" / "dog"
    other.mkdir(parents=True)
    (other / "0.png").write_bytes((tiny_images / "test" / "ant" / "0.png").read_bytes())
    with pytest.raises(CheckpointError) as caught:
        evaluate_student(tiny_recipe(tmp_path), distilled / "student")
    assert caught.value.message == (
        f"{distilled / 'student'} was trained for 3 classes, the data set has 1: "
        "only in the checkpoint: ant, bee, cow; only in the data set: dog."
    )


def test_a_teacher_is_not_used_for_classes_of_other_names(distilled: Path, tmp_path: Path, tiny_images: Path) -> None:
    # The same number of classes, so that the weights fit, at other positions: "cow" becomes "aaa", the first one.
    for split in ("train", "test"):
        shutil.copytree(tiny_images / split, tmp_path / split)
        (tmp_path / split / "cow").rename(tmp_path / split / "aaa")
    weights = distilled / "teacher" / "model.safetensors"
    recipe = tiny_recipe(tmp_path, f"teacher.checkpoint={weights}", "teacher.plausibility=required")
    difference = "only in the teacher: cow; only in the data set: aaa"
    for use in (lambda: evaluate_teacher(recipe), lambda: train_student(recipe, tmp_path / "run", ORIGIN)):
        with pytest.raises(CheckpointError, match=difference) as caught:
            use()
        assert caught.value.message.startswith(f"The teacher {weights} was trained for 3 classes, the data set has 3:")


@pytest.mark.parametrize("job", ["train_teacher", "evaluate_teacher"])
def test_a_teacher_is_neither_trained_nor_evaluated_where_a_class_is_missing_from_the_test_split(
    distilled: Path, tmp_path: Path, tiny_images: Path, job: str
) -> None:
    shutil.copytree(tiny_images, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "test" / "ant")
    recipe = tiny_recipe(tmp_path / "data", f"teacher.checkpoint={distilled / 'teacher' / 'model.safetensors'}")
    with pytest.raises(DataError, match=r"different classes: only in train: ant\.\n"):
        train_teacher(recipe, tmp_path / "run") if job == "train_teacher" else evaluate_teacher(recipe)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_called_with_other_data_or_other_teacher_weights(
    distilled: Path, tmp_path: Path, tiny_images: Path
) -> None:
    # The student in the folder says that it was distilled on the data "ddd..." from the teacher "eee...".
    run_folder = tmp_path / "run"
    shutil.copytree(distilled, run_folder)
    before = (run_folder / "student" / "student.json").read_bytes()
    weights = distilled / "teacher" / "model.safetensors"
    recipe = tiny_recipe(tiny_images, "train.epochs=2", f"teacher.checkpoint={weights}")
    with pytest.raises(ConfigError, match=r"belongs to a run with another data set: its sha256 is dddddddddddd\.\.\."):
        distil(recipe, run_folder)
    own = dataset_digest(recipe.data.spec(), tmp_path / "memory")
    (run_folder / "inputs.json").write_text(json.dumps({"dataset_sha256": own}))
    with pytest.raises(ConfigError, match=r"belongs to a run with another teacher: its sha256 is eeeeeeeeeeee\.\.\."):
        distil(recipe, run_folder)
    assert (run_folder / "student" / "student.json").read_bytes() == before


def test_a_teacher_is_not_shared_by_runs_on_different_data(distilled: Path, tmp_path: Path, tiny_images: Path) -> None:
    shutil.copytree(distilled / "teacher", tmp_path / "teacher")
    recipe = tiny_recipe(tiny_images)
    # This teacher does not say what it was trained on, as those of earlier versions.
    assert prepare_teacher(recipe, tmp_path / "teacher", "a" * 64) == tmp_path / "teacher" / "model.safetensors"
    assert prepare_teacher(recipe, tmp_path / "teacher", "a" * 64) is not None
    with pytest.raises(ConfigError, match=f"{tmp_path / 'teacher'} belongs to a run with another data set"):
        prepare_teacher(recipe, tmp_path / "teacher", "b" * 64)


def test_the_command_teacher_does_not_continue_on_other_data(tiny_images: Path, tmp_path: Path) -> None:
    out = tmp_path / "teacher"
    claim_input(out, "dataset_sha256", "a" * 64, "elsewhere")
    command = ["teacher", *arguments(tiny_images, out)[1:]]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, ConfigError)
    assert "belongs to a run with another data set" in result.exception.message
    assert "36 training and 18 test images, 3 classes, 0 files ignored" in result.stderr
    assert not (out / "metrics.jsonl").exists()


def test_a_run_folder_of_another_recipe_is_refused_and_left_alone(tiny_images: Path, tmp_path: Path) -> None:
    runner, folder = CliRunner(), tmp_path / "run"
    first = runner.invoke(app, arguments(tiny_images, folder))
    assert first.exit_code == 0, first.output
    record = (folder / "recipe.json").read_bytes()
    second = runner.invoke(app, arguments(tiny_images, folder, "train.seed=1"))
    assert isinstance(second.exception, ConfigError)
    assert str(second.exception).startswith(
        f"{folder} belongs to another run: train.seed is 0 there and 1 in this run.\n"
        "Pass another --out, or remove the folder."
    )
    assert (folder / "recipe.json").read_bytes() == record


def test_a_command_that_trained_nothing_leaves_its_folder_to_another_recipe(tiny_images: Path, tmp_path: Path) -> None:
    # Weights of another network, which is noticed when they are loaded.
    torch.save({"other": torch.zeros(2)}, tmp_path / "other.pt")
    runner, folder, other = CliRunner(), tmp_path / "run", f"teacher.checkpoint={tmp_path / 'other.pt'}"
    for more in ([other], [other, "train.seed=1"]):
        assert isinstance(runner.invoke(app, arguments(tiny_images, folder, *more)).exception, CheckpointError)
        assert not (folder / "recipe.json").exists()


def wait_for_change(path: Path, before: int, process_is_alive: object) -> None:
    """Return when ``path`` was replaced, or the process has ended."""
    assert callable(process_is_alive)
    while process_is_alive() and modified(path) == before:
        time.sleep(0.002)


def modified(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def test_a_run_killed_at_random_moments_ends_with_the_bits_of_an_uninterrupted_one(
    tiny_images: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert CliRunner().invoke(app, arguments(tiny_images, whole)).exit_code == 0
    moments = random.Random(20240324)
    # First in the teacher's training, then after an epoch that was kept, at any point of the next one.
    watched = [killed / "recipe.json", *[killed / "resume.safetensors"] * 2]
    kills, told = 0, ""
    for path in watched:
        before = modified(path)
        process = start(["-m", "training", *arguments(tiny_images, killed)], OMP_NUM_THREADS="1")
        wait_for_change(path, before, lambda child=process: child.poll() is None)
        time.sleep(moments.uniform(0, 0.3))
        os.killpg(process.pid, signal.SIGKILL)
        told += process.communicate()[1]
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 2
    done = CliRunner().invoke(app, arguments(tiny_images, killed))
    assert done.exit_code == 0
    assert "continuing after epoch" in told + done.stderr
    for name in ("teacher/model.safetensors", "student/model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    timeless = [[{**line, "images_per_s": 0.0} for line in lines(folder)] for folder in (whole, killed)]
    assert timeless[0] == timeless[1]
    assert [step for step, _ in scalars(killed)["loss/diffusion"]] == [1, 2, 3, 4]
    assert not list(killed.rglob("*.partial*"))

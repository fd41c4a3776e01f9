import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kdexport.checkpoint import load_student, open_checkpoint
from tests.training.tiny import arguments, finish, start, tiny_recipe
from training.train import evaluate_student

SCRIPT = str(Path(__file__).with_name("rank_run.py"))
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def lines(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def is_statistic(name: str) -> bool:
    return name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")


def weights(directory: Path, rank: int) -> dict[str, Tensor]:
    tensors = load_file(directory / f"rank{rank}.safetensors")
    return {name: tensor for name, tensor in tensors.items() if not is_statistic(name)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training by one process and by two, of a network without batch norm and of one with it."""
    root = tmp_path_factory.mktemp("ranks")
    finish(start([SCRIPT, str(root / "one")], OMP_NUM_THREADS="1"))
    finish(start([*TWO, SCRIPT, str(root / "two")], OMP_NUM_THREADS="1"))
    return root


def test_two_processes_walk_the_loss_curve_of_one_with_the_same_global_batch(runs: Path) -> None:
    alone, together = lines(runs / "one" / "plain"), lines(runs / "two" / "plain")
    assert len(alone) == len(together) == 3
    for one, two in zip(alone, together, strict=True):
        assert two["loss/cross_entropy"] == pytest.approx(one["loss/cross_entropy"], rel=1e-5)
        assert (two["lr"], two["top1"]) == (one["lr"], one["top1"])
    expected = weights(runs / "one" / "plain", 0)
    for name, tensor in weights(runs / "two" / "plain", 0).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "batchnorm"])
def test_all_processes_end_with_identical_weights(kind: str, runs: Path) -> None:
    first, second = (weights(runs / "two" / kind, rank) for rank in (0, 1))
    assert first.keys() == second.keys()
    assert [name for name, tensor in first.items() if not torch.equal(tensor, second[name])] == []
    alone = weights(runs / "one" / kind, 0)
    assert first.keys() == alone.keys()
    # Otherwise the second process would not have taken part.
    assert any(not torch.equal(tensor, alone[name]) for name, tensor in first.items())


@pytest.mark.parametrize("kind", ["plain", "batchnorm"])
def test_the_state_on_disk_is_that_of_the_first_process(kind: str, runs: Path) -> None:
    folder = runs / "two" / kind
    assert len(list(folder.glob("rank*.safetensors"))) == 2
    state, own = load_file(folder / "resume.safetensors"), load_file(folder / "rank0.safetensors")
    kept = {name.removeprefix("task.network."): value for name, value in state.items() if name.startswith("task.")}
    assert kept.keys() == own.keys()
    assert all(torch.equal(value, own[name]) for name, value in kept.items())
    assert [line["epoch"] for line in lines(folder)] == [1, 2, 3]


def test_two_processes_distil_a_student_together_and_one_of_them_writes(tiny_images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [*TWO, "-m", "training", *arguments(tiny_images, out, "train.epochs=2")]
    printed, told = finish(start(command, OMP_NUM_THREADS="1"))
    (result,) = [json.loads(line) for line in printed.splitlines()]
    written = lines(out)
    assert [line["epoch"] for line in written] == [1, 2]
    assert all(result[key] == value for key, value in written[-1].items() if key != "epoch")
    assert told.count("student mobilenetv2: epoch 1/2") == 1
    assert told.count("teacher resnet8: epoch 1/1") == 1
    assert sorted(path.name for path in out.iterdir()) == [
        "dataset",
        "environment.json",
        "metrics.jsonl",
        "recipe.json",
        "resume.safetensors",
        "student",
        "teacher",
        "tensorboard",
    ]
    trained = open_checkpoint(out / "student")
    state = load_file(out / "resume.safetensors")
    for name, value in load_student(trained).state_dict().items():
        assert torch.equal(value, state[f"task.student.{name}"])
    assert evaluate_student(tiny_recipe(tiny_images), out / "student") == result["top1"]
    assert not list(out.rglob("*.partial"))
    # A second call finds everything done and changes nothing.
    before = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    again, _ = finish(start(command, OMP_NUM_THREADS="1"))
    assert json.loads(again)["top1"] == result["top1"]
    assert {path: path.read_bytes() for path in out.rglob("*.safetensors")} == before

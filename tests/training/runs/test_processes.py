import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from kdexport.checkpoint import load_student, open_checkpoint
from kdexport.data.datasets import open_dataset
from tests.processes import is_running, wait_until
from tests.training.runs.several_processes import KINDS, everything
from tests.training.small_runs import arguments, finish, start, tiny_recipe
from training.__main__ import app
from training.data import training_batches
from training.recipe import Recipe
from training.runs.task import FrozenTeacher
from training.teachers import TEACHERS
from training.teachers.teacher import load_teacher_weights
from training.train import evaluate_student

SCRIPT = str(Path(__file__).with_name("several_processes.py"))
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def lines(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def is_statistic(name: str) -> bool:
    return name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")


def tensors(directory: Path, rank: int) -> dict[str, Tensor]:
    """The task of one process at the end of its run."""
    return load_file(directory / f"rank{rank}.safetensors")


@dataclass(frozen=True)
class CommandOutput:
    """What two processes wrote to both streams while they ran the command ``train`` in ``folder``."""

    folder: Path
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path) -> CommandOutput:
    """Two processes train some networks, then one by the command line."""
    root = tmp_path_factory.mktemp("ranks")
    command = arguments(tiny_images, root / "run", "train.epochs=2")
    return CommandOutput(root / "run", *finish(start([*TWO, SCRIPT, str(root / "two"), *command], OMP_NUM_THREADS="1")))


@pytest.fixture(scope="module")
def runs(together: CommandOutput) -> Path:
    """The same trainings by one process and by two, of networks without batch norm and of one with it."""
    everything(together.folder.parent / "one")
    return together.folder.parent


@pytest.mark.parametrize("kind", ["plain", "kd", "crd"])
def test_two_processes_have_the_loss_curve_of_one_with_the_same_global_batch(kind: str, runs: Path) -> None:
    alone, shared = lines(runs / "one" / kind), lines(runs / "two" / kind)
    assert len(alone) == len(shared) == 3
    for one, two in zip(alone, shared, strict=True):
        assert one.keys() == two.keys()
        assert "loss/cross_entropy" in one
        assert ("loss/" + kind in one) == (kind != "plain")
        for name in one:
            if name.startswith("loss/"):
                assert two[name] == pytest.approx(one[name], rel=1e-5)
        assert (two["lr"], two["top1"]) == (one["lr"], one["top1"])
    expected, reached = tensors(runs / "one" / kind, 0), tensors(runs / "two" / kind, 0)
    assert expected.keys() == reached.keys()
    for name, tensor in reached.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_all_processes_end_with_identical_weights_and_memories(kind: str, runs: Path) -> None:
    first, second = (tensors(runs / "two" / kind, rank) for rank in (0, 1))
    assert first.keys() == second.keys()
    unlike = {name for name, tensor in first.items() if not torch.equal(tensor, second[name])}
    # Statistics of batch norms are of the images that a process has seen.
    assert unlike <= {name for name in first if is_statistic(name)}
    assert bool(unlike) == (kind == "batchnorm")
    memories = {name for name in first if ".memory." in name}
    assert bool(memories) == (kind == "crd")
    # Otherwise the second process would not have taken part.
    alone = tensors(runs / "one" / kind, 0)
    assert any(not torch.equal(first[name], alone[name]) for name in first if not is_statistic(name))


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_on_disk_is_that_of_the_first_process(kind: str, runs: Path) -> None:
    folder = runs / "two" / kind
    assert len(list(folder.glob("rank*.safetensors"))) == 2
    state, own = load_file(folder / "resume.safetensors"), tensors(folder, 0)
    kept = {name.removeprefix("task."): value for name, value in state.items() if name.startswith("task.")}
    assert kept.keys() == own.keys()
    assert all(torch.equal(value, own[name]) for name, value in kept.items())
    assert [line["epoch"] for line in lines(folder)] == [1, 2, 3]


def test_a_batch_that_the_processes_cannot_share_evenly_is_refused(runs: Path) -> None:
    assert (runs / "one" / "uneven").read_text() == "accepted"
    assert (runs / "two" / "uneven").read_text() == (
        "train.batch_size = 9 cannot be divided evenly among 2 processes.\n"
        "Set train.batch_size=8, or start a number of processes that divides 9."
    )


#: A program of several processes: each writes its process id to a file and waits.
WAITING = """
import os, time
from pathlib import Path
from kdexport.core.console import guarded

def app():
    partial = Path(os.environ["PLACES"], "partial" + os.environ["RANK"])
    partial.write_text(str(os.getpid()))
    partial.rename(partial.with_name("rank" + os.environ["RANK"]))
    time.sleep(200)

guarded(app)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a process learns of its parent's death on Linux")
def test_processes_end_when_the_command_that_started_them_is_killed(tmp_path: Path) -> None:
    (tmp_path / "waiting.py").write_text(WAITING)
    code = "from kdexport.core.child import call_together; call_together('waiting', [], 2)"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = start(["-c", code], PYTHONPATH=path, PYTHONSAFEPATH="1", PLACES=str(tmp_path))
    ranks = [tmp_path / "rank0", tmp_path / "rank1"]
    wait_until(lambda: all(rank.exists() for rank in ranks) or command.poll() is not None, 120)
    pids = [int(rank.read_text()) for rank in ranks]
    assert all(is_running(pid) for pid in pids)
    command.kill()
    try:
        wait_until(lambda: not any(is_running(pid) for pid in pids), 10)
    finally:
        for pid in filter(is_running, pids):
            os.kill(pid, signal.SIGKILL)
        command.communicate()


def teacher_mean(recipe: Recipe, out: Path) -> Tensor:
    """Means of the channels (1,C,1,1) that a teacher writes for the images of all processes."""
    train = open_dataset(recipe.data.spec(), "train")
    device, batch_size = torch.device("cpu"), recipe.train.batch_size
    batches = training_batches(train, recipe.data, batch_size=batch_size, seed=recipe.train.seed, device=device)
    network = TEACHERS.build("resnet8", num_classes=3, image_size=16)
    load_teacher_weights(network, out / "teacher" / "model.safetensors")
    frozen = FrozenTeacher(network, device, None)
    features = torch.cat([frozen(batch.images).features["stage3"].double() for batch in batches.epoch(0)])
    return features.mean((0, 2, 3), keepdim=True)


def test_two_processes_distil_a_student_together_and_one_of_them_writes(
    tiny_images: Path, together: CommandOutput
) -> None:
    out, told = together.folder, together.stderr
    (result,) = [json.loads(line) for line in together.stdout.splitlines()]
    written = lines(out)
    assert [line["epoch"] for line in written] == [1, 2]
    assert all(result[key] == value for key, value in written[-1].items() if key != "epoch")
    assert told.count("student mobilenetv2: epoch 1/2") == 1
    assert told.count("teacher resnet8: epoch 1/1") == 1
    assert sorted(path.name for path in out.iterdir()) == [
        "best",
        "curves.png",
        "dataset",
        "diversity.jsonl",
        "diversity.png",
        "environment.json",
        "evaluation.json",
        "inputs.json",
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
    recipe = tiny_recipe(tiny_images)
    assert evaluate_student(recipe, out / "student") == result["top1"]
    kept = {name: value for name, value in state.items() if name.endswith("teacher_mean")}
    (mean,) = kept.values()
    torch.testing.assert_close(mean.double(), teacher_mean(recipe, out), rtol=1e-4, atol=1e-6)
    assert not list(out.rglob("*.partial*"))
    # A second call, by one process, finds everything done and changes nothing.
    before = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    again = CliRunner().invoke(app, arguments(tiny_images, out, "train.epochs=2"))
    assert json.loads(again.stdout)["top1"] == result["top1"]
    assert {path: path.read_bytes() for path in out.rglob("*.safetensors")} == before

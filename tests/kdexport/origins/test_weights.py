"""Files of weights as training codes write them: read, unwrapped and loaded to the last tensor, or refused."""

import argparse
import collections
import contextlib
import copy
import datetime
import os
import pickle
import struct
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kdexport.core.digests import sha256_bytes
from kdexport.errors import CheckpointError
from kdexport.origins.weights import Head, Weights, load_weights, read_weights

State = dict[str, Tensor]
Change = Callable[[Tensor], Tensor]


class Network(nn.Module):
    """Two convolutions, batch norms inside of a list, and a classifier."""

    def __init__(self, classes: int = 5, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layers = nn.Sequential(nn.Conv2d(width, 6, 1), nn.BatchNorm2d(6), nn.Sequential(nn.Conv2d(6, 6, 1)))
        self.register_buffer("index", torch.arange(4), persistent=False)
        self.fc = nn.Linear(6, classes)


def trained(seed: int = 1, classes: int = 5) -> State:
    """A state_dict of hostile values, in the order and with the names of ``Network``."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (4, 3, 3, 3)}
    shapes |= {f"bn1.{part}": (4,) for part in ("weight", "bias", "running_mean", "running_var")}
    shapes |= {"bn1.num_batches_tracked": (), "layers.0.weight": (6, 4, 1, 1), "layers.0.bias": (6,)}
    shapes |= {f"layers.1.{part}": (6,) for part in ("weight", "bias", "running_mean", "running_var")}
    shapes |= {"layers.1.num_batches_tracked": (), "layers.2.0.weight": (6, 6, 1, 1), "layers.2.0.bias": (6,)}
    shapes |= {"fc.weight": (classes, 6), "fc.bias": (classes,)}
    return {
        name: torch.rand(shape, generator=generator) * 3 + 0.25 if shape else torch.tensor(1_234 + seed)
        for name, shape in shapes.items()
    }


def prefixed(prefix: str, tensors: State | None = None) -> State:
    return {prefix + name: tensor for name, tensor in (tensors or trained()).items()}


def saved(content: object, path: Path, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def load(path: Path, module: nn.Module | None = None, head: Head = "strict") -> tuple[State, tuple[str, ...]]:
    """What is in the network after the file was loaded, and all notes."""
    module = module or Network()
    weights = read_weights(path)
    return dict(module.state_dict()), (*weights.notes, *load_weights(module, weights, path.name, head=head))


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def refused(path: Path, module: nn.Module | None = None, head: Head = "strict") -> CheckpointError:
    """The error of a file, which must leave the network as it was."""
    module = module or Network()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(CheckpointError) as caught:
        load(path, module, head)
    assert equal(before, dict(module.state_dict()))
    assert caught.value.exit_code == 2
    assert path.name in caught.value.message
    return caught.value


# --- files that load -------------------------------------------------------------------------------------------------

PLACES: dict[str, tuple[object, str]] = {
    "plain": (trained(), ""),
    "state_dict": ({"state_dict": trained(), "epoch": 3, "arch": "net"}, "weights taken from 'state_dict'"),
    "numpy": ({"model": trained(), "best_acc": np.float64(72.3)}, "weights taken from 'model'"),
    "namespace": ({"net": trained(), "args": argparse.Namespace(lr=0.1)}, "weights taken from 'net'"),
    "model_state": ({"model_state": trained()}, "weights taken from 'model_state'"),
    "two levels": ({"model": {"state_dict": trained()}}, "weights taken from 'model/state_dict'"),
    "bytes": ({b"state_dict": {name.encode(): tensor for name, tensor in trained().items()}}, "'state_dict'"),
    "parameters": (
        {"params": {n: nn.Parameter(t) if t.is_floating_point() else t for n, t in trained().items()}},
        "weights taken from 'params'",
    ),
    "raw and averaged": (
        {"state_dict_ema": trained(2), "state_dict": trained(), "optimizer": {"state": {0: torch.ones(2)}}},
        "weights taken from 'state_dict'; weights under 'state_dict_ema' not used",
    ),
    "averaged only": ({"ema": {"shadow": trained(), "decay": 0.9}}, "from 'ema/shadow' (averaged weights, EMA)"),
    "teacher too": ({"teacher": trained(2), "student": trained()}, "weights taken from 'student'; not read: 'teacher'"),
    "parallel": ({"state_dict": prefixed("module.")}, "prefix 'module.' removed"),
    "parallel twice": (prefixed("module.module."), "prefix 'module.module.' removed"),
    "compiled": (prefixed("_orig_mod.module."), "prefix '_orig_mod.module.' removed"),
    "any order": (prefixed("model.module._orig_mod.net.backbone."), "'model.module._orig_mod.net.backbone.' removed"),
    "sharded": (prefixed("_fsdp_wrapped_module."), "prefix '_fsdp_wrapped_module.' removed"),
    "averaged model": (
        {**prefixed("module."), "n_averaged": torch.tensor(7)},
        "prefix 'module.' removed; 1 other tensor not used: 'n_averaged'",
    ),
    "lightning": (
        {
            "state_dict": {**prefixed("teacher.", trained(2)), **prefixed("model."), "criterion.weight": torch.ones(5)},
            "callbacks": {"ModelCheckpoint": {"best": torch.tensor(0.7)}},
            "hyper_parameters": {"lr": np.float32(0.1)},
        },
        "prefix 'model.' removed; 18 other tensors not used: 'teacher.conv1.weight'",
    ),
    "raw prefix": ({**prefixed("ema.", trained(2)), **prefixed("model.")}, "prefix 'model.' removed"),
    "momentum": (
        {"initted": torch.tensor(1), **prefixed("ema_model.", trained(2)), **prefixed("online_model.")},
        "prefix 'online_model.' removed",
    ),
    "own name": ({"mine": trained(), "other": {"x": torch.ones(2)}, "acc": torch.tensor(1.0)}, "prefix 'mine.'"),
    "optimizer with copies": ({"mine": trained(), "optimizer": {"copy": trained(2)}}, "prefix 'mine.' removed"),
    "by module": ({"a": {"net": prefixed("b.")}, "epoch": torch.tensor(3)}, "prefix 'a.net.b.' removed"),
    "wrapped layers": (
        {n.replace("layers.", "layers.module.").replace("conv1", "conv1._orig_mod"): t for n, t in trained().items()},
        "'_orig_mod', 'module' within names removed",
    ),
    "profiled": (
        {**trained(), "total_ops": torch.ones(1), "conv1.total_params": torch.ones(1)},
        "2 other tensors not used: 'total_ops', 'conv1.total_params'",
    ),
    "averaged without a prefix": (
        {**trained(), "n_averaged": torch.tensor(7)},
        "1 other tensor not used: 'n_averaged'",
    ),
    "statistics beside": ({**trained(), "normalize": {"mean": torch.ones(3)}}, "not read: 'normalize'"),
    "other classes beside": (
        {**prefixed("model.", trained(2, classes=9)), **prefixed("head5.")},
        "prefix 'head5.' removed; 17 other tensors not used: 'model.conv1.weight'",
    ),
    "table of indices": ({**trained(), "index": torch.arange(4)}, "1 other tensor not used: 'index'"),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_the_weights_are_found_wherever_a_training_code_puts_them(place: str, legacy: bool, tmp_path: Path) -> None:
    content, note = PLACES[place]
    path = saved(content, tmp_path / "any.pth.tar", _use_new_zipfile_serialization=not legacy)
    state, notes = load(path)
    assert equal(state, trained())
    assert note in "; ".join(notes)
    assert bool(note) == bool(notes)


def test_safetensors_load_with_a_prefix_and_the_digest_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "parallel.safetensors"
    save_file(prefixed("module."), path)
    weights = read_weights(path)
    assert weights.sha256 == sha256_bytes(path.read_bytes())
    assert (weights.notes, set(weights.tensors)) == ((), set(prefixed("module.")))
    state, notes = load(path)
    assert (equal(state, trained()), notes) == (True, ("prefix 'module.' removed",))


@pytest.mark.parametrize(("name", "as_safetensors"), [("weights.safetensors", False), ("weights.pt", True)])
def test_the_content_of_a_file_decides_and_not_its_name(name: str, as_safetensors: bool, tmp_path: Path) -> None:
    path = tmp_path / name
    if as_safetensors:
        save_file(trained(), path)
    else:
        saved(trained(), path)
    state, notes = load(path)
    assert (equal(state, trained()), notes) == (True, ())


@pytest.mark.parametrize("legacy", [False, True])
def test_what_people_store_beside_the_weights_is_harmless(legacy: bool, tmp_path: Path) -> None:
    model: dict[str, Any] = collections.defaultdict(list, trained())
    content = {
        "model": model,
        "meters": collections.defaultdict(list, {"top1": [1.0, np.float32(2)]}),
        "tables": [
            collections.defaultdict(dict, {"a": {}}),
            collections.defaultdict(int),
            collections.OrderedDict(a=1),
        ],
        "last": collections.deque([1, 2], maxlen=3),
        "counts": collections.Counter("aab"),
        "args": argparse.Namespace(root=Path("a/b"), nested=argparse.Namespace(x={1, 2}), sizes=frozenset([3])),
        "made": [datetime.datetime.now(tz=datetime.UTC), datetime.timedelta(1), uuid.uuid4(), torch.__version__],
        "rng": [np.random.get_state(), np.random.default_rng(0), np.random.RandomState(0), torch.get_rng_state()],
        "numbers": [np.int64(3), np.bool_(True), np.arange(4.0), np.dtype("f4"), 10**30, 2j, slice(1, 2), range(3)],
        "other": [torch.float16, torch.device("cuda:1"), torch.Size([2]), None, b"bytes", bytearray(b"x"), ("t", True)],
    }
    path = saved(content, tmp_path / "inert.pt", _use_new_zipfile_serialization=not legacy)
    state, notes = load(path)
    assert equal(state, trained())
    assert notes[1].startswith("not read: 'meters', 'tables', 'last' and 6 more")


def test_reading_leaves_the_allow_list_of_torch_as_it_was(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    read_weights(saved({"model": trained(), "args": argparse.Namespace()}, tmp_path / "a.pt"))
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float16, 11), (torch.bfloat16, 8), (torch.float64, 24)])
def test_another_floating_type_is_cast_and_reported(dtype: torch.dtype, exact: int, tmp_path: Path) -> None:
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in trained().items()}
    state, notes = load(saved(cast, tmp_path / "cast.pt"))
    assert notes == (f"15 tensors cast from {str(dtype).removeprefix('torch.')} to float32",)
    for name, tensor in trained().items():
        assert state[name].dtype == tensor.dtype
        assert ((state[name] - tensor).abs() <= tensor.abs() * 2.0**-exact).all()


def test_counters_of_batches_that_were_cast_come_back_whole(tmp_path: Path) -> None:
    halves = {name: tensor.half() for name, tensor in trained().items()}
    halves["bn1.num_batches_tracked"] = torch.tensor(100_000).half()
    state, notes = load(saved(halves, tmp_path / "half.pt"))
    assert (int(state["bn1.num_batches_tracked"]), int(state["layers.1.num_batches_tracked"])) == (0, 1_235)
    assert "1 num_batches_tracked missing or rounded in the file: those of the network stay" in notes


def test_files_from_before_counters_of_batches_load(tmp_path: Path) -> None:
    old = {name: tensor for name, tensor in trained().items() if not name.endswith("num_batches_tracked")}
    state, notes = load(saved(old, tmp_path / "old.pt"))
    assert notes == ("2 num_batches_tracked missing or rounded in the file: those of the network stay",)
    assert all(torch.equal(state[name], tensor) for name, tensor in old.items())
    assert int(state["bn1.num_batches_tracked"]) == 0


def test_views_of_one_storage_load_as_their_parts(tmp_path: Path) -> None:
    tensors = trained()
    store = torch.full((2, 100), -7.0)
    store[1, 3:9] = tensors["layers.0.bias"]
    tensors["layers.0.bias"] = store[1, 3:9]
    store_t = torch.empty(6, 5)
    store_t.copy_(tensors["fc.weight"].T)
    tensors["fc.weight"] = store_t.T
    state, _ = load(saved(tensors, tmp_path / "views.pt"))
    assert equal(state, trained())


def test_tensors_without_elements_load(tmp_path: Path) -> None:
    module = nn.ParameterDict({"none": nn.Parameter(torch.empty(0, 3)), "one": nn.Parameter(torch.zeros(1))})
    path = saved({"none": torch.empty(0, 3), "one": torch.ones(1)}, tmp_path / "none.pt")
    assert load(path, module)[1] == ()
    assert module["one"].tolist() == [1]


# --- tied weights ----------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("missing", ["", "first.weight", "second.weight"])
def test_tied_weights_may_be_stored_once_or_twice(missing: str, tmp_path: Path) -> None:
    weight = torch.rand(3, 3)
    tensors = {"first.weight": weight, "second.weight": weight, "first.bias": weight[0], "second.bias": weight[1]}
    tensors.pop(missing, None)
    module = Tied()
    load(saved(tensors, tmp_path / "tied.pt"), module)
    assert torch.equal(module.first.weight, weight)
    assert module.second.weight is module.first.weight


def test_tied_weights_that_differ_in_the_file_are_refused(tmp_path: Path) -> None:
    tensors = {
        f"{layer}.{part}": torch.rand(3, 3)[..., 0 if part == "bias" else slice(None)]
        for layer in ("first", "second")
        for part in ("weight", "bias")
    }
    error = refused(saved(tensors, tmp_path / "untied.pt"), Tied())
    assert "'first.weight', 'second.weight' are one tensor in the network, and differ in the file" in error.message


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.to_sparse(),
        lambda t: t.to("meta"),
        lambda t: t[:1],
        lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    ],
)
def test_tensors_that_cannot_be_compared_are_refused(change: Change, tmp_path: Path) -> None:
    index = saved({**trained(), "index": change(torch.arange(4))}, tmp_path / "index.pt")
    assert "1 tensor unknown: 'index'" in refused(index).message
    weight = torch.rand(3, 3)
    tensors = {"first.weight": weight, "second.weight": change(weight), "first.bias": weight[0]}
    tied = saved({**tensors, "second.bias": weight[1]}, tmp_path / "tied.pt")
    assert "tied.pt" in refused(tied, Tied()).message


# --- the network and the file differ ---------------------------------------------------------------------------------


def test_missing_unknown_and_misshapen_tensors_are_counted_and_named(tmp_path: Path) -> None:
    tensors = trained()
    tensors["conv1.wieght"] = tensors.pop("conv1.weight")
    tensors["layers.0.bias"] = torch.ones(7)
    error = refused(saved({"model": prefixed("module.", tensors)}, tmp_path / "odd.pt"))
    assert error.message == (
        "odd.pt (weights taken from 'model') does not fit the network: 1 tensor missing: 'conv1.weight'; 1 tensor "
        "unknown: 'conv1.wieght'; 1 tensor of another shape: 'layers.0.bias' is (7,), not (6,); 'conv1.wieght' is "
        "nearest to the missing 'conv1.weight'."
    )


@pytest.mark.parametrize("head", ["strict", "fresh"])
def test_one_tensor_too_few_or_too_many_is_refused(head: Head, tmp_path: Path) -> None:
    tensors = trained()
    value = tensors.pop("layers.0.bias")
    error = refused(saved(tensors, tmp_path / "few.pt"), head=head)
    assert "1 tensor missing: 'layers.0.bias'" in error.message
    error = refused(saved({**tensors, "layers.0.bias": value, "layers.0.gain": value}, tmp_path / "many.pt"), head=head)
    assert "1 tensor unknown: 'layers.0.gain'" in error.message


def test_a_table_of_indices_with_other_values_is_refused(tmp_path: Path) -> None:
    error = refused(saved({**trained(), "index": torch.arange(4) + 1}, tmp_path / "index.pt"))
    assert "1 tensor unknown: 'index'" in error.message


def test_a_network_of_another_width_is_not_taken_for_another_classifier(tmp_path: Path) -> None:
    error = refused(saved(trained(), tmp_path / "wide.pt"), Network(width=8), head="fresh")
    assert "tensors of another shape: 'conv1.weight' is (4, 3, 3, 3), not (8, 3, 3, 3)" in error.message


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_classifier_of_other_classes_is_named_or_left_fresh(prefix: str, tmp_path: Path) -> None:
    path = saved({"state_dict": prefixed(prefix, trained(classes=1_000))}, tmp_path / "imagenet.pth")
    error = refused(path)
    assert "the file's classifier fc.weight has 1000 outputs, the network 5" in error.message
    module = Network()
    own = module.fc.weight.detach().clone()
    state, notes = load(path, module, "fresh")
    assert notes[-1] == "the file's classifier fc.weight has 1000 outputs, the network 5; the network keeps its own"
    assert torch.equal(state["fc.weight"], own)
    assert torch.equal(state["layers.2.0.bias"], trained(classes=1_000)["layers.2.0.bias"])


@pytest.mark.parametrize(
    "shapes",
    [
        {"fc.weight": (7, 8), "fc.bias": (7,)},
        {"fc.weight": (5, 8)},
        {"layers.2.0.weight": (7, 6, 1, 1), "layers.2.0.bias": (7,)},
        {"fc.weight": (7, 6), "fc.bias": (8,)},
    ],
)
def test_a_layer_that_differs_in_more_than_its_classes_is_refused(
    shapes: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    tensors = {**trained(), **{name: torch.ones(shape) for name, shape in shapes.items()}}
    error = refused(saved(tensors, tmp_path / "other.pt"), head="fresh")
    assert f"of another shape: {next(iter(shapes))!r} is {next(iter(shapes.values()))}, not" in error.message


def test_a_layer_that_is_stored_with_and_without_its_wrapper_is_refused(tmp_path: Path) -> None:
    tensors = {name.replace("layers.", "layers.module."): tensor for name, tensor in trained().items()}
    error = refused(saved({**tensors, "layers.0.bias": torch.ones(6)}, tmp_path / "both.pt"))
    assert "tensors unknown: 'layers.module.0.weight'" in error.message


def test_a_file_without_a_classifier_is_named_or_left_fresh(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in trained().items() if not name.startswith("fc.")}
    path = saved(tensors, tmp_path / "features.pth")
    assert "the file has no 'fc.weight', 'fc.bias'" in refused(path).message
    module = Network()
    own = module.fc.weight.detach().clone()
    state, notes = load(path, module, "fresh")
    assert notes == ("the file has no 'fc.weight', 'fc.bias'; the network keeps its own",)
    assert torch.equal(state["fc.weight"], own)
    assert torch.equal(state["conv1.weight"], tensors["conv1.weight"])


def test_a_file_that_holds_the_network_twice_is_refused(tmp_path: Path) -> None:
    error = refused(saved({**prefixed("left."), **prefixed("right.", trained(2))}, tmp_path / "twins.pt"))
    assert "holds the tensors of this network 2 times: 'left.*', 'right.*'" in error.message


def test_weights_that_only_a_teacher_has_are_taken_and_reported(tmp_path: Path) -> None:
    student = prefixed("student.", {"conv1.weight": torch.ones(1)})
    state, notes = load(saved({"state_dict": {**student, **prefixed("teacher.")}}, tmp_path / "kd.ckpt"))
    assert equal(state, trained())
    assert "prefix 'teacher.' removed" in notes


def test_names_that_only_start_alike_are_not_a_prefix(tmp_path: Path) -> None:
    tensors = prefixed("module.")
    tensors["conv1.weight"] = tensors.pop("module.conv1.weight")
    error = refused(saved(tensors, tmp_path / "mixed.pt"))
    assert "1 tensor missing: 'conv1.weight'" in error.message


# --- values ----------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[Change, str]] = {
    "sparse": (lambda t: t.to_sparse(), "is stored in the sparse layout sparse_coo"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "is quantized (qint8)"),
    "meta": (lambda t: t.to("meta"), "has a shape but no values"),
    "complex": (lambda t: t.to(torch.complex64), "is complex64, and that of the network is float32"),
    "integer": (lambda t: t.to(torch.int8), "is int8, and that of the network is float32"),
    "bool": (lambda t: t > 1, "is bool, and that of the network is float32"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "is float8_e4m3fn, and that of the network is float32"),
    "nan": (lambda t: t.index_fill(0, torch.tensor([1]), float("nan")), "NaN or infinite values in 1 of 17 tensors"),
    "infinite": (lambda t: t.index_fill(0, torch.tensor([1]), float("-inf")), "NaN or infinite values in 1 of 17"),
    "overflow": (lambda t: t.double() * -1e300, "in 'layers.1.weight', more than float32 can hold"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_values_that_cannot_be_those_of_the_network_are_refused(kind: str, tmp_path: Path) -> None:
    change, text = KINDS[kind]
    tensors = trained()
    tensors["layers.1.weight"] = change(tensors["layers.1.weight"])
    error = refused(saved(tensors, tmp_path / "odd.pt"))
    assert text in error.message
    assert "'layers.1.weight'" in error.message


def test_a_negative_variance_is_refused(tmp_path: Path) -> None:
    tensors = trained()
    tensors["bn1.running_var"][2] = -0.5
    error = refused(saved(tensors, tmp_path / "variance.pt"))
    assert "a negative variance (-0.5) in 'bn1.running_var'" in error.message


def test_values_of_another_module_are_not_checked(tmp_path: Path) -> None:
    tensors = {**prefixed("model."), "loss.weight": torch.tensor(float("nan"))}
    assert equal(load(saved(tensors, tmp_path / "loss.ckpt"))[0], trained())


# --- files that are not tensors --------------------------------------------------------------------------------------


class Trap:
    """Pickles to a call that creates a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("how", ["zip", "legacy", "plain", "protocol 4"])
def test_code_in_a_file_never_runs(beside: bool, how: str, tmp_path: Path) -> None:
    sprung, path = tmp_path / "sprung", tmp_path / "trap.safetensors"
    content: object = {"model": trained(), "args": Trap(sprung)} if beside else Trap(sprung)
    if how == "plain":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        protocol = 4 if how == "protocol 4" else 2
        saved(content, path, _use_new_zipfile_serialization=how != "legacy", pickle_protocol=protocol)
    error = refused(path)
    assert not sprung.exists()
    assert "Code of a file is never run" in error.remedy or "protocol 4" in error.message
    # The file does run its code where it is loaded without protection.
    pickle.loads(path.read_bytes()) if how == "plain" else torch.load(
        path.rename(tmp_path / "t.pt"), weights_only=False
    )
    assert sprung.exists()


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: {"model": net, "epoch": 3}])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_whole_pickled_network_is_named_as_such(wrap: Any, legacy: bool, tmp_path: Path) -> None:
    path = saved(wrap(Network()), tmp_path / "whole.pt", _use_new_zipfile_serialization=not legacy)
    error = refused(path)
    assert "contains pickled modules, which are code" in error.message
    assert f"{__name__}.Network" in error.message
    assert "torch.save(model.state_dict(), 'weights.pt')" in error.remedy


def itself() -> dict[str, object]:
    content: dict[str, object] = {"t": torch.ones(2)}
    content["model"] = content
    return content


def wide_itself() -> dict[str, object]:
    content: dict[str, object] = {"x": torch.ones(2)}
    content.update({f"part{index}": content for index in range(40)})
    return content


OTHERS: dict[str, tuple[object, str]] = {
    "nothing": ({}, "contains no named tensors"),
    "no tensors": ({"epoch": 3, "model": {"name": "net"}}, "contains no named tensors (no state_dict); it has 'epoch'"),
    "list": ([torch.ones(2)], "contains one object of the type list"),
    "tensor": (torch.ones(2), "contains one object of the type Tensor"),
    "options": (argparse.Namespace(lr=1), "contains argparse.Namespace"),
    "arrays": ({name: tensor.numpy() for name, tensor in trained().items()}, "contains NumPy values, not tensors"),
    "numbers for names": ({"model": {3: torch.ones(2)}}, "a tensor under the key '3', which is not a name"),
    "one name twice": ({"a": torch.ones(1), b"a": torch.ones(1)}, "a tensor under the key \"b'a'\", a second time"),
    "itself": (itself(), "nested more than 8 levels deep"),
    "itself many times": (wide_itself(), "does not fit the network: "),
    "flattened": ({"_fsdp_wrapped_module._flat_param": torch.ones(9)}, "FSDP stored its flat parameters"),
    "hostile names": ({"\ud800" + "x" * 10_000: torch.ones(2)}, "1 tensor unknown: '\\ud800xxx"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_file_without_a_state_dict_says_what_it_has(what: str, tmp_path: Path) -> None:
    content, text = OTHERS[what]
    error = refused(saved(content, tmp_path / "odd.pt"))
    assert text in error.message
    assert len(error.message) < 600


def test_attributes_that_a_file_sets_on_its_tensors_are_dropped(tmp_path: Path) -> None:
    tensors = trained()
    tensors["fc.bias"] = nn.Parameter(tensors["fc.bias"])
    tensors["fc.bias"].detach = collections.OrderedDict  # type: ignore[method-assign, assignment]
    state, _ = load(saved(tensors, tmp_path / "attributes.pt"))
    assert equal(state, trained())


class Huge:
    """Pickles to a call that asks for 4 EiB."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return bytearray, (2**62,)


def test_a_file_that_asks_for_more_memory_than_there_is_ends_in_an_error(tmp_path: Path) -> None:
    error = refused(saved({"model": trained(), "x": Huge()}, tmp_path / "huge.pt"))
    assert "needs more memory than this machine has free, or is damaged" in error.message


def test_tensors_of_pickle_dump_are_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "state.pkl"
    path.write_bytes(pickle.dumps(trained()))
    error = refused(path)
    assert "was written by pickle.dump" in error.message
    assert "torch.save" in error.remedy


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files_are_refused_wherever_they_end(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    if kind == "safetensors":
        save_file(trained(), path)
    else:
        saved(trained(), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    ends = np.random.default_rng(0).integers(0, len(whole), 25)
    for end in (0, 1, 2, 3, 9, 10, 100, len(whole) // 2, len(whole) - 1, *ends.tolist()):
        path.write_bytes(whole[:end])
        error = refused(path)
        assert "truncated" in error.message or "empty" in error.message


def test_flipped_bytes_of_a_pickle_never_end_in_a_traceback(tmp_path: Path) -> None:
    path = saved({"model": trained()}, tmp_path / "flipped.pt", _use_new_zipfile_serialization=False)
    whole, generator = path.read_bytes(), np.random.default_rng(3)
    start = whole.index(b"conv1")
    for position in generator.integers(0, start + 1_500, 60):
        damaged = bytearray(whole)
        damaged[position] ^= int(generator.integers(1, 256))
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            load(path)


def test_a_header_of_safetensors_that_lies_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lies.safetensors"
    header = b'{"conv1.weight":{"dtype":"F32","shape":[4000000000],"data_offsets":[0,16000000000]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    assert "truncated or not a safetensors file" in refused(path).message
    path = path.rename(tmp_path / "caf\udce9.safetensors")
    with pytest.raises(CheckpointError, match=r"caf\\udce9\.safetensors' is not text in UTF-8"):
        read_weights(path)


def test_weights_made_in_memory_load(tmp_path: Path) -> None:
    module = Network()
    weights = Weights(tensors=trained(), sha256="", notes=())
    assert load_weights(module, weights, "memory") == ()
    assert equal(dict(module.state_dict()), trained())

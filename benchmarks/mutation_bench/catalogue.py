"""The changes that are tried: of every file, every field of the manifest, every graph, tensor file and golden image."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from kdexport.data.preprocessing import read_image
from mutation_bench import edits
from mutation_bench.edits import Key, Rng

MANIFEST = "manifest.json"
#: Tensor files of a bundle, as far as it has them.
TENSOR_FILES = (
    "unfused.safetensors",
    "student.safetensors",
    "golden/logits.safetensors",
    "metrics/validation.safetensors",
    "metrics/answers.safetensors",
)
#: Fields are changed down to this many keys.
DEPTH = 3


@dataclass(frozen=True, slots=True)
class Mutation:
    """One change; ``apply`` makes it in a copy of the bundle."""

    group: str
    name: str
    apply: Callable[[Path, Rng], object]


def catalogue(bundle: Path) -> list[Mutation]:
    """Every change of this bundle, in a fixed order."""
    files = sorted(p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file() and p.name != "model.sig")
    data = json.loads((bundle / MANIFEST).read_text())
    return [
        *_of_files(files),
        *_of_the_manifest(data),
        *_of_graphs(bundle, [name for name in files if name.endswith(".onnx")]),
        *_of_tensors([name for name in TENSOR_FILES if name in files]),
        *_of_golden_images(list(data["golden"])),
        *_of_policy(data.get("policy", {})),
        *_of_texts(files),
        *_together(data, files),
    ]


def sample(mutations: list[Mutation], count: int, seed: int) -> list[Mutation]:
    """``count`` of them, drawn by ``seed``, in the order given: as equally from each group as their sizes allow."""
    rng = np.random.default_rng(seed)
    groups: dict[str, list[int]] = {}
    for place, mutation in enumerate(mutations):
        groups.setdefault(mutation.group, []).append(place)
    chosen: list[int] = []
    for index, places in enumerate(sorted(groups.values(), key=len)):
        share = max(1, (count - len(chosen)) // (len(groups) - index))
        chosen += map(int, rng.permutation(places)[:share])
    return [mutations[place] for place in sorted(chosen)]


# --- Files ---


def _of_files(files: list[str]) -> Iterator[Mutation]:
    for name in files:
        for what, change in edits.BYTES.items():
            yield Mutation("files", f"{name}: {what}", partial(_bytes, name, change))
        if name != MANIFEST:
            yield Mutation("files", f"{name}: deleted", partial(_delete, name))
            yield Mutation("files", f"{name}: renamed", partial(_rename, name))
            yield Mutation("files", f"{name}: replaced by another file", partial(_replace, name, files))
    yield Mutation("files", "a file added", lambda folder, _: (folder / "golden" / "extra.png").write_bytes(b"x"))
    yield Mutation("files", "a hidden file added", lambda folder, _: (folder / ".hidden").write_bytes(b"x"))
    yield Mutation("files", "an empty folder added", lambda folder, _: (folder / "targets" / "trt-fp16").mkdir())
    yield Mutation("files", "model.onnx: made a link", _link)


def _bytes(name: str, change: Callable[[bytes, Rng], bytes], folder: Path, rng: Rng) -> None:
    path = folder / name
    path.write_bytes(change(path.read_bytes(), rng))


def _delete(name: str, folder: Path, _: Rng) -> None:
    (folder / name).unlink()


def _rename(name: str, folder: Path, _: Rng) -> None:
    (folder / name).rename((folder / name).with_name(f"other{(folder / name).suffix}"))


def _replace(name: str, files: list[str], folder: Path, rng: Rng) -> None:
    content = (folder / name).read_bytes()
    others = [other for other in files if other != MANIFEST and (folder / other).read_bytes() != content]
    alike = [other for other in others if Path(other).suffix == Path(name).suffix] or others
    shutil.copyfile(folder / alike[int(rng.integers(len(alike)))], folder / name)


def _link(folder: Path, _: Rng) -> None:
    (folder / "model.onnx").rename(folder.parent / "elsewhere.onnx")
    (folder / "model.onnx").symlink_to(folder.parent / "elsewhere.onnx")


# --- The manifest ---


def _of_the_manifest(data: dict[str, Any]) -> Iterator[Mutation]:
    for path in edits.paths_of(data, DEPTH):
        # Digests are written again, and limits have a group of their own.
        if path[0] in ("files", "policy"):
            continue
        name = ".".join(map(str, path))
        yield Mutation("manifest", f"{name}: removed", partial(_manifest, edits.remove_field, path))
        for what, change in (("of another type", edits.of_another_type), ("changed", edits.changed)):
            yield Mutation("manifest", f"{name}: {what}", partial(_manifest, partial(_put, change), path))
    yield Mutation("manifest", "a field added", partial(_manifest, _add, ("added",)))


def _manifest(edit: Callable[[Any, tuple[Key, ...]], object], path: tuple[Key, ...], folder: Path, _: Rng) -> None:
    edits.edit_json(folder / MANIFEST, lambda data: edit(data, path))


def _put(change: Callable[[Any], Any], data: Any, path: tuple[Key, ...]) -> None:
    edits.replace_field(data, path, change)


def _add(data: Any, path: tuple[Key, ...]) -> None:
    data[path[0]] = 1


def _of_policy(policy: dict[str, Any]) -> Iterator[Mutation]:
    for path in edits.paths_of(policy, DEPTH):
        value = edits.parent_of(policy, path)[path[-1]]
        if isinstance(value, float | int):
            looser = value / 2 if path[-1] in ("headroom", "confidence") else value * 2 + (value == 0)
            edit = partial(_put, partial(_always, looser))
            name = ".".join(map(str, path))
            yield Mutation("policy", f"{name}: looser", partial(_manifest, edit, ("policy", *path)))
        if isinstance(value, dict):
            remove = partial(_manifest, edits.remove_field, ("policy", *path))
            yield Mutation("policy", f"{'.'.join(map(str, path))}: removed", remove)


def _always(value: float, _: Any) -> float:
    return value


# --- Graphs, tensors, images, texts ---


def _of_graphs(bundle: Path, files: list[str]) -> Iterator[Mutation]:
    """Of each graph, in every file that holds it: whoever changes one changes its copies too."""
    copies: dict[bytes, list[str]] = {}
    for name in files:
        copies.setdefault((bundle / name).read_bytes(), []).append(name)
    for names in copies.values():
        label = names[0] if len(names) == 1 else f"{names[0]} and its copies"
        for what, edit in edits.GRAPH.items():
            yield Mutation("graphs", f"{label}: {what}", partial(_graph, names, edit))
        for others in copies.values():
            if others != names:
                yield Mutation("graphs", f"{label}: replaced by {others[0]}", partial(_copy, others[0], names))
        if len(names) > 1:
            alone = partial(_graph, names[:1], edits.GRAPH["a ReLU made a LeakyRelu of slope 1e-7"])
            yield Mutation("graphs", f"{names[0]} without its copies: a ReLU made a LeakyRelu", alone)


def _graph(names: list[str], edit: Callable[[edits.Model, Rng], object], folder: Path, rng: Rng) -> None:
    edits.edit_graph(folder / names[0], edit, rng)
    for name in names[1:]:
        shutil.copyfile(folder / names[0], folder / name)


def _copy(source: str, names: list[str], folder: Path, _: Rng) -> None:
    for name in names:
        shutil.copyfile(folder / source, folder / name)


def _of_tensors(files: list[str]) -> Iterator[Mutation]:
    for name in files:
        group = "metrics" if name.startswith("metrics") else "golden" if name.startswith("golden") else "weights"
        for what, edit in edits.TENSORS.items():
            yield Mutation(group, f"{name}: {what}", partial(_tensors, name, edit))
    if "golden/logits.safetensors" in files:
        larger = partial(_tensors, "golden/logits.safetensors", lambda t, _: t["unit_error"].mul_(100))
        yield Mutation("golden", "golden/logits.safetensors: error of the unit times 100", larger)


def _tensors(name: str, edit: Callable[[dict[str, Any], Rng], object], folder: Path, rng: Rng) -> None:
    edits.edit_tensors(folder / name, edit, rng)


def _of_golden_images(names: list[str]) -> Iterator[Mutation]:
    for name in names[:3]:
        for what, edit in edits.PIXELS.items():
            yield Mutation("golden", f"{name}: {what}", partial(_image, name, edit))
        yield Mutation("golden", f"{name}: a text added", partial(_note, name))
    yield Mutation("golden", "two golden images swapped", partial(_swap, names[0], names[-1]))
    yield Mutation("golden", "the last golden image taken out everywhere", _fewer_golden)


def _image(name: str, edit: Callable[[Any], Any], folder: Path, _: Rng) -> None:
    edits.edit_pixels(folder / name, edit)


def _note(name: str, folder: Path, _: Rng) -> None:
    edits.add_text(folder / name)


def _swap(first: str, second: str, folder: Path, _: Rng) -> None:
    contents = [(folder / name).read_bytes() for name in (second, first)]
    for name, content in zip((first, second), contents, strict=True):
        (folder / name).write_bytes(content)


def _fewer_golden(folder: Path, rng: Rng) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    name, count = data["golden"][-1], len(data["golden"])
    (folder / name).unlink()
    edits.edit_json(folder / MANIFEST, lambda d: d["golden"].pop())

    def shorten(tensors: dict[str, Any], _: Rng) -> None:
        for key, tensor in tensors.items():
            if tensor.dim() and len(tensor) == count:
                tensors[key] = tensor[:-1].clone()

    edits.edit_tensors(folder / "golden/logits.safetensors", shorten, rng)


def _of_texts(files: list[str]) -> Iterator[Mutation]:
    for name in ("report.md", "report.html", "sbom.json"):
        if name in files:
            edit = partial(_text, name, "9", "8")
            yield Mutation("reports", f"{name}: figures changed", edit)
    if "sbom.json" in files:
        licences = partial(_text, "sbom.json", "MIT", "Proprietary")
        yield Mutation("reports", "sbom.json: licences changed", licences)
        yield Mutation("reports", "sbom.json: a package removed", _fewer_packages)


def _text(name: str, old: str, new: str, folder: Path, _: Rng) -> None:
    path = folder / name
    path.write_text(path.read_text().replace(old, new))


def _fewer_packages(folder: Path, _: Rng) -> None:
    edits.edit_json(folder / "sbom.json", lambda data: data["components"].pop())


# --- Several files at once ---


def _together(data: dict[str, Any], files: list[str]) -> Iterator[Mutation]:
    graphs = [name for name in files if name.endswith(".onnx")]
    yield Mutation("together", "the same folded weight changed in student.safetensors and float32 graphs", _weights)
    yield Mutation("together", "classes reversed in the manifest and in every graph", partial(_classes, graphs))
    yield Mutation("together", "student.safetensors and unfused.safetensors swapped", _swapped_weights)
    yield Mutation("together", "sbom.json and its digest removed", partial(_delete, "sbom.json"))
    yield Mutation("together", "the task and its results removed", _no_task)
    yield Mutation("together", "divergences of every file set to 0, in results and manifest", _no_divergence)
    if data["targets"]:
        name = next(iter(data["targets"]))
        yield Mutation("together", "a target taken out of the manifest and the folder", partial(_no_target, name))


def _weights(folder: Path, rng: Rng) -> None:
    from onnx import TensorProto, numpy_helper

    found: dict[str, Any] = {}

    def scale(tensors: dict[str, Any], _: Rng) -> None:
        name = next(name for name in sorted(tensors) if name.endswith("weight"))
        tensors[name] = tensors[name] * 1.02
        found[name] = tensors[name].numpy()

    edits.edit_tensors(folder / "student.safetensors", scale, rng)

    def put(model: edits.Model, _: Rng) -> None:
        for item in model.graph.initializer:
            if item.name in found and item.data_type == TensorProto.FLOAT:
                item.CopyFrom(numpy_helper.from_array(found[item.name], item.name))

    for path in sorted(folder.rglob("*.onnx")):
        edits.edit_graph(path, put, rng)


def _classes(graphs: list[str], folder: Path, rng: Rng) -> None:
    edits.edit_json(folder / MANIFEST, lambda data: data["student"]["classes"].reverse())
    for name in graphs:
        edits.edit_graph(folder / name, edits.other_classes, rng)


def _swapped_weights(folder: Path, rng: Rng) -> None:
    _swap("student.safetensors", "unfused.safetensors", folder, rng)


def _no_task(folder: Path, _: Rng) -> None:
    def edit(data: Any) -> None:
        data["task"] = None
        data.pop("answers", None)
        for check in data["parity"]:
            check["undecided"] = False

    edits.edit_json(folder / MANIFEST, edit)
    shutil.rmtree(folder / "metrics")


def _no_divergence(folder: Path, rng: Rng) -> None:
    def zero(tensors: dict[str, Any], _: Rng) -> None:
        for name, tensor in tensors.items():
            if name.endswith(":divergences"):
                tensor.zero_()

    edits.edit_tensors(folder / "metrics/validation.safetensors", zero, rng)

    def edit(data: Any) -> None:
        for entry in data["task"]["files"].values():
            entry["mean_divergence"] = 0.0

    edits.edit_json(folder / MANIFEST, edit)


def _no_target(name: str, folder: Path, _: Rng) -> None:
    shutil.rmtree(folder / "targets" / name)
    edits.edit_json(folder / MANIFEST, lambda data: data["targets"].pop(name))


# --- What no check without a signature can see ---

SAME_PIXELS = "the same pixels in another file"
NAMES_OF_NODES = "a text in the file, which nothing computes with; replay reports other bytes"

#: By a pattern of "GROUP NAME"; the first one that fits.
_UNSEEN = {
    r"policy .*": "limits are the builder's choice: verify lists each one that is looser than the default",
    r"manifest report_images\b.*": "positions of the images that report.html shows, which no command reads",
    r"manifest (parity|parity_images|latency|target_times|certificate)\b.*": "a record of what the build measured: "
    "verify measures again and does not read it",
    r"manifest operators\.unfused\b.*": "a record of a graph that the bundle does not have",
    r"manifest (provenance\.checkpoint_sha256|golden_images): removed": "as in a bundle of an earlier version",
    r"manifest provenance\b.*": "a statement about the training, which nothing in a bundle can confirm",
    r"manifest export\b.*": "a setting of the build, which verify uses as it is stored",
    r"manifest targets\b.*": "a record of how the build made and ran the target: verify runs it again, or says that it "
    "did not",
    r"manifest versions\b.*": "an entry that is missing contradicts nothing: sbom.json has the version",
    # A changed table lacks its first key.
    r"manifest task(\.data_(sha256|images)\b.*|: changed)": "it identifies the data set, which is not in the bundle",
    r"manifest task: removed|together the task .*": "as in a bundle that was built without rung D",
    r"manifest student\b.*": "a description of how the student was trained or made, which its weights do not need",
    r"manifest a field added": "keys of later versions are allowed, and nothing reads them",
    r"files manifest\.json: a byte appended": "the same JSON with a line break at its end",
    r"manifest .*": "",
    r"(files|reports) report\.(md|html): .*": "text for people, which no command reads",
    r"(files|reports) sbom\.json: .*": "what the machine of the build reported; only the versions of the manifest are "
    "compared",
    r"together sbom\.json .*": "as in a bundle of an earlier version",
    r"graphs .*: (a node renamed|documentation changed|another producer|metadata added)": NAMES_OF_NODES,
    r"files .*\.plan: .*|files .*layers\.json: .*": "an engine is run where its GPU is; this machine has none",
    r"files a (hidden )?file added": "the manifest lists it, and nothing reads it",
    r"golden .*: a text added": SAME_PIXELS,
    r"golden the last golden image taken out everywhere": "as in a bundle that was built with one golden image fewer",
    r"together a target taken out .*": "as in a bundle that was built for fewer targets: --require-executed TARGET "
    "refuses it",
    r"together classes reversed .*": "the names of the classes are data: no weight knows them",
    r"(golden|files) golden/logits\.safetensors: a tensor .*": "labels and limits are missing in bundles of earlier "
    "versions: the server then measures the limits itself",
    r"(metrics|files) metrics/.*|together divergences .*": "results of images that are not in the bundle",
}


def _same_pixels(first: Path, second: Path) -> bool:
    if not second.is_file():
        return False
    images = [np.asarray(read_image(path)) for path in (first, second)]
    return bool(np.array_equal(images[0], images[1]))


def unseen_reason(mutation: Mutation, before: Path, after: Path) -> str:
    """Why no check but a signature can see this change of ``before`` into ``after``; empty if one should."""
    name = mutation.name.partition(":")[0]
    if re.fullmatch(r"golden/\d+\.\w+", name) and _same_pixels(before / name, after / name):
        return SAME_PIXELS
    if name.endswith(".onnx") and _same_but_names_of_nodes(before / name, after / name):
        return NAMES_OF_NODES
    return known_reason(mutation.group, mutation.name)


def _same_but_names_of_nodes(before: Path, after: Path) -> bool:
    """Whether two files are the same graph; a name may be no text any more, and is compared with nothing."""
    graphs: list[bytes] = []
    for path in (before, after):
        try:
            model = onnx.load(str(path))
        except (DecodeError, OSError):
            return False
        for node in model.graph.node:
            node.ClearField("name")
        graphs.append(model.SerializeToString(deterministic=True))
    return graphs[0] == graphs[1]


def known_reason(group: str, name: str) -> str:
    """The reason that the name of a change gives; empty if there is none."""
    text = f"{group} {name}"
    return next((reason for pattern, reason in _UNSEEN.items() if re.fullmatch(pattern, text)), "")

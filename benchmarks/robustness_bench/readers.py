"""What reads each kind of file, as a user's command does: commands, and the functions that they read files with."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from PIL import Image

from kdexport.bundle.manifest import hash_files
from robustness_bench import damage
from robustness_bench.cases import ROOT, Prepared, Read, Rng, pick


@dataclass(frozen=True, slots=True)
class Material:
    """Valid files to damage: a bundle, and small files of each format in ``folder``."""

    bundle: Path
    folder: Path

    @classmethod
    def made(cls, bundle: Path, folder: Path) -> "Material":
        """Write the small files into ``folder``, which is empty."""
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).eval()
        program = torch.export.export(network, (torch.randn(1, 3, 8, 8),))
        torch.export.save(program, folder / "program.pt2")
        torch.save(network.state_dict(), folder / "weights.pt")
        pixels = np.random.default_rng(0).integers(0, 256, (40, 33, 3), dtype=np.uint8)
        for kind in ("png", "jpeg", "webp", "bmp", "gif", "tiff"):
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, format=kind.upper())
            (folder / f"image.{kind}").write_bytes(stream.getvalue())
        (folder / "policy.toml").write_text("[B]\nmax_error = 5.0\n\n[D.fp32]\nflips = 0.01\ntop1_drop = 0.01\n")
        (folder / "runner.toml").write_text(_RUNNER)
        return cls(bundle, folder)


_RUNNER = """schema = "kdexport.runner/2"
measured = "2026-01-01"
model = "built-in network"
clock = "host"
batch = 1
threads = 1
pairs = 40
max_slowdown = 0.02
sessions = 63
session_deviation = 0.005
lag_correlation = 0.1
widening = 1.4
mde = 0.007
gates = 9
false_fails = 0
false_fail_high = 0.28
inconclusive = 0
resampled_false_fails = 0.0
median_gate_seconds = 7.0
load = 0.5

[machine]
cpu = "x"
cores = 2
system = "Linux x86_64"
onnxruntime = "1.0"
gpu = ""
"""


def _command(*arguments: str | Path) -> Read:
    from kdexport.cli import app

    return lambda: app([str(word) for word in arguments])


def _changed_bundle(material: Material, place: Path, name: str, content: bytes) -> Path:
    """A copy of the bundle with one file replaced, and with its digest if it is not the manifest."""
    import json
    import shutil

    folder = Path(shutil.copytree(material.bundle, place / "bundle"))
    (folder / name).write_bytes(content)
    if name != "manifest.json":
        path = folder / "manifest.json"
        data = json.loads(path.read_text())
        data["files"] = hash_files(folder)
        path.write_text(json.dumps(data))
    return folder


def manifest(material: Material, place: Path, rng: Rng) -> Prepared:
    """A bundle whose manifest is damaged, in commands that read bundles."""
    content = damage.damaged_manifest((material.bundle / "manifest.json").read_bytes(), rng)
    folder = _changed_bundle(material, place, "manifest.json", content)
    policy = material.folder / "policy.toml"
    if rng.random() < 0.5:
        from kdexport.bundle.manifest import read_manifest

        return Prepared("manifest", lambda: read_manifest(folder))
    choices: tuple[tuple[str, Sequence[str | Path]], ...] = (
        ("inspect", ("inspect", folder, "--json")),
        ("inspect", ("inspect", folder, "--json")),
        ("verify --rethreshold", ("verify", folder, "--rethreshold", policy, "--allow-looser", "--json")),
        ("slim", ("slim", folder, "--target", "onnx-fp32", "--out", place / "out", "--json")),
    )
    name, arguments = pick(rng, choices)
    return Prepared(name, _command(*arguments))


def toml(material: Material, place: Path, rng: Rng) -> Prepared:
    """An export configuration, a recipe, a policy or a calibration."""
    from kdexport.config import load_config
    from kdexport.gate.calibrate import read_calibration
    from kdexport.verify.policy import DEFAULT, load_policy
    from training.recipe import load_recipe

    configurations = sorted((ROOT / "export_configs").glob("*.toml"))
    recipes = [ROOT / "training" / "recipes" / f"{name}.toml" for name in ("digits", "cifar100")]
    kind = int(rng.integers(4))
    source = (
        pick(rng, configurations), pick(rng, recipes), material.folder / "policy.toml",
        material.folder / "runner.toml",
    )[kind]  # fmt: skip
    path = place / "damaged.toml"
    path.write_bytes(damage.damaged_toml(source.read_bytes(), rng))
    reads: tuple[tuple[str, Read], ...] = (
        ("configuration", lambda: load_config(path)),
        ("recipe", lambda: load_recipe(str(path))),
        ("policy", lambda: load_policy(path, DEFAULT)),
        ("calibration", lambda: read_calibration(path)),
    )
    return Prepared(*reads[kind])


def safetensors(material: Material, place: Path, rng: Rng) -> Prepared:
    """Weights, golden logits and stored metrics."""
    from kdexport.bundle.manifest import load_unfused, read_manifest
    from kdexport.checkpoint import load_tensors
    from kdexport.origins.weights import read_weights
    from kdexport.verify.golden_limits import own_logits, read_reference
    from kdexport.verify.stored_results import load_record

    names = (
        "unfused.safetensors",
        "student.safetensors",
        "golden/logits.safetensors",
        "metrics/validation.safetensors",
    )
    name = str(pick(rng, [name for name in names if (material.bundle / name).is_file()]))
    content = damage.damaged_safetensors((material.bundle / name).read_bytes(), rng)
    if name == "student.safetensors":
        path = place / "weights.safetensors"
        path.write_bytes(content)
        return pick(
            rng,
            (
                Prepared("tensors", lambda: load_tensors(path)),
                Prepared("trained weights", lambda: read_weights(path)),
            ),
        )
    folder = _changed_bundle(material, place, name, content)
    known = read_manifest(folder)
    if name == "unfused.safetensors":
        return Prepared("student", lambda: load_unfused(folder, known.spec))
    if name.startswith("metrics"):
        return Prepared("stored results", lambda: load_record(folder, known))
    return Prepared("golden logits", lambda: (read_reference(folder), own_logits(folder, known, "onnx-fp32")))


def graph(material: Material, place: Path, rng: Rng) -> Prepared:
    """A damaged ONNX file whose digest is right, as the server, the gate and the audit open it."""
    from kdexport.bundle.manifest import load_unfused, read_manifest
    from kdexport.gate.accuracy import require_golden_logits
    from kdexport.gate.arms import artifact, open_bundle
    from kdexport.graph.audit import audit_graph
    from kdexport.graph.equality import graph_difference
    from kdexport.serving.limits import Limits
    from kdexport.serving.loading import as_kdexport_error, load

    kind = int(rng.integers(3))
    # The gate times the file of the target.
    own = "targets/onnx-fp32/model.onnx"
    name = own if kind == 1 and (material.bundle / own).is_file() else "model.onnx"
    content = damage.damaged_onnx((material.bundle / name).read_bytes(), rng)
    folder = _changed_bundle(material, place, name, content)
    if kind == 0:

        def served() -> None:
            try:
                load(folder, name="m", version=1, provider="CPUExecutionProvider", limits=Limits(), allowed_error=1.0)
            except Exception as error:
                # As every caller of it does.
                raise as_kdexport_error(error, folder) from error

        return Prepared("server", served)
    if kind == 1:

        def gated() -> None:
            opened = open_bundle(folder)
            require_golden_logits(artifact(opened, "onnx-fp32", "fused", place), opened, 1)

        return Prepared("gate", gated)

    def audited() -> None:
        from kdexport.verify.check import attempt

        known = read_manifest(folder)
        weights = {key: value.numpy() for key, value in load_unfused(folder, known.spec).state_dict().items()}
        attempt("audit", name, lambda: audit_graph(folder / name, weights, form="fp32", opset=known.opset))
        attempt("audit", name, lambda: graph_difference(onnx.load(folder / name), onnx.load(material.bundle / name)))

    return Prepared("audit", audited)


def program(material: Material, place: Path, rng: Rng) -> Prepared:
    """A .pt2 file, or weights of torch.save."""
    from kdexport.origins.program_archive import open_archive
    from kdexport.origins.weights import read_weights

    if rng.random() < 0.5:
        path = place / "damaged.pt2"
        path.write_bytes(damage.damaged_zip((material.folder / "program.pt2").read_bytes(), rng))
        return Prepared("program", lambda: open_archive(path))
    path = place / "damaged.pt"
    path.write_bytes(damage.damaged_zip((material.folder / "weights.pt").read_bytes(), rng))
    return Prepared("weights", lambda: read_weights(path))


def image(material: Material, place: Path, rng: Rng) -> Prepared:
    """An uploaded image, and one of a data set."""
    from kdexport.bundle.manifest import read_manifest
    from kdexport.data.preprocessing import check_image, read_image
    from kdexport.serving.images import PixelBudget, decode_upload
    from kdexport.serving.limits import Limits

    # Three formats are read; the others are refused by their first bytes.
    kind = pick(rng, ("png", "png", "jpeg", "jpeg", "webp", "webp", "bmp", "gif", "tiff"))
    source = material.folder / f"image.{kind}"
    content = damage.damaged_image(source.read_bytes(), rng)
    path = place / f"damaged{source.suffix}"
    path.write_bytes(content)
    preprocessing = read_manifest(material.bundle).spec.preprocessing
    limits = Limits()
    return pick(
        rng,
        (
            Prepared("upload", lambda: decode_upload(content, preprocessing, limits, PixelBudget(4 * limits.pixels))),
            Prepared("data set", lambda: (check_image(path), preprocessing.pixels(read_image(path)))),
        ),
    )


READERS: dict[str, Callable[[Material, Path, Rng], Prepared]] = {
    "manifest": manifest,
    "TOML": toml,
    "safetensors": safetensors,
    "ONNX": graph,
    "program": program,
    "image": image,
}

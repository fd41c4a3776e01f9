"""Networks of timm and torchvision, trained here, through the whole road: build, gate, serve, and the library's labels.

python benchmarks/any_classifier.py DATA WORK --classes 10 --train 300 --test 50 --epochs 3

DATA has train/<class>/* and test/<class>/*. No weights are downloaded: each network is trained from random weights for
a few epochs, with a plain loop that has nothing of kdexport in it. The labels of the served bundle are compared with
those of the library's own network and transform. If the int8 targets lose too much, the float32 targets
are built, gated and served. The result is one JSON object a network in WORK/results.jsonl.
"""

import argparse
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms._presets import ImageClassification

TARGETS = "onnx-fp32,onnx-int8,openvino-fp32,openvino-int8"
FLOATS = "onnx-fp32,openvino-fp32"
SIZE, CROP = 64, 0.875
SETTINGS = """student = "{student}"
[verify]
images = 128
golden = 16
[latency]
sessions = 6
"""


def of_timm(classes: int) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    """mobilenetv3_small_050 and timm's transform of evaluation."""
    network = timm.create_model("mobilenetv3_small_050", num_classes=classes)
    config = timm.data.resolve_data_config({"input_size": (3, SIZE, SIZE)}, model=network)
    return network, timm.data.create_transform(**config, is_training=False)


def of_torchvision(classes: int) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    """shufflenet_v2_x0_5 and torchvision's preset of evaluation."""
    transform = ImageClassification(crop_size=SIZE, resize_size=round(SIZE / CROP))
    return models.get_model("shufflenet_v2_x0_5", num_classes=classes), transform


NETWORKS = {"timm:mobilenetv3_small_050": of_timm, "torchvision:shufflenet_v2_x0_5": of_torchvision}


def subset(source: Path, target: Path, classes: int, counts: dict[str, int]) -> None:
    """Link the first images of the first classes."""
    names = sorted(path.name for path in (source / "train").iterdir() if path.is_dir())[:classes]
    for split, count in counts.items():
        for name in names:
            (target / split / name).mkdir(parents=True, exist_ok=True)
            for image in sorted((source / split / name).iterdir())[:count]:
                link = target / split / name / image.name
                if not link.exists():
                    link.symlink_to(image.resolve())


def listed(folder: Path) -> list[tuple[Path, int]]:
    """The images of a split and the indices of their classes."""
    names = sorted(path.name for path in folder.iterdir())
    return [(image, index) for index, name in enumerate(names) for image in sorted((folder / name).iterdir())]


def loaded(images: list[tuple[Path, int]], transform: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
    """All images through the library's transform, and their labels."""
    pixels = [transform(Image.open(path).convert("RGB")) for path, _ in images]
    return torch.stack(pixels), torch.tensor([label for _, label in images])


def train(network: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """SGD with momentum and a cosine, batch 64, random flips."""
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * (len(images) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.train()
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(images)), 64)[: len(images) // 64]:
            inputs = images[batch].flip(3) if torch.rand(()) < 0.5 else images[batch]
            loss = nn.functional.cross_entropy(network(inputs), labels[batch])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()


def run(*arguments: str, log: Path) -> tuple[int, float]:
    """One command of kdexport; its exit code and seconds."""
    started = time.monotonic()
    with log.open("w") as stream:
        done = subprocess.run([sys.executable, "-m", "kdexport", *arguments], stdout=stream, stderr=stream, check=False)
    return done.returncode, time.monotonic() - started


@contextmanager
def served(bundle: Path, log: Path) -> Iterator[str]:
    """The address of a server of the bundle."""
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(str(free.getsockname()[1]))
    command = [sys.executable, "-m", "kdexport", "serve", str(bundle), "--port", ports[0], "--metrics-port", ports[1]]
    with log.open("w") as stream:
        server = subprocess.Popen([*command, "--instances", "1"], stdout=stream, stderr=stream)
    try:
        address = f"http://127.0.0.1:{ports[0]}"
        for _ in range(240):
            if server.poll() is not None:
                sys.exit(log.read_text())
            try:
                urllib.request.urlopen(f"{address}/v2/health/ready", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


def classify(address: str, image: Path) -> str:
    """The first label of the server."""
    request = urllib.request.Request(
        f"{address}/v1/classify?top=1", data=image.read_bytes(), headers={"Content-Type": "image/png"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(json.load(answer)["predictions"][0]["label"])


def road(student: str, work: Path, epochs: int) -> dict[str, Any]:
    """Train, hand over, build, gate, serve, compare."""
    data, name = work / "data", re.sub(r"\W+", "-", student)
    names = sorted(path.name for path in (data / "train").iterdir())
    torch.manual_seed(0)
    network, transform = NETWORKS[student](len(names))
    weights = work / f"{name}.pth"
    if weights.exists():
        network.load_state_dict(torch.load(weights, weights_only=True)["state_dict"])
    else:
        train(network, *loaded(listed(data / "train"), transform), epochs)
        torch.save({"state_dict": network.state_dict(), "epoch": epochs}, weights)

    config, bundle = work / f"{name}.toml", work / "dist" / name
    config.write_text(SETTINGS.format(student=student))
    options = ("--student", student, "--config", str(config), "--weights", str(weights), "--image-size", str(SIZE),
               "--data", str(data), "--out", str(bundle), "--workspace", str(work / "workspace"))  # fmt: skip
    everything = run("build", *options, "--target", TARGETS, log=work / f"{name}.build.log")
    # A network of few epochs can lose too much in int8, and is then refused.
    targets = TARGETS if everything[0] in (0, 3) else FLOATS
    built = run("build", *options, "--target", targets, log=work / f"{name}.floats.log")
    gate = run("gate", str(bundle), "--threads", "1", log=work / f"{name}.gate.log")

    images = listed(data / "test")
    pixels, labels = loaded(images, transform)
    network.eval()
    with torch.no_grad():
        own = torch.cat([network(part) for part in torch.split(pixels, 50)]).argmax(1)
    with served(bundle, work / f"{name}.serve.log") as address:
        answers = [classify(address, path) for path, _ in images]
    manifest = json.loads((bundle / "manifest.json").read_text())
    return {
        "student": student,
        "top1": round(float((own == labels).float().mean()), 4),
        "build_of_all_targets": {"exit_code": everything[0], "s": round(everything[1], 1)},
        "build_of_the_bundle": {"exit_code": built[0], "s": round(built[1], 1)},
        "gate": {"exit_code": gate[0], "s": round(gate[1], 1)},
        "targets": {target: entry["status"] for target, entry in manifest["targets"].items()},
        "operators": {kind: sum(counts.values()) for kind, counts in manifest["operators"].items()},
        "images": len(images),
        "equal_labels": sum(answer == names[int(index)] for answer, index in zip(answers, own, strict=True)),
    }


def main() -> None:
    """Run every network; exits with 1 if a label differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--train", type=int, default=300, help="images a class")
    parser.add_argument("--test", type=int, default=50, help="images a class")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--student", action="append", choices=sorted(NETWORKS), help="repeatable; default: all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    subset(arguments.data, arguments.work / "data", arguments.classes,
           {"train": arguments.train, "test": arguments.test})  # fmt: skip
    different = 0
    with (arguments.work / "results.jsonl").open("w") as results:
        for student in arguments.student or NETWORKS:
            result = road(student, arguments.work, arguments.epochs)
            print(json.dumps(result))
            results.write(json.dumps(result) + "\n")
            results.flush()
            different += result["images"] - result["equal_labels"]
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()

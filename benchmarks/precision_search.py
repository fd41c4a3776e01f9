"""The precision search on a trained network other than a student, and the cost of its result on the test split.

python benchmarks/precision_search.py --weights resnet56.pt --data data/cifar100 --noise 0.05
python benchmarks/precision_search.py --weights resnet56.pt --data data/cifar100 --blow-up 4096
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from kdexport.backends.ort import load_model
from kdexport.data.calibration_images import Calibration, CalibrationSettings
from kdexport.data.datasets import DatasetSpec, ImageSet, open_dataset, spread
from kdexport.data.preprocessing import Preprocessing
from kdexport.graph.equalise import apply_scalings
from kdexport.graph.export import export_onnx
from kdexport.graph.plan import LayerPlan
from kdexport.graph.quantize import Form, quantize
from kdexport.graph.tensor_ranges import calibrate
from kdexport.precision_search.costs import PlanCost, SearchBudget, SearchImages
from kdexport.precision_search.search import Cast, PrecisionPlan, find_plan
from training.teachers import TEACHERS
from training.teachers.teacher import load_teacher_weights

OPSET, BITS = 20, 7
FORM: Form = "int8-u8"
PREPROCESSING = Preprocessing(image_size=32, resize=32, mean=(0.5070, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2761))


def exported(arguments: argparse.Namespace, path: Path) -> Path:
    """The trained network as a float32 graph without batch norms."""
    teacher = TEACHERS.build(arguments.network, num_classes=100, image_size=32)
    load_teacher_weights(teacher, arguments.weights)
    export_onnx(teacher.eval(), path, image_size=32, opset=OPSET, metadata={})
    return path


def blow_up(path: Path, factor: float) -> None:
    """Multiply one channel between pooling and linear layer by ``factor``, and divide its column: the same function.

    Folding a batch norm with almost no variance has this effect. The channel is where no equalisation can repair it.
    """
    model = onnx.load(str(path))
    stored = {item.name: item for item in model.graph.initializer}
    linear = next(node for node in model.graph.node if node.op_type == "Gemm")
    pool = next(node for node in model.graph.node if node.op_type in ("GlobalAveragePool", "ReduceMean"))
    weight = numpy_helper.to_array(stored[linear.input[1]]).copy()
    channels = weight.shape[1]
    gains = np.ones((1, channels, 1, 1), np.float32)
    gains[0, 7] = factor
    weight[:, 7] /= factor
    stored[linear.input[1]].CopyFrom(numpy_helper.from_array(weight, linear.input[1]))
    model.graph.initializer.append(numpy_helper.from_array(gains.reshape(channels, 1, 1, 1), "gains"))
    place = list(model.graph.node).index(pool)
    node = onnx.helper.make_node("Conv", [pool.input[0], "gains"], ["blown"], "blow_up", group=channels)
    pool.input[0] = "blown"
    model.graph.node.insert(place, node)
    onnx.save(model, str(path))


def caster(source: Path, calibration: Calibration, folder: Path) -> Cast:
    """A function that casts by a plan; each scaled graph is calibrated once."""

    def cast(plan: LayerPlan, path: Path) -> None:
        exact, ranges = (folder / f"{abs(hash(plan.equalised))}.{kind}" for kind in ("onnx", "json"))
        if not ranges.exists():
            onnx.save(apply_scalings(onnx.load(str(source)), plan.equalised), str(exact))
            calibrate(exact, calibration.batches(), ranges, method="minmax", percentile=99.99)
        quantize(exact, ranges, path, form=FORM, weight_bits=BITS, keep=plan.nodes)

    return cast


def predictions(path: Path, images: ImageSet, chosen: list[int]) -> NDArray[np.int64]:
    """The prediction (N,) of one file for each of the chosen images."""
    model, found = load_model(path, threads=1), []
    for start in range(0, len(chosen), 250):
        pixels = images.read(chosen[start : start + 250], PREPROCESSING)
        found.append(model.logits(PREPROCESSING.normalise(pixels)).argmax(1))
    return np.concatenate(found)


def show_costs(found: PrecisionPlan) -> None:
    """Print the cost of every plan on the images of the search as a Markdown table."""
    print("\n| plan | top-1 | flips | mean KL, nats | noise | kB | ms |\n|---|---|---|---|---|---|---|")
    show("float32", found.float32)
    for number, plan in enumerate(found.evaluated):
        text = f"{plan.cost.equalised} pairs equalised, {len(plan.cost.kept)} kept"
        show(f"{number}: {text}{', chosen' if plan is found.chosen else ''}", plan.cost)
    for reason in found.reasons:
        print(f"\n{reason}")
    print(f"\nkept: {', '.join(found.chosen.layers.nodes) or 'none'}")


def show(name: str, cost: PlanCost) -> None:
    """Print one row."""
    print(
        f"| {name} | {cost.top1:.2%} | {cost.flips:.2%} | {cost.divergence:.2g} | {cost.noise:.3f} | "
        f"{cost.bytes / 1e3:.0f} | {cost.latency_ms:.3f} |"
    )


def main() -> None:
    """Search, then evaluate the result on the test split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet56")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--flips", type=float, default=0.1)
    parser.add_argument("--top1-drop", type=float, default=0.005)
    parser.add_argument("--noise", type=float, default=float("inf"))
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--evaluations", type=int, default=24)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--blow-up", type=float, default=1.0)
    arguments = parser.parse_args()
    data = DatasetSpec(name="cifar100", root=arguments.data)
    settings = CalibrationSettings(images=128)
    calibration = Calibration(settings=settings, dataset=data, dataset_sha256="", preprocessing=PREPROCESSING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = exported(arguments, folder / "fp32.onnx")
        if arguments.blow_up != 1:
            blow_up(source, arguments.blow_up)
        budget = SearchBudget(flips=arguments.flips, top1_drop=arguments.top1_drop, noise=arguments.noise)
        images = SearchImages(*calibration.search_images(arguments.images))
        cast = caster(source, calibration, folder)
        found = find_plan(source, cast, images, budget, folder, form=FORM, evaluations=arguments.evaluations)
        show_costs(found)
        test = open_dataset(data, "test")
        chosen = spread(len(test), arguments.test_images)
        exact, right = predictions(source, test, chosen), test.labels[chosen]
        print(f"\n| on {len(chosen):,} test images | top-1 | flips |\n|---|---|---|")
        for what, path in (("float32", source), ("plain", found.evaluated[0].path), ("chosen", found.chosen.path)):
            labels = exact if path == source else predictions(path, test, chosen)
            print(f"| {what} | {np.mean(labels == right):.2%} | {np.mean(labels != exact):.2%} |", flush=True)


if __name__ == "__main__":
    main()

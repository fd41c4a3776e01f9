"""README.md of a bundle: a model card as the Hugging Face Hub reads it, with what runs the model and what limits it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdexport.bundle.layout import CARD, MANIFEST
from kdexport.bundle.manifest import MODEL, VERIFIED, has_synthetic_images
from kdexport.core.tables import Table, markdown_table, markdown_text
from kdexport.data.preprocessing import Preprocessing
from kdexport.report.check_tables import verdict_sentence
from kdexport.report.contents import Evidence, target_facts
from kdexport.report.page import targets_table
from kdexport.stats.proportions import ACCURACY_CONFIDENCE, estimate_proportion

#: Classes that the card names; the manifest has all.
_NAMED_CLASSES = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class CardFacts:
    """What only the owner of a model knows: its licence, data sets on the Hub, and tags. None is guessed."""

    license: str | None = None
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


def write_model_card(folder: Path, data: dict[str, Any], evidence: Evidence, facts: CardFacts) -> None:
    """Write the card of a manifest into the bundle."""
    (folder / CARD).write_text(model_card(data, evidence, facts), encoding="utf-8")


def model_card(data: dict[str, Any], evidence: Evidence, facts: CardFacts) -> str:
    """The card of a bundle with the manifest ``data``: YAML between lines of dashes, then Markdown."""
    student = data["student"]
    preprocessing = Preprocessing.from_json(student["preprocessing"])
    parts = [
        f"---\n{_front_matter(data, evidence, facts)}\n---",
        f"# {markdown_text(student['student'])}",
        f"An image classifier with {len(student['classes'])} classes, written and checked by kdexport "
        f"{data.get('kdexport', '')}. The checks at build time: {markdown_text(verdict_sentence(data))}. All of them "
        "are in report.html and report.md.",
        "\n".join(markdown_table(_targets(data, evidence))),
        "In brackets: intervals at 95 %, and what ran. The accuracy of a target that was not executed is that of its "
        "ONNX file in onnxruntime on a CPU.",
        "## Use with kdexport",
        "```sh\npip install 'kdexport[serve]'\nkdexport doctor .            # would this machine give these labels?\n"
        "kdexport predict . photo.jpg\nkdexport serve .\n```",
        "`kdexport pull hf://OWNER/NAME --out DIR` fetches it from the Hugging Face Hub and checks every file. A clone "
        "by git has more files than the manifest lists, and is refused.",
        "## Use with onnxruntime",
        f"`{MODEL}` takes float32 `input` (batch, 3, {preprocessing.image_size}, {preprocessing.image_size}) and gives "
        f"`logits` (batch, {len(student['classes'])}). The preprocessing belongs to the model: "
        f"{preprocessing.describe()}, / 255, minus the mean, / the standard deviation.",
        f"```python\n{snippet(preprocessing)}```",
        "## Limits",
        "\n".join(f"- {line}" for line in _limits(data)),
        "## Classes",
        _classes(student["classes"]),
    ]
    return "\n\n".join(parts) + "\n"


def snippet(preprocessing: Preprocessing) -> str:
    """Python that classifies ``photo.jpg`` with onnxruntime, numpy and Pillow, in the folder of the bundle."""
    return "\n".join([
        "import json", "", "import numpy as np", "import onnxruntime", "from PIL import Image, ImageOps", "",
        f'student = json.load(open("{MANIFEST}"))["student"]',
        'mean, std = (np.float32(student["preprocessing"][key]) for key in ("mean", "std"))', "", "",
        "def pixels(path):", *(f"    {line}" for line in _steps(preprocessing)), "", "",
        f'session = onnxruntime.InferenceSession("{MODEL}", providers=["CPUExecutionProvider"])',
        'images = (np.float32([pixels("photo.jpg")]) / 255 - mean) / std',
        '(logits,) = session.run(["logits"], {"input": images.transpose(0, 3, 1, 2)})',
        'print(student["classes"][logits[0].argmax()])', "",
    ])  # fmt: skip


def _steps(how: Preprocessing) -> list[str]:
    lines = ["image = Image.open(path)"]
    if how.orientation == "apply":
        lines.append("image = ImageOps.exif_transpose(image)")
    if how.background is not None:
        lines += [
            'image = image.convert("RGBA")',
            f'image = Image.alpha_composite(Image.new("RGBA", image.size, {(*how.background, 255)}), image)',
        ]
    lines.append('image = image.convert("RGB")')
    size, filter_ = how.image_size, f"Image.Resampling.{how.interpolation.upper()}"
    if how.geometry == "one_step":
        return [
            *lines, "width, height = image.size", f"half = {size} * min(width, height) / {how.resize} / 2",
            "box = (max(width / 2 - half, 0), max(height / 2 - half, 0),",
            "       min(width / 2 + half, width), min(height / 2 + half, height))",
            f"return np.asarray(image.resize(({size}, {size}), {filter_}, box=box))",
        ]  # fmt: skip
    sizes = {
        "squash": [f"width, height = {how.resize}, {how.resize}"],
        "pad": [
            f"ratio = max(image.size) / {how.resize}",
            "width, height = (max(round(side / ratio), 1) for side in image.size)",
        ],
        "crop": [
            "short = min(image.size)", f"width, height = (int({how.resize} * side / short) for side in image.size)",
        ],
    }[how.fit]  # fmt: skip
    lines += [*sizes, f"image = image.resize((width, height), {filter_})"]
    if how.fit == "pad" or how.resize < size:
        return [
            *lines, f'square = Image.new("RGB", ({size}, {size}), {how.pad_colour})',
            f"left, top = ({_START.format(size=size)} for side in image.size)",
            "square.paste(image, (left, top))", "return np.asarray(square)",
        ]  # fmt: skip
    return [
        *lines, f"left, top = (round((side - {size}) / 2) for side in image.size)",
        f"return np.asarray(image.crop((left, top, left + {size}, top + {size})))",
    ]  # fmt: skip


_START = "({size} - side) // 2 if side < {size} else -round((side - {size}) / 2)"


def _front_matter(data: dict[str, Any], evidence: Evidence, facts: CardFacts) -> str:
    from huggingface_hub import ModelCardData

    own = ["kdexport", "onnx", "knowledge-distillation"] if _teacher(data) else ["kdexport", "onnx"]
    described = ModelCardData(
        license=facts.license,
        library_name="kdexport",
        pipeline_tag="image-classification",
        tags=[*own, *facts.tags],
        datasets=list(facts.datasets) or None,
        metrics=["accuracy"],
        model_name=data["student"]["student"],
        eval_results=_results(data, evidence) or None,
    )
    return str(described.to_yaml(line_break="\n"))


def _results(data: dict[str, Any], evidence: Evidence) -> list[Any]:
    """Top-1 of each target whose own file ran on the validation images, as the entries of a model-index."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=_dataset(data),
            dataset_name=f"{_dataset(data)}, {data['task']['images']} images of the test split",
            metric_type="accuracy",
            metric_name=f"top-1, {target.name}",
            metric_value=round(target.top1.value, 6),
        )
        for target in target_facts(data, evidence)
        # Otherwise it is the accuracy of another file.
        if target.top1 is not None and not target.by_reference
    ]


def _dataset(data: dict[str, Any]) -> str:
    # The rest of a folder's name is a path of the machine that built it.
    recipe = data["provenance"].get("recipe")
    name = str(recipe["data"]["name"]).partition(":")[0] if isinstance(recipe, dict) and "data" in recipe else ""
    return {"": "own images", "folder": "own images"}.get(name, name)


def _teacher(data: dict[str, Any]) -> bool:
    return "teacher_top1" in data["provenance"].get("metrics", {})


def _targets(data: dict[str, Any], evidence: Evidence) -> Table:
    """The table of the report; a cell of two lines has the second one in brackets, because Markdown has one line."""
    table = targets_table(data, evidence)

    def cell(text: str) -> str:
        first, *rest = text.splitlines() or [""]
        return f"{first} ({', '.join(rest)})" if rest else first

    return replace(table, rows=tuple(tuple(map(cell, row)) for row in table.rows))


def _limits(data: dict[str, Any]) -> list[str]:
    lines = ["It gives one of its classes for every image, also for an image of something else."]
    task = data.get("task")
    if task is not None:
        count = round(task["reference_top1"] * task["images"])
        found = estimate_proportion(count, task["images"], ACCURACY_CONFIDENCE)
        lines.append(
            f"Top-1 of the unfused student: {found.value:.2%}, 90 % interval {found.low:.2%} to {found.high:.2%}, on "
            f"{task['images']:,} images of the test split of {markdown_text(_dataset(data))}. On images of another "
            "kind it can be lower."
        )
    absent = [name for name, entry in data["targets"].items() if entry["status"] != VERIFIED]
    if absent:
        lines.append(f"Built, but not run at build time: {', '.join(absent)}. kdexport verify runs them where it can.")
    undecided = sum(bool(check.get("undecided")) for check in data["parity"])
    if undecided:
        lines.append(f"{undecided} checks of accuracy are undecided: they would need more images.")
    kind = "computed images" if has_synthetic_images(data) else "images of the validation split"
    lines.append(f"golden/ holds {len(data['golden'])} {kind} with reference logits.")
    return lines


def _classes(names: Sequence[str]) -> str:
    shown = ", ".join(map(markdown_text, names[:_NAMED_CLASSES]))
    more = len(names) - _NAMED_CLASSES
    return f"{shown}, and {more:,} more in {MANIFEST}" if more > 0 else shown

"""Write a run folder of ``python -m training`` as a Markdown page: machine, recipe, one row for each epoch.

python benchmarks/training_report.py RUN --to docs/results/NAME.md [--title TEXT]
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

from kdexport.core.digests import tool_versions
from training.runs.record import device_name


def machine() -> str:
    """Processor, cores and versions in one line, without the name or paths of the machine."""
    versions = ", ".join(f"{name} {version}" for name, version in tool_versions("torch", "torchvision").items())
    return f"{device_name()}; Python {platform.python_version()}, {versions}"


def page(run: Path, title: str) -> str:
    """The page of one run, as Markdown."""
    recipe = json.loads((run / "recipe.json").read_text())["recipe"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = json.loads((run / "student" / "student.json").read_text())["provenance"]["metrics"]
    best = max(rows, key=lambda row: float(row["top1"]))
    losses = sorted(key for key in rows[0] if key.startswith("loss/"))
    header = ["epoch", "top-1", *[key.removeprefix("loss/") for key in losses], "learning rate", "images/s"]
    lines = [
        f"# {title}",
        "",
        f"- machine: {machine()}",
        f"- teacher: {recipe['teacher']['name']}, top-1 {metrics['teacher_top1']:.2%} on the test split, measured in "
        f"this run (its precision there: {recipe['train']['teacher_precision']})",
        f"- student after the last epoch: **{metrics['top1']:.2%}** top-1",
        f"- best epoch (chosen on the test split, therefore not the result): {best['top1']:.2%}, epoch {best['epoch']}",
        f"- seed {recipe['train']['seed']}, one run: no interval",
        "",
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
    ]
    for row in rows:
        cells = [str(row["epoch"]), f"{row['top1']:.2%}", *[f"{row[key]:.3f}" for key in losses]]
        rate, speed = f"{row['lr']:.4f}", f"{row['images_per_s']:.0f}"
        lines.append(f"| {' | '.join([*cells, rate, speed])} |")
    lines += ["", "## Recipe", "", "```json", json.dumps(_without_places(recipe), indent=1), "```", ""]
    return "\n".join(lines)


def _without_places(recipe: dict[str, Any]) -> dict[str, Any]:
    data = {**recipe["data"], "root": ""}
    return {**recipe, "data": data, "teacher": {**recipe["teacher"], "checkpoint": ""}}


def main() -> None:
    """Read the arguments and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--title", default="Distillation run")
    arguments = parser.parse_args()
    arguments.to.write_text(page(arguments.run, arguments.title))


if __name__ == "__main__":
    main()

"""The precision plans of a manifest in words and rows: what int8 costs without and with them, and why."""

from collections.abc import Iterator
from typing import Any

from kdexport.verify.pages import Table

TRADE_HEADER = ("plan", "top-1", "flips", "mean KL, nats", "size", "latency")


def plan_entries(data: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(targets, plan) of each plan of a manifest: targets of one form share one."""
    searched = [(name, entry["plan"]) for name, entry in data["targets"].items() if "plan" in entry]
    while searched:
        plan = searched[0][1]
        yield ", ".join(name for name, other in searched if other == plan), plan
        searched = [(name, other) for name, other in searched if other != plan]


def trade_rows(plan: dict[str, Any]) -> list[tuple[str, ...]]:
    """What the float32 graph, the plain cast and the chosen plan cost on the images of the search."""
    plain, chosen = plan["trades"][0], plan["trades"][plan["chosen"]]
    rows = [("float32", plan["float32"]), ("int8, no plan", plain)]
    if plan["chosen"]:
        rows.append((f"int8, {_plan_words(chosen)}", chosen))
    return [(name, *_costs(trade)) for name, trade in rows]


def plan_tables(data: dict[str, Any]) -> Iterator[Table]:
    """One table for each plan of a manifest."""
    for name, plan in plan_entries(data):
        yield Table(f"Precision plan of {name}", TRADE_HEADER, tuple(trade_rows(plan)), plan_note(plan))


def plan_note(plan: dict[str, Any]) -> str:
    """What was searched, what was found, and why."""
    budget = plan["budget"]
    parts = [
        f"{len(plan['trades'])} plans measured on {plan['images']:,} training images against the float32 graph (up to "
        f"{budget['flips']:.2%} flips and {budget['top1_drop']:.2%} top-1 lost allowed); rung D judges the chosen one "
        "on validation images. Latency: median of single images on one thread of onnxruntime."
    ]
    if plan["collapsed"]:
        parts.append("Without a plan int8 is another network.")
    parts += [f"{reason}." for reason in plan["reasons"]]
    if plan["kept"]:
        parts.append(f"Kept in float32: {', '.join(layer['node'] for layer in plan['kept'])}.")
    return " ".join(parts)


def _costs(trade: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{trade['top1']:.2%}",
        f"{trade['flips']:.2%}",
        "not finite" if trade["divergence"] is None else f"{trade['divergence']:.2g}",
        f"{trade['bytes'] / 1e3:,.0f} kB",
        "not run" if trade["latency_ms"] is None else f"{trade['latency_ms']:.3f} ms",
    )


def _plan_words(trade: dict[str, Any]) -> str:
    counts = ((trade["equalised"], "pair", "equalised"), (len(trade["kept"]), "layer", "in float32"))
    return ", ".join(f"{count} {what}{'s' * (count > 1)} {how}" for count, what, how in counts if count)

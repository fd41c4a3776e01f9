"""Draw docs/figures/kdiffusion.png from the code of the loss: python -m benchmarks.method_figures."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.diffusion import SCHEDULES, NoiseSchedule, expected_loss_coefficients, expected_loss_form
from training.quadratic import Form, loss_form

OUT = Path(__file__).parent.parent / "docs" / "figures" / "kdiffusion.png"
BRANCHES = 4
NAMES = {"cosine": "cosine", "ddpm_linear": "DDPM linear", "linear": "$b^2$ linear"}


def weights(axes: Axes) -> None:
    """v_k of each step, the noisiest first: the factor of the error of the branch that is used in the step."""
    for number, (name, label) in enumerate(NAMES.items()):
        steps = list(range(BRANCHES, 0, -1))
        schedule = SCHEDULES[name](BRANCHES)
        places = [index + 0.27 * (number - 1) for index in range(BRANCHES)]
        axes.bar(places, [schedule.steps[k - 1].v for k in steps], width=0.25, label=label)
        axes.set_xticks(range(BRANCHES), [f"k = {k}" for k in steps])
    axes.set(title="weight $v_k$ of a branch in its step", ylabel="$v_k$")
    axes.legend(fontsize="small")


def matrix(axes: Axes, form: Form, title: str, labels: list[str]) -> None:
    axes.imshow(
        form, cmap="Blues", vmin=0, vmax=max(map(max, loss_form(NoiseSchedule.cosine(BRANCHES).steps, [1.0] * 4)))
    )
    for i, row in enumerate(form):
        for j, value in enumerate(row):
            axes.text(
                j, i, f"{value:.3f}", ha="center", va="center", fontsize=7, color="white" if value > 0.2 else "black"
            )
    axes.set_xticks(range(BRANCHES), labels)
    axes.set_yticks(range(BRANCHES), labels)
    axes.set_title(title)


def shares(axes: Axes) -> None:
    """The part of the loss that depends on the mean of the branches, if all branches have the same error."""
    counts = list(range(1, 17))
    for name, label in NAMES.items():
        pairs = [expected_loss_coefficients(SCHEDULES[name](m)) for m in counts]
        part = [100 * m * beta / (alpha + m * beta) for m, (alpha, beta) in zip(counts, pairs, strict=True)]
        axes.plot(counts, part, marker="o", markersize=3, label=label)
    axes.axhline(100, color="0.4", linestyle="--", linewidth=1)
    axes.text(16, 96, '"Average"', ha="right", va="top", color="0.4", fontsize=8)
    axes.axhline(0, color="0.4", linestyle="--", linewidth=1)
    axes.text(16, 2, "per-branch $L_2$", ha="right", va="bottom", color="0.4", fontsize=8)
    axes.set(title=r"share of $\beta\,|\sum_j e_j|^2$ in the loss", xlabel="branches m", ylabel="%", ylim=(-4, 104))
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(0.0, 0.92))


def main() -> None:
    figure = Figure(figsize=(13.5, 3.4), layout="constrained")
    panels = figure.subplots(1, 4)
    weights(panels[0])
    cosine = NoiseSchedule.cosine(BRANCHES)
    steps = [f"k = {k}" for k in range(1, BRANCHES + 1)]
    branches = [f"j = {j}" for j in range(1, BRANCHES + 1)]
    matrix(panels[1], loss_form(cosine.steps, [1.0] * BRANCHES), "F in one order, by step", steps)
    matrix(panels[2], expected_loss_form(cosine), "E[F] over orders, by branch", branches)
    shares(panels[3])
    OUT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUT, dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    main()

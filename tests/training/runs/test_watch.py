import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kdexport.errors import TrainingError
from training.runs.watch import MAX_GROWTH, WINDOW, LossSums, LossWatch, sum_type


def losses(*values: float) -> dict[str, Tensor]:
    names = ("cross_entropy", "diffusion")
    return {name: torch.tensor(value) for name, value in zip(names, values, strict=False)}


def feed(watch: LossWatch, at: Callable[[int], dict[str, Tensor]], taken: list[int]) -> None:
    """Up to 1000 steps; ``taken`` has those that were accepted."""
    for step in range(1000):
        watch.add(at(step))
        taken.append(step)


def silent(means: dict[str, float], steps: int) -> None:
    """A callback that does nothing."""


def test_a_step_gives_back_the_sum_of_its_losses_with_its_gradient() -> None:
    weight = torch.tensor(3.0, requires_grad=True)
    watch = LossWatch(0, None, silent)
    total = watch.add({"a": weight * 2, "b": (weight**2).bfloat16()})
    total.backward()  # type: ignore[no-untyped-call]
    assert total.item() == 15.0
    assert weight.grad == 2 + 6


def test_means_are_those_of_all_steps_and_windows_those_of_a_few() -> None:
    heard: list[tuple[dict[str, float], int]] = []
    watch = LossWatch(0, None, lambda means, steps: heard.append((means, steps)))
    steps = [(1.0 + step, 0.5 * step - 3) for step in range(2 * WINDOW + 3)]
    for pair in steps:
        watch.add(losses(*pair))
    names, means = watch.means()
    assert names == ("cross_entropy", "diffusion")
    assert means.tolist() == pytest.approx([sum(values) / len(steps) for values in zip(*steps, strict=True)], rel=1e-6)
    assert [end for _, end in heard] == [WINDOW, 2 * WINDOW, 2 * WINDOW + 3]
    last = steps[2 * WINDOW :]
    assert list(heard[-1][0].values()) == pytest.approx([sum(v) / 3 for v in zip(*last, strict=True)], rel=1e-6)


def test_steps_that_are_added_at_once_have_the_sums_of_single_ones() -> None:
    values = torch.randn(23, 2, generator=torch.Generator().manual_seed(1)).exp().tolist()
    sums, ends = [], []
    heard: list[tuple[dict[str, float], int]] = []
    for together in (1, 3, 8, 23):
        own = LossSums()
        watch = LossWatch(0, None, lambda means, steps: heard.append((means, steps)), own)
        heard.clear()
        for begin in range(0, 23, together):
            group = values[begin : begin + together]
            for pair in group:
                own.note(losses(*pair))
            own.add()
            assert own.latest.tolist() == torch.tensor(group).tolist()
            watch.steps_done(len(group))
        sums.append(watch.means()[1].tolist())
        begin = 0
        for named, end in heard:
            expected = torch.tensor(values[begin:end], dtype=torch.float64).mean(0)
            assert list(named.values()) == pytest.approx(expected.tolist(), rel=1e-6)
            begin = end
        ends.append([end for _, end in heard])
    assert sums == [sums[0]] * 4
    assert ends == [[8, 16, 23], [9, 18, 23], [8, 16, 23], [23]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_noticed_within_one_window(bad: float) -> None:
    taken: list[int] = []
    with pytest.raises(TrainingError) as caught:
        feed(LossWatch(4, 2.0, silent), lambda step: losses(1.0, bad if step == WINDOW + 2 else 0.3), taken)
    assert len(taken) < 2 * WINDOW
    assert caught.value.message == (
        f"loss/diffusion is not finite in epoch 5, steps {WINDOW + 1} to {2 * WINDOW}: the run diverged."
    )
    assert all(key in caught.value.remedy for key in ("learning_rate", "warmup_epochs", "distiller.weight"))


def test_a_bad_loss_in_the_last_few_steps_is_noticed_at_the_end() -> None:
    watch = LossWatch(0, None, silent)
    watch.add(losses(math.nan, 1.0))
    with pytest.raises(TrainingError, match=r"loss/cross_entropy is not finite in epoch 1, steps 1 to 1:"):
        watch.means()


@pytest.mark.parametrize("reference", [None, 3.0])
def test_an_exploding_loss_stops_the_run_while_it_is_still_finite(reference: float | None) -> None:
    taken: list[int] = []
    with pytest.raises(TrainingError) as caught:
        feed(LossWatch(1, reference, silent), lambda step: losses(3.0 * 1.5 ** max(0, step - WINDOW)), taken)
    # 1.5^18 is the first to be 1000 times as large.
    assert len(taken) < 18 + 3 * WINDOW
    assert "The loss exploded in epoch 2" in caught.value.message
    assert f", but at most {3 * MAX_GROWTH:.3g} is allowed after an earlier mean of 3." in caught.value.message


def test_a_ramp_a_large_weight_and_a_negative_loss_are_no_explosion() -> None:
    watch = LossWatch(0, None, silent)
    for step in range(1, 800):
        # Attention transfer, weighted by 1000 and ramped, beside a small cross-entropy; a log-likelihood below zero.
        watch.add({"ce": torch.tensor(0.46), "at": torch.tensor(0.3 * step), "vid": torch.tensor(-400.0)})
    watch.means()
    # A loss that starts at almost nothing may grow to an ordinary size.
    tiny = LossWatch(0, 1e-6, silent)
    for _ in range(WINDOW):
        tiny.add(losses(6.0))
    tiny.means()


def test_sums_are_wide_on_every_device_that_can() -> None:
    assert sum_type(torch.device("cpu")) == sum_type(torch.device("cuda")) == torch.float64
    # torch has no float64 there, and raises TypeError.
    assert sum_type(torch.device("mps")) == torch.float32

"""`kdexport list`: students, teachers, methods and targets."""

from tests.conftest import Command


def test_lists_print_registered_names(here: Command) -> None:
    assert "mobilenetv2" in here("list", "students").stdout.split()
    assert {"resnet56", "resnet8"} <= set(here("list", "teachers").stdout.split())
    assert "kdiffusion" in here("list", "distillers").stdout.split()
    assert "trt-rtx-fp16" in here("list", "targets").stdout

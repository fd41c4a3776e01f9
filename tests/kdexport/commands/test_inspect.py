"""`kdexport inspect` of a bundle."""

from tests.conftest import Built, Command


def test_inspect_prints_the_input_of_the_student(built: Built, here: Command) -> None:
    done = here("inspect", built.bundle)
    assert done.exit_code == 0
    assert "float32 (batch, 3, 32, 32)" in done.stdout
    assert "mobilenetv2, 10 classes" in done.stdout

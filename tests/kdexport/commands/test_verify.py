"""`kdexport verify` of a bundle."""

from tests.conftest import Built, Command


def test_verify_passes_on_a_fresh_bundle(built: Built, here: Command) -> None:
    done = here("verify", built.bundle)
    assert done.exit_code == 0, done.stderr
    assert "is the trained student." in done.stdout
    assert "trt-rtx-fp16 never ran (built, not executed): " in done.stdout

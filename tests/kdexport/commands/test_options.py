"""Options as users type them."""

import pytest

from kdexport.commands.options import parse_batches, parse_on_inconclusive, parse_percentage
from kdexport.errors import ConfigError, UnknownNameError
from kdexport.timing.clocks import parse_clocks


@pytest.mark.parametrize(("text", "value"), [("2%", 0.02), ("0.1%", 0.001), (" 100 %", 1.0), ("0.000001%", 1e-8)])
def test_percentages_need_their_sign(text: str, value: float) -> None:
    assert parse_percentage("--x", text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["2", "0.02", "0%", "-2%", "101%", "nan%", "2%%", "", "2 percent", "1e1%", "\u0662%"])
def test_anything_but_a_percentage_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_percentage("--max-slowdown", text)
    expected = f"--max-slowdown must be a percentage above 0% and up to 100%, e.g. 2%; got {text!r}."
    assert (caught.value.message, caught.value.remedy) == (expected, "For example: --max-slowdown 2%")


def test_lists_drop_repeated_values_and_refuse_malformed_ones() -> None:
    assert parse_batches("1, 8,1") == (1, 8)
    assert parse_clocks("serve,host,serve") == ("serve", "host")
    for text in ("", "1,,2", "0", "-1", "a", "1.5", "123456", "\u0661"):
        with pytest.raises(ConfigError):
            parse_batches(text)
    with pytest.raises(UnknownNameError, match="no clock 'hots'"):
        parse_clocks("hots")
    assert [parse_on_inconclusive(text) for text in (None, "warn", "fail")] == ["exit", "warn", "fail"]
    with pytest.raises(UnknownNameError):
        parse_on_inconclusive("exit")

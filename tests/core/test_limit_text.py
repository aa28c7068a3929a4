from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit import Bandwidth, BucketConfiguration, InvalidConfigurationError
from ratelimit.core.int64 import MAX
from tests.strategies import bandwidths, configurations

SECOND = 10**9


@pytest.mark.parametrize(
    ("text", "bandwidth"),
    [
        ("100/minute", Bandwidth.greedy(100, 60)),
        ("10/second burst 50", Bandwidth.greedy(50, 1, refill_tokens=10)),
        ("1000/day intervally", Bandwidth.intervally(1000, 86_400)),
        ("100/5 minutes", Bandwidth.greedy(100, 300)),
        ("5/s", Bandwidth.greedy(5, 1)),
        ("20/hour initial 0", Bandwidth.greedy(20, 3600, initial_tokens=0)),
        ("7/min id login", Bandwidth.greedy(7, 60, id="login")),
        ("100 per minute", Bandwidth.greedy(100, 60)),
        ("  1_000 / 5min\tBURST 3 \n", Bandwidth.greedy(3, 300, refill_tokens=1000)),
        ("1/week", Bandwidth.greedy(1, 604_800)),
        ("3/250 ms", Bandwidth.greedy(3, 0.25)),
        ("3/20us", Bandwidth.greedy(3, 0.00002)),
        ("1/ns", Bandwidth.greedy(1, 1e-9)),
        ("5/hr id 9 initial 1 burst 7", Bandwidth.greedy(7, 3600, refill_tokens=5, initial_tokens=1, id="9")),
        ('5/d id "a \\"b\\"; \\u00e9"', Bandwidth.greedy(5, 86_400, id='a "b"; é')),
        (
            "5/day aligned 2024-01-01T12:00+02:00 adaptive",
            Bandwidth(
                capacity=5,
                refill_tokens=5,
                refill_period_nanos=86_400 * SECOND,
                refill_intervally=True,
                first_refill_millis=1_704_103_200_000,
                adaptive_initial_tokens=True,
            ),
        ),
    ],
)
def test_limits_are_read(text: str, bandwidth: Bandwidth) -> None:
    assert Bandwidth.parse(text) == bandwidth


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("100/60 s", "100/minute"),
        ("100/90 s", "100/90 seconds"),
        ("100/1500ms", "100/1500 ms"),
        ("10/s burst 10 initial 10", "10/second"),
        ("2/48h", "2/2 days"),
        ("2/14d", "2/2 weeks"),
        ("2/day intervally aligned 2024-01-01T00:00Z", "2/day aligned 2024-01-01T00:00:00Z"),
        ("2/day aligned @9223372036854775807", "2/day aligned @9223372036854775807"),
        ("2/day aligned @1704067200001", "2/day aligned 2024-01-01T00:00:00.001Z"),
        ('2/day id "x y"', '2/day id "x y"'),
    ],
)
def test_limits_are_printed_in_their_shortest_form(text: str, printed: str) -> None:
    assert str(Bandwidth.parse(text)) == printed


@given(bandwidths())
def test_every_bandwidth_comes_back_from_its_text(bandwidth: Bandwidth) -> None:
    assert Bandwidth.parse(str(bandwidth)) == bandwidth
    assert repr(bandwidth) == f"Bandwidth.parse({str(bandwidth)!r})"


@given(configurations())
def test_every_configuration_comes_back_from_its_text(configuration: BucketConfiguration) -> None:
    assert BucketConfiguration.parse(str(configuration)) == configuration


@pytest.mark.parametrize(
    ("text", "message", "marked"),
    [
        ("", "begins with a number of tokens", ""),
        ("ten/second", "begins with a number of tokens", "ten"),
        ("5.5/second", "begins with a number of tokens", "5.5"),
        ("-5/second", "begins with a number of tokens", "-5"),
        ("10", "a period is wanted", ""),
        ("10 second", "a period is wanted", "second"),
        ("10/fortnight", "unknown unit of time 'fortnight'", "fortnight"),
        ("10/100m", "unknown unit of time 'm'", "m"),
        ("10/", "a unit of time", ""),
        ("10/1.5 hours", "unknown unit of time '1.5'", "1.5"),
        ("0/second", "capacity must be an int from 1", "0"),
        ("10/0 s", "refill_period_nanos must be an int from 1", "0 s"),
        ("10/second burst 0", "capacity must be an int from 1", "0"),
        (f"{MAX + 1}/second", "capacity must be", str(MAX + 1)),
        ("9" * 41 + "/second", "too large", "9" * 41),
        (f"10/{'9' * 30} weeks", "refill_period_nanos must be", "9" * 30 + " weeks"),
        ("10/ns", "at most one per nanosecond", "10"),
        ("10/second burst", "burst wants", ""),
        ("10/second burst x", "burst wants", "x"),
        ("10/second burst 1 burst 2", "burst is given twice", "burst"),
        ("10/second initial -1", "initial wants", "-1"),
        ("10/second greedily", "'greedily' is no option", "greedily"),
        ("10/second/minute", "one period", "/"),
        ("10/second adaptive", "adaptive goes with aligned", "adaptive"),
        ("10/second initial 5 aligned @0 adaptive", "cannot be given together", "5"),
        ("10/second aligned tomorrow", "aligned wants a time", "tomorrow"),
        ("10/second aligned 2024-01-01T00:00", "needs an offset", "2024-01-01T00:00"),
        ("10/second aligned 1960-01-01T00:00Z", "first_refill_millis must be", "1960-01-01T00:00Z"),
        ('10/second id "x', "not closed", '"x'),
        ('10/second id "\\x"', "JSON", '"\\x"'),
        ("10/second id é", "id wants a name", "é"),
        ("10/second id", "id wants a name", ""),
        ("10/second; 5/minute", "one limit is wanted", ";"),
    ],
)
def test_an_error_points_at_the_place_that_is_wrong(text: str, message: str, marked: str) -> None:
    with pytest.raises(InvalidConfigurationError, match=message) as caught:
        Bandwidth.parse(text)
    _, line, marks = str(caught.value).split("\n")
    assert line == f"  {text}"
    begin, length = marks.index("^"), marks.count("^")
    assert line[begin : begin + length] == marked if marked else begin == len(line)


@pytest.mark.parametrize(
    ("text", "message", "begin"),
    [
        ("5/second; ten/minute", "begins with a number", 10),
        ("5/second;", "begins with a number", 9),
        ("5/s id a; 6/s; 7/s id a", "two bandwidths have the id 'a'", 22),
    ],
)
def test_an_error_in_a_later_limit_is_found(text: str, message: str, begin: int) -> None:
    with pytest.raises(InvalidConfigurationError, match=message) as caught:
        BucketConfiguration.parse(text)
    assert str(caught.value).split("\n")[2].index("^") - 2 == begin


def test_an_error_in_a_text_of_several_lines_shows_the_line() -> None:
    with pytest.raises(InvalidConfigurationError) as caught:
        BucketConfiguration.parse("5/second;\n\t6/sekunde;\n7/minute")
    assert str(caught.value).split("\n")[1:] == ["  \t6/sekunde;", "  \t  ^^^^^^^"]


@given(st.text(alphabet='0123456789/;" perburstinitialdayhousecmnk_\n\\@\t٣', max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        configuration = BucketConfiguration.parse(text)
    except InvalidConfigurationError as error:
        assert "^" in str(error)
    else:
        assert BucketConfiguration.parse(str(configuration)) == configuration

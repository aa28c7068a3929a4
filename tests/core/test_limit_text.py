from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit import Bandwidth, BucketConfiguration, InvalidConfigurationError
from ratelimit.core.numbers import MAX
from tests.support.strategies import bandwidths, configurations

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
        ("10000/month tz Europe/Berlin", Bandwidth.calendar(10_000, "month", tz="Europe/Berlin")),
        ("10000 requests per Month", Bandwidth.calendar(10_000, "month")),
        ("10/1 year", Bandwidth.calendar(10, "year")),
        ("10/d calendar", Bandwidth.calendar(10, "day")),
        ("10/week TZ Asia/Kolkata id x", Bandwidth.calendar(10, "week", tz="Asia/Kolkata", id="x")),
        ("10/day", Bandwidth.greedy(10, 86_400)),
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
        ("2/months tz UTC", "2/month"),
        ("2/day tz UTC calendar", "2/day calendar"),
        ("2/1 week id a tz Europe/Berlin", "2/week tz Europe/Berlin id a"),
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
        (" ;, |", "begins with a number of tokens", ""),
        ("ten/second", "begins with a number of tokens", "ten"),
        ("-5/second", "begins with a number of tokens", "-5"),
        ("10", "a period must follow", ""),
        ("10 second", "a period must follow", "second"),
        ("10 requests", "a period must follow", ""),
        ("10rps", "a period must follow", "rps"),
        ("10/fortnight", "unknown unit of time 'fortnight'", "fortnight"),
        ("10/100mm", "unknown unit of time 'mm'", "mm"),
        ("10/2 months", "must be one month: write 10/60 days", "2 months"),
        ("10 per 2 Years", "must be one year: write 10/730 days", "2 Years"),
        (
            "10/1.5 months",
            "the length of a period must be a whole number in digits; got '1.5': write 10/45 days",
            "1.5",
        ),
        ("10/0 months", "must be one month", "0 months"),
        ("10/2 days tz UTC", "tz goes with a day, a week, a month or a year", "tz"),
        ("10/hour calendar", "calendar goes with a day, a week, a month or a year", "calendar"),
        ("10/month burst 20", "burst does not go with a period of the calendar", "burst"),
        ("10/day initial 5 calendar", "initial does not go with a period of the calendar", "initial"),
        ("10/day calendar intervally", "intervally does not go with a period of the calendar", "intervally"),
        ("10/day tz", "a time zone must follow tz", ""),
        ("10/day tz Europe/Nowhere", "tz must be a name of the time zone database", "Europe/Nowhere"),
        ("10/day tz Europe", "tz must be a name of the time zone database", "Europe"),
        ("10/day tz ../Berlin", "tz must be a name of the time zone database", "../Berlin"),
        ("100_000_000_000_000/month", "capacity must be an int from 1 to 2", "100_000_000_000_000"),
        ("100/300", "a unit of time is missing: write 100/300 seconds", ""),
        ("10/", "a unit of time is missing: use ns", ""),
        ("0/second", "capacity must be an int from 1", "0"),
        ("10/0 s", "refill_period_nanos must be an int from 1", "0 s"),
        ("10/second burst 0", "capacity must be an int from 1", "0"),
        (f"{MAX + 1}/second", "capacity must be", str(MAX + 1)),
        ("9" * 41 + "/second", "at most 40 digits", "9" * 41),
        (f"10/{'9' * 30} weeks", "refill_period_nanos must be", "9" * 30 + " weeks"),
        ("10/ns", "at most one per nanosecond", "10"),
        ("10/second burst", "must follow burst", ""),
        ("10/second burst x", "must follow burst", "x"),
        ("10/second burst=20", "write burst 20, or burst 21 for what nginx calls burst=20", "burst=20"),
        ("10/second burst 1 burst 2", "burst is given twice", "burst"),
        ("10/second initial -1", "must follow initial", "-1"),
        ("10/second greedily", "an option must be .*; got 'greedily'", "greedily"),
        ("10/second/minute", "one period", "/"),
        ("10/second adaptive", "adaptive goes with aligned", "adaptive"),
        ("10/second initial 5 aligned @0 adaptive", "initial_tokens must be None", "5"),
        ("10/second aligned tomorrow", "a time must follow aligned", "tomorrow"),
        ("10/second aligned 2024-01-01T00:00", "needs an offset", "2024-01-01T00:00"),
        ("10/second aligned 1960-01-01T00:00Z", "first_refill_millis must be", "1960-01-01T00:00Z"),
        ('10/second id "x', "not closed", '"x'),
        ('10/second id "\\x"', "JSON", '"\\x"'),
        ("10/second id é", "a name must follow id", "é"),
        ("10/second id", "a name must follow id", ""),
        ("10/second; 5/minute", "must be one limit", "5"),
        ("10/second 5/minute", "must be separated", "5"),
        ("10/second and 5/minute", "must be separated", "and"),
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
        ("5/second | minute", "begins with a number", 11),
        ("5/s id a; 6/s; 7/s id a", "id must differ between bandwidths; got 'a' twice", 22),
    ],
)
def test_an_error_in_a_later_limit_is_found(text: str, message: str, begin: int) -> None:
    with pytest.raises(InvalidConfigurationError, match=message) as caught:
        BucketConfiguration.parse(text)
    assert str(caught.value).split("\n")[2].index("^") - 2 == begin


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r", ";\n"])
def test_an_error_in_a_text_of_several_lines_shows_the_line(line_end: str) -> None:
    with pytest.raises(InvalidConfigurationError) as caught:
        BucketConfiguration.parse(line_end.join(["5/second", "\t6/sekunde", "7/minute"]))
    assert str(caught.value).split("\n")[1:] == [f"  \t6/sekunde{line_end.strip()}", "  \t  ^^^^^^^"]


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("10 per 1 minute, 5/second", "10/minute; 5/second"),
        ("10/hour\n100/day", "10/hour; 100/day"),
        ("10/hour\r\n100/day\r\n", "10/hour; 100/day"),
        ("1/hour|10/day", "1/hour; 10/day"),
        ("100/day, 500/7days", "100/day; 500/week"),
        ("10/minute,1000/hour", "10/minute; 1000/hour"),
        ("10/minute burst 50,20/hour", "10/minute burst 50; 20/hour"),
        ("5/m", "5/minute"),
        ("5/M", "5/minute"),
        ("100/5m", "100/5 minutes"),
        ("10r/s", "10/second"),
        ("30r/m", "30/minute"),
        ("10 requests per second", "10/second"),
        ("100perhour", "100/hour"),
        ("100/minute;", "100/minute"),
        ("\n;100/minute;;\n , 5/s |\n", "100/minute; 5/second"),
        ("100 per day", "100/day"),
        ("10/second\n  burst 20\n1000/day\n  id daily", "10/second burst 20; 1000/day id daily"),
        ("10/second id a,5/minute id b|6/hour", "10/second id a; 5/minute id b; 6/hour"),
        ('5/d id "a,b|c;\\n",6/d', '5/day id "a,b|c;\\n"; 6/day'),
        ("5/d aligned 2024-01-01T00:00Z,6/d", "5/day aligned 2024-01-01T00:00:00Z; 6/day"),
        ("5/d aligned 2024-01-01T00:00:00,001Z", "5/day aligned 2024-01-01T00:00:00.001Z"),
    ],
)
def test_what_other_libraries_write_is_read(text: str, printed: str) -> None:
    assert str(BucketConfiguration.parse(text)) == printed


@pytest.mark.parametrize(
    ("text", "meant", "marked"),
    [
        ("1,000/minute", "1000/minute", "1,000"),
        ("1,000,000/day", "1000000/day", "1,000,000"),
        ("10/second, 1,000/hour", "1000/hour", "1,000"),
        ("10/second,1,000/hour", "1000/hour", "1,000"),
        ("1,000 per 5 minutes burst 2,000", "1000/5 minutes", "1,000"),
        ("1 000/minute", "1000/minute", "1 000"),
        ("1\N{NO-BREAK SPACE}000/minute", "1000/minute", "1\N{NO-BREAK SPACE}000"),
        ("1'000/minute", "1000/minute", "1'000"),
        ("1.000.000/day", "1000000/day", "1.000.000"),
        ("1.000/minute", "1000/minute or 1/minute", "1.000"),
        ("0.5/second", "1/2 seconds", "0.5"),
        ("1.5/second", "3/2 seconds", "1.5"),
        ("0,5/second", "1/2 seconds", "0,5"),
        (".5r/s", "1/2 seconds", ".5"),
        ("0.1/30 minutes", "1/5 hours", "0.1"),
        ("10/1.5 hours", "10/90 minutes", "1.5"),
        ("0.5/1.5 hours", "1/3 hours", "1.5"),
        ("10/1,500 ms", "10/1500 ms", "1,500"),
        ("10/second burst 1,000", "1000, or put a semicolon between two limits", "1,000"),
        ("10/second burst 50,100/minute", "50100, or put a semicolon between two limits", "50,100"),
    ],
)
def test_an_error_about_a_number_says_what_is_meant(text: str, meant: str, marked: str) -> None:
    with pytest.raises(InvalidConfigurationError) as caught:
        BucketConfiguration.parse(text)
    message, line, marks = str(caught.value).split("\n")
    assert message.endswith(f"must be a whole number in digits; got {marked!r}: write {meant}")
    assert line[marks.index("^") : len(marks)] == marked


@given(st.decimals("0.0001", 10**6, places=4), st.integers(1, 100), st.sampled_from(["second", "minute", "hour"]))
def test_a_decimal_rate_is_written_as_an_equal_one_in_whole_numbers(rate: Decimal, count: int, unit: str) -> None:
    with pytest.raises(InvalidConfigurationError) as caught:
        Bandwidth.parse(f"{rate:f}/{count} {unit}")
    meant = Bandwidth.parse(str(caught.value).split("\n")[0].rpartition("write ")[2])
    period = Bandwidth.parse(f"1/{count} {unit}").refill_period_nanos
    assert Fraction(meant.refill_tokens, meant.refill_period_nanos) == Fraction(rate) / period


@given(configurations(), st.sampled_from([";", ",", "|", "\n", "\r\n", " ,\n;\t"]))
def test_every_separator_stands_between_printed_limits(configuration: BucketConfiguration, separator: str) -> None:
    text = separator.join(map(str, configuration))
    if separator == ",":
        text = ", ".join(map(str, configuration))  # without the space "burst 1,100/s" would be a thousand
    assert BucketConfiguration.parse(text) == configuration
    assert BucketConfiguration.parse(f"{separator}{text}{separator}") == configuration


@given(st.text(alphabet='0123456789/;,|." perburstinitialdayhousecmnk_\r\n\\@\t٣', max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        configuration = BucketConfiguration.parse(text)
    except InvalidConfigurationError as error:
        assert "^" in str(error)
    else:
        assert BucketConfiguration.parse(str(configuration)) == configuration

"""Quotas of calendar periods: when these begin, what is stored of them, and what is left in the next one."""

from __future__ import annotations

import pickle
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit import Bandwidth, BucketConfiguration, InvalidArgumentError, InvalidConfigurationError, TokensInheritance
from ratelimit.core.algorithm import decode, encode
from ratelimit.core.commands import (
    Command,
    ConsumeAsMuchAsPossible,
    PeriodicTerms,
    ReplaceConfiguration,
    Terms,
    TryConsume,
    TryConsumeAndReturnRemaining,
    execute,
    terms_of,
)
from ratelimit.core.token_bucket import periods
from ratelimit.core.token_bucket.periods import UNITS, Period, period_at
from ratelimit.core.token_bucket.share import share_of

SECOND = 10**9
RESET, AS_IS = TokensInheritance.RESET, TokensInheritance.AS_IS
ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "America/Sao_Paulo", "Pacific/Apia"]


def at(*moment: int) -> int:
    """Return a moment of UTC in seconds since the epoch."""
    return int(datetime(*moment, tzinfo=UTC).timestamp())  # type: ignore[misc,arg-type]


def nanos(*moment: int) -> int:
    return at(*moment) * SECOND


class TestPeriods:
    @pytest.mark.parametrize(
        ("unit", "tz", "moment", "period"),
        [
            ("day", "UTC", (2026, 11, 27, 17), Period(at(2026, 11, 27), at(2026, 11, 28), "2026-11-27")),
            ("week", "UTC", (2026, 11, 29, 23, 59, 59), Period(at(2026, 11, 23), at(2026, 11, 30), "2026-W48")),
            ("week", "UTC", (2027, 1, 1), Period(at(2026, 12, 28), at(2027, 1, 4), "2026-W53")),
            ("month", "UTC", (2026, 2, 28), Period(at(2026, 2, 1), at(2026, 3, 1), "2026-02")),
            ("month", "UTC", (2028, 2, 29, 23), Period(at(2028, 2, 1), at(2028, 3, 1), "2028-02")),
            ("month", "UTC", (2026, 12, 31), Period(at(2026, 12, 1), at(2027, 1, 1), "2026-12")),
            ("year", "UTC", (2028, 12, 31), Period(at(2028, 1, 1), at(2029, 1, 1), "2028")),
            # Summer time begins and ends within the month, the week and the day.
            ("month", "Europe/Berlin", (2026, 3, 1), Period(at(2026, 2, 28, 23), at(2026, 3, 31, 22), "2026-03")),
            ("week", "Europe/Berlin", (2026, 3, 29), Period(at(2026, 3, 22, 23), at(2026, 3, 29, 22), "2026-W13")),
            ("day", "Europe/Berlin", (2026, 3, 29), Period(at(2026, 3, 28, 23), at(2026, 3, 29, 22), "2026-03-29")),
            ("day", "Europe/Berlin", (2026, 10, 25), Period(at(2026, 10, 24, 22), at(2026, 10, 25, 23), "2026-10-25")),
            (
                "day",
                "America/New_York",
                (2026, 11, 1, 12),
                Period(at(2026, 11, 1, 4), at(2026, 11, 2, 5), "2026-11-01"),
            ),
            (
                "day",
                "Asia/Kolkata",
                (2026, 1, 1, 20),
                Period(at(2026, 1, 1, 18, 30), at(2026, 1, 2, 18, 30), "2026-01-02"),
            ),
            # This day has no midnight: it begins at one o'clock.
            (
                "day",
                "America/Sao_Paulo",
                (2017, 10, 15, 12),
                Period(at(2017, 10, 15, 3), at(2017, 10, 16, 2), "2017-10-15"),
            ),
            # This one begins in the middle of an hour that is left out.
            (
                "day",
                "America/Toronto",
                (1919, 3, 31, 12),
                Period(at(1919, 3, 31, 4, 30), at(1919, 4, 1, 4), "1919-03-31"),
            ),
            # The date comes twice for an hour, beginning a minute after midnight.
            (
                "day",
                "America/St_Johns",
                (2010, 11, 7, 3),
                Period(at(2010, 11, 7, 2, 30), at(2010, 11, 8, 3, 30), "2010-11-07"),
            ),
            # The thirtieth does not exist.
            (
                "day",
                "Pacific/Apia",
                (2011, 12, 30, 10),
                Period(at(2011, 12, 30, 10), at(2011, 12, 31, 10), "2011-12-31"),
            ),
        ],
    )
    def test_a_period_is_that_of_the_local_date(
        self, unit: str, tz: str, moment: tuple[int, ...], period: Period
    ) -> None:
        assert period_at(unit, tz, at(*moment)) == period

    @given(st.sampled_from(UNITS), st.sampled_from(ZONES), st.integers(at(1971, 1, 1), at(2400, 1, 1)))
    def test_periods_follow_each_other_without_a_gap(self, unit: str, tz: str, seconds: int) -> None:
        period = period_at(unit, tz, seconds)
        assert period.begin <= seconds < period.end
        assert period_at(unit, tz, period.begin) == period_at(unit, tz, period.end - 1) == period
        following = period_at(unit, tz, period.end)
        assert following.begin == period.end
        assert following.name > period.name

    @given(st.sampled_from(ZONES), st.dates(date(1971, 1, 1), date(2400, 1, 1)))
    def test_a_day_begins_with_its_date(self, tz: str, day: date) -> None:
        noon = datetime(day.year, day.month, day.day, 12, tzinfo=periods.zone_of(tz))
        period = period_at("day", tz, int(noon.timestamp()))
        first = datetime.fromtimestamp(period.begin, periods.zone_of(tz))
        before = datetime.fromtimestamp(period.begin - 1, periods.zone_of(tz))
        assert period.name == first.date().isoformat()
        assert before.date() < first.date()

    def test_without_a_database_the_error_names_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> None:
            raise KeyError(name)

        monkeypatch.setattr(periods, "ZoneInfo", missing)
        monkeypatch.setattr(periods, "available_timezones", set)
        assert str(Bandwidth.calendar(5, "month")) == "5/month"
        with pytest.raises(InvalidConfigurationError, match="install the package tzdata"):
            Bandwidth.calendar(5, "month", tz="Antarctica/Troll")


class TestLimits:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"capacity": 0}, "capacity must be an int from 1 to 2"),
            ({"capacity": 2**46 + 1}, "capacity must be an int from 1 to 2"),
            ({"capacity": True}, "capacity must be an int"),
            ({"period": "hour"}, "period must be day, week, month or year; got 'hour'"),
            ({"period": 60}, "period must be day, week, month or year; got 60"),
            ({"tz": None}, "tz must be a str; got None"),
            ({"tz": "Mars/Olympus"}, "tz must be a name of the time zone database"),
            ({"id": 5}, "id must be a str"),
        ],
    )
    def test_values_out_of_range_are_refused(self, values: dict[str, Any], message: str) -> None:
        arguments: dict[str, Any] = {"capacity": 5, "period": "day"} | values
        with pytest.raises(InvalidConfigurationError, match=message):
            Bandwidth.calendar(**arguments)

    def test_quotas_of_one_period_and_zone_differ_in_their_ids(self) -> None:
        with pytest.raises(InvalidConfigurationError, match="id must differ between quotas"):
            BucketConfiguration.parse("5/month; 6/month")
        assert len(BucketConfiguration.parse("5/month; 6/month id x; 7/month tz Europe/Berlin; 3/year")) == 4

    def test_limits_with_quotas_are_values(self) -> None:
        limits = BucketConfiguration.parse("10/second; 5/month tz Europe/Berlin id x")
        again = BucketConfiguration.parse(str(limits))
        again.at(0)
        assert again == limits
        assert hash(again) == hash(limits)
        assert repr(limits) == "BucketConfiguration.parse('10/second; 5/month tz Europe/Berlin id x')"
        assert pickle.loads(pickle.dumps(limits)) == limits
        assert limits != BucketConfiguration.parse("10/second; 5/month id x")
        assert limits != limits.at(0)

    def test_what_is_stored_is_an_aligned_bandwidth_that_the_period_names(self) -> None:
        limits = BucketConfiguration.parse("100/second burst 200; 5/month tz Europe/Berlin; 2/day calendar id x")
        end = datetime(2026, 10, 31, 23, tzinfo=UTC)
        assert limits.at(nanos(2026, 10, 20)).bandwidths == (
            Bandwidth.greedy(200, 1, refill_tokens=100),
            Bandwidth.intervally_aligned(
                5, timedelta(days=31, hours=1), first_refill=end, id="month 2026-10 Europe/Berlin"
            ),
            Bandwidth.intervally_aligned(
                2, 86_400, first_refill=datetime(2026, 10, 21, tzinfo=UTC), id="day 2026-10-20 x"
            ),
        )

    def test_limits_without_quotas_are_stored_as_they_are(self) -> None:
        limits = BucketConfiguration.parse("5/day; 6/week")
        assert limits.at(0) is limits

    def test_bandwidths_beside_a_quota_get_ids_where_they_could_be_confused(self) -> None:
        stored = BucketConfiguration.parse("5/second; 9/month; 6/minute; 7/hour id x").at(0)
        assert [bandwidth.id for bandwidth in stored] == ["limit 1", "month 1970-01", "limit 3", "x"]

    def test_a_share_of_a_quota_is_a_smaller_quota(self) -> None:
        limits = BucketConfiguration.parse("90/minute; 10/month tz Europe/Berlin id x")
        shared = BucketConfiguration.parse("30/minute; 3/month tz Europe/Berlin id x")
        assert share_of(limits, Fraction(1, 3)) == shared


def terms(text: str, version: int | None = None, inheritance: TokensInheritance = RESET) -> Terms:
    return terms_of(BucketConfiguration.parse(text), version, inheritance)


def run(of: Terms, *steps: tuple[int, Command[Any]], state: Any = None) -> tuple[Any, list[Any]]:
    """Run commands at their times; return the state, as its bytes have it, and the answers."""
    answers = []
    for now, command in steps:
        after, answer = execute(command, of, state, now)
        state = state if after is None else decode(encode(after))
        answers.append(answer)
    return state, answers


ALL = ConsumeAsMuchAsPossible()
JANUARY, FEBRUARY, MARCH = nanos(2026, 1, 1), nanos(2026, 2, 1), nanos(2026, 3, 1)


class TestTurns:
    def test_a_quota_is_new_in_each_period_and_not_before(self) -> None:
        quota = terms("5/month")
        steps = [(JANUARY, ALL), (FEBRUARY - 1, ALL), (FEBRUARY, ALL), (MARCH - 1, ALL), (MARCH, ALL)]
        state, answers = run(quota, *((now, command) for now, command in steps))
        assert answers == [5, 0, 5, 0, 5]
        assert state.consumed_tokens == 15

    @pytest.mark.parametrize("text", ["7/month", "7/month tz Europe/Berlin", "7/week tz America/New_York", "7/year"])
    @given(data=st.data())
    def test_never_more_than_the_quota_in_a_period(self, text: str, data: st.DataObject) -> None:
        (quota,) = BucketConfiguration.parse(text)
        of, state, now = terms(text), None, nanos(2027, 12, 20)
        taken: dict[str, int] = {}
        for days in data.draw(st.lists(st.floats(0, 40), max_size=30)):
            now += round(days * 86_400 * SECOND)
            state, (tokens,) = run(of, (now, ConsumeAsMuchAsPossible(3)), state=state)
            name = period_at(quota.unit, quota.tz, now // SECOND).name  # type: ignore[attr-defined]
            taken[name] = taken.get(name, 0) + tokens
            assert tokens == min(3, 7 - (taken[name] - tokens))

    @pytest.mark.parametrize("tz", ZONES)
    @pytest.mark.parametrize("begin", [(2011, 12, 27), (2017, 10, 13), (2026, 3, 26), (2026, 10, 23), (2026, 10, 30)])
    def test_a_refusal_tells_the_end_of_the_day_to_the_nanosecond(self, tz: str, begin: tuple[int, ...]) -> None:
        of, state = terms(f"4/day tz {tz}"), None
        for hour in range(96):
            now = nanos(*begin) + hour * 3_600 * SECOND + 7
            state, (_, probe) = run(of, (now, ALL), (now, TryConsumeAndReturnRemaining(1)), state=state)
            end = period_at("day", tz, now // SECOND).end * SECOND
            assert not probe.consumed
            assert probe.nanos_to_wait_for_refill == probe.nanos_to_wait_for_reset == end - now
            before, then = run(of, (end - 1, TryConsume(1)), (end, TryConsume(4)), state=state)[1]
            assert (before, then) == (False, True)

    @pytest.mark.parametrize(
        "beside", ["10/second burst 50", "10/second burst 50 id rate", "10/second burst 50; 600/minute burst 900"]
    )
    def test_bandwidths_beside_the_quota_keep_their_tokens(self, beside: str) -> None:
        state, answers = run(terms(f"{beside}; 1000/month"), (FEBRUARY - SECOND, ALL), (FEBRUARY, ALL))
        assert answers == [50, 10]
        assert len(state.configuration) == beside.count(";") + 2

    def test_several_quotas_turn_by_themselves(self) -> None:
        state, answers = run(
            terms("10/month tz Europe/Berlin; 4/day calendar; 7/week tz America/New_York"),
            # Monday begins at five o'clock, the month an hour before the last day does.
            *((nanos(2026, 11, 29, 12), ALL), (nanos(2026, 11, 30, 0), ALL), (nanos(2026, 11, 30, 5), ALL)),
            *((nanos(2026, 11, 30, 22, 59), ALL), (nanos(2026, 11, 30, 23), ALL), (nanos(2026, 12, 1), ALL)),
        )
        assert answers == [4, 3, 1, 0, 0, 4]
        assert state.available_tokens == 0

    def test_a_debt_of_the_quota_ends_with_its_period(self) -> None:
        state, _ = run(terms("5/month"), (JANUARY, ALL))
        assert run(terms("5/month"), (FEBRUARY, ALL), state=state.consumed(100))[1] == [5]

    def test_a_clock_that_goes_back_over_a_turn_gives_nothing(self) -> None:
        _, answers = run(terms("5/month"), (FEBRUARY, ConsumeAsMuchAsPossible(3)), (FEBRUARY - 1, ALL), (FEBRUARY, ALL))
        assert answers == [3, 2, 0]


class TestVersions:
    def test_the_number_of_the_period_is_part_of_the_version(self) -> None:
        quarters = at(2026, 1, 31, 23) // 900
        for version, expected in ((None, quarters), (0, quarters), (3, 3 * 2**24 + quarters)):
            state, _ = run(terms("5/month tz Europe/Berlin; 1/year", version), (FEBRUARY, ALL))
            assert state.configuration_version == expected

    def test_numbers_of_periods_have_room_for_four_centuries(self) -> None:
        assert at(2448, 1, 1) // 900 < 2**24

    @pytest.mark.parametrize("inheritance", TokensInheritance)
    def test_the_inheritance_of_the_caller_is_for_its_own_versions(self, inheritance: TokensInheritance) -> None:
        old, new = terms("10/hour; 50/month", 1, inheritance), terms("20/hour; 50/month", 2, inheritance)
        state, (taken,) = run(old, (FEBRUARY - 1, ConsumeAsMuchAsPossible(6)))
        assert taken == 6
        turned, (_,) = run(old, (FEBRUARY, TryConsume(1)), state=state)
        assert [one.current_size for one in turned.bandwidth_states] == [3, 49]
        raised, (_,) = run(new, (FEBRUARY, TryConsume(1)), state=turned)
        expected = {"RESET": (19, 49), "AS_IS": (2, 48), "PROPORTIONALLY": (5, 48), "ADDITIVE": (12, 48)}
        assert tuple(one.current_size for one in raised.bandwidth_states) == expected[inheritance.name]

    def test_without_a_version_tokens_are_kept_from_the_limits_before_the_quota(self) -> None:
        state, _ = run(Terms(BucketConfiguration.parse("10/hour")), (JANUARY, ConsumeAsMuchAsPossible(6)))
        state, answers = run(terms("10/hour; 50/month"), (JANUARY, ALL), state=state)
        assert answers == [4]

    def test_a_lower_version_of_a_later_period_replaces_nothing(self) -> None:
        state, _ = run(terms("5/month", 2), (JANUARY, TryConsume(1)))
        after, (taken,) = run(terms("9/month", 1), (FEBRUARY, ALL), state=state)
        assert taken == 5
        assert after.configuration == state.configuration

    @pytest.mark.parametrize("version", [-1, 2**39])
    def test_versions_leave_room_for_the_period(self, version: int) -> None:
        with pytest.raises(InvalidArgumentError, match=r"from 0 to 2\*\*39 - 1 with calendar quotas"):
            terms("5/month", version)
        assert isinstance(terms("5/month", 2**39 - 1), PeriodicTerms)
        assert terms("5/day", version).version == version

    def test_a_replaced_configuration_has_the_present_period(self) -> None:
        limits = BucketConfiguration.parse("9/month")
        state, (_, _, taken) = run(
            terms("5/month"), (JANUARY, ALL), (JANUARY, ReplaceConfiguration(limits, AS_IS)), (JANUARY, ALL)
        )
        assert taken == 0
        assert state.configuration == limits.at(JANUARY)
        assert run(terms("5/month"), (FEBRUARY, ALL), state=state)[1] == [5]

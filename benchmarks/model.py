"""What takes part, and what was measured: plain data, and the arithmetic of medians and ratios."""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

OURS: Final = "ratelimit-redis"


class Kind(Enum):
    """The part that a contender plays in a ratio."""

    OURS = "ours"
    PEER = "peer"
    """A published library."""
    TEXTBOOK = "textbook"
    """A script of a few lines, written here, over redis-py; counts as a peer."""
    FLOOR = "floor"
    """The commands alone, without a limiter around them."""
    PART = "part"
    """Some of this library without the rest."""


@dataclass(frozen=True)
class Entrant:
    """A contender, as the results know it.

    :param token_bucket: whether it admits what a token bucket does, by tokens and a time of refill.
    :param single_script: whether the server decides, in one script, without a state on the client.
    :param asks_redis: whether every decision asks the server.
    :param several: whether it decides several limits in one step.
    :param headers: whether it sends fields that say how much of a limit is left.
    """

    name: str
    kind: Kind
    token_bucket: bool = False
    single_script: bool = False
    asks_redis: bool = True
    several: bool = False
    headers: bool = False

    @property
    def is_peer(self) -> bool:
        return self.kind in (Kind.PEER, Kind.TEXTBOOK)


@dataclass(frozen=True)
class Limit:
    """A number of tokens in a number of seconds.

    :param burst: the tokens that can be spent at once, where they are not those of one period.
    """

    tokens: int
    seconds: int
    burst: int | None = None

    @property
    def capacity(self) -> int:
        return self.tokens if self.burst is None else self.burst


ROOMY: Final = Limit(1_000_000, 1)
"""Never reached by any of them."""
TIGHT: Final = Limit(10, 86_400)
"""Exhausted by the warm-up."""


@dataclass(frozen=True)
class Plan:
    """Limits, and what they are to answer.

    :param id: the end of the ids of its tables; empty for the limit that is never reached.
    :param text: the limits, as this library reads them.
    :param refused: the share of the decisions that is for keys that are used up.
    """

    id: str
    text: str
    limits: tuple[Limit, ...]
    refused: float = 0.0

    def table(self, id: str) -> str:
        """Return the id of the table that shows this plan."""
        return f"{id}-{self.id}" if self.id else id

    def title(self, title: str) -> str:
        return f"{title}, {self.text}" if self.id else title


NEVER_REACHED: Final = Plan("", "1000000/second", (ROOMY,))
PER_MINUTE: Final = Plan("minute", "100/minute", (Limit(100, 60),), 0.1)
PER_DAY: Final = Plan("day", "1000/day", (Limit(1_000, 86_400),), 0.1)
TWO_LIMITS: Final = Plan("two", "10/second burst 50; 1000/hour", (Limit(10, 1, burst=50), Limit(1_000, 3_600)), 0.1)
PEOPLES: Final = (PER_MINUTE, PER_DAY, TWO_LIMITS)
"""Limits as people have them, by which a tenth of the decisions is refused."""
PLANS: Final = (NEVER_REACHED, *PEOPLES)


@dataclass(frozen=True)
class Setup:
    """What a contender is made from.

    :param connections: as many as there are threads or tasks, so that none waits for another's.
    :param own_keys: whether floors add the name of the client to the key, because all clients share one.
    :param timeout: seconds that a decision of this library may take; the same as for the peers, whose URL has theirs,
        because a crowd on a busy machine takes its time.
    """

    url: str
    limits: tuple[Limit, ...] = (ROOMY,)
    connections: int = 1
    own_keys: bool = False
    timeout: float = 30.0


Hit = Callable[[str], object]
"""Asks for one token of a key; true where it was granted."""
AsyncHit = Callable[[str], Awaitable[object]]


@dataclass(frozen=True)
class Contender:
    """How to open one, in each face that it has.

    :param quick: whether it takes part in the short form.
    """

    entrant: Entrant
    sync: Callable[[Setup], AbstractContextManager[Hit]] | None = None
    asyncio: Callable[[Setup], AbstractAsyncContextManager[AsyncHit]] | None = None
    quick: bool = True

    @property
    def name(self) -> str:
        return self.entrant.name


Sample = dict[str, float]
"""One slice of one contender: values by metric."""


@dataclass(frozen=True)
class Metric:
    """A column."""

    header: str
    form: str
    more_is_better: bool = False


METRICS: Final = {
    "overhead_us": Metric("overhead µs/request", "{:,.0f}"),
    "request_us": Metric("µs/request", "{:,.0f}"),
    "rate": Metric("decisions/s", "{:,.0f}", more_is_better=True),
    "requests": Metric("requests/s", "{:,.0f}", more_is_better=True),
    "p50_us": Metric("p50 µs", "{:,.1f}"),
    "p99_us": Metric("p99 µs", "{:,.0f}"),
    "max_us": Metric("max µs", "{:,.0f}"),
    "refused": Metric("refused", "{:.1%}"),
    "errors": Metric("errors", "{:,.0f}"),
    "trips": Metric("round trips/decision", "{:.3f}"),
    "asked": Metric("scripts or commands/decision", "{:.3f}"),
    "most_trips": Metric("most round trips", "{:.0f}"),
    "share": Metric("min/max share", "{:.2f}", more_is_better=True),
    "server_us": Metric("server µs/decision", "{:.2f}"),
    "cpu_us": Metric("server CPU µs/decision", "{:.1f}"),
    "commands": Metric("commands/decision", "{:.2f}"),
    "inner": Metric("inside scripts", "{:.2f}"),
    "bytes": Metric("bytes/key (MEMORY USAGE)", "{:,.0f}"),
    "used_bytes": Metric("bytes/key (used_memory)", "{:,.0f}"),
    "server_mib": Metric("server MiB", "{:,.1f}"),
    "client_mib": Metric("client MiB grown", "{:,.1f}"),
}


@dataclass
class Table:
    """The rounds of one scenario.

    :param primary: the metric that ratios are taken of.
    :param rows: samples by name of contender, one for each round.
    :param failures: why a contender has lost rounds, by name.
    """

    id: str
    family: str
    title: str
    primary: str = "rate"
    rows: dict[str, list[Sample]] = field(default_factory=dict[str, list[Sample]])
    failures: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def values(self, name: str, metric: str) -> list[float]:
        return [sample[metric] for sample in self.rows.get(name, ()) if metric in sample]

    def median(self, name: str, metric: str | None = None) -> float | None:
        values = self.values(name, metric or self.primary)
        return statistics.median(values) if values else None

    def metrics(self) -> list[str]:
        """The columns, in the order of ``METRICS``."""
        present = {metric for samples in self.rows.values() for sample in samples for metric in sample}
        return [metric for metric in METRICS if metric in present]


@dataclass
class Results:
    """A whole run."""

    entrants: dict[str, Entrant]
    tables: dict[str, Table] = field(default_factory=dict[str, Table])
    native: set[str] = field(default_factory=set[str])
    """Tables of servers whose ``SET`` can compare."""
    environment: dict[str, str] = field(default_factory=dict[str, str])

    def best(
        self,
        table: Table,
        metric: str | None = None,
        wanted: Callable[[Entrant], bool] = lambda entrant: entrant.is_peer,
    ) -> str | None:
        """The name of the one that does best, by the table's primary metric or another."""
        metric = metric or table.primary
        medians = {
            name: value
            for name in table.rows
            if name in self.entrants and wanted(self.entrants[name])
            if (value := table.median(name, metric)) is not None
        }
        choose = max if METRICS[metric].more_is_better else min
        return choose(medians, key=lambda name: medians[name]) if medians else None


def quantile(ordered: list[int], share: float) -> float:
    """The value below which this share of the sorted values lies."""
    return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))])


def of_latencies(nanos: Iterable[int]) -> Sample:
    """The columns of latency."""
    ordered = sorted(nanos)
    return {
        "p50_us": quantile(ordered, 0.5) / 1_000,
        "p99_us": quantile(ordered, 0.99) / 1_000,
        "max_us": ordered[-1] / 1_000,
    }


def spread(values: list[float]) -> float:
    """Half the distance from the least to the most, as a share of the median."""
    middle = statistics.median(values)
    return (max(values) - min(values)) / 2 / middle if middle else 0.0

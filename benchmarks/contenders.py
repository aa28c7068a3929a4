"""Everything that takes part, by name."""

from __future__ import annotations

from typing import Final

from benchmarks import floor, ours, parts, peers, textbook
from benchmarks.model import OURS, Contender, Entrant, Kind

SOCKET: Final = "bare hiredis socket"
REDIS_PY: Final = "redis-py evalsha"
CORE: Final = "core over a bare socket"
CONNECTION: Final = "shared connection alone"
CORE_OVER_CONNECTION: Final = "core over the shared connection"
SKIP_SYNC: Final = f"{OURS}, skip-sync-on-zero"
FORGETFUL: Final = f"{OURS}, nothing remembered"
ONE_AFTER_THE_OTHER: Final = f"{OURS}, one after the other"
GCRA: Final = "textbook GCRA"


def _ours() -> list[Contender]:
    plain = Contender(Entrant(OURS, Kind.OURS, token_bucket=True, several=True), ours.sync(), ours.asyncio())
    entrant = Entrant(SKIP_SYNC, Kind.OURS, token_bucket=True, asks_redis=False)
    return [plain, Contender(entrant, ours.sync(skip_sync=True), ours.asyncio(skip_sync=True))]


def _peer(name: str, *, token_bucket: bool = False, several: bool = False) -> Entrant:
    return Entrant(name, Kind.PEER, token_bucket=token_bucket, single_script=True, several=several)


REDIS: Final = [
    Contender(Entrant(SOCKET, Kind.FLOOR), floor.bare_socket),
    Contender(Entrant(REDIS_PY, Kind.FLOOR), floor.redis_py, floor.redis_py_asyncio),
    *_ours(),
    Contender(
        Entrant("textbook token bucket", Kind.TEXTBOOK, token_bucket=True, single_script=True),
        textbook.sync(textbook.TOKEN_BUCKET),
        textbook.asyncio(textbook.TOKEN_BUCKET),
    ),
    Contender(
        Entrant(GCRA, Kind.TEXTBOOK, single_script=True),
        textbook.sync(textbook.GCRA),
        textbook.asyncio(textbook.GCRA),
    ),
    Contender(
        _peer("limits fixed window"),
        peers.limits("FixedWindowRateLimiter"),
        peers.limits_asyncio("FixedWindowRateLimiter"),
    ),
    Contender(
        _peer("limits sliding window counter"),
        peers.limits("SlidingWindowCounterRateLimiter"),
        peers.limits_asyncio("SlidingWindowCounterRateLimiter"),
        quick=False,
    ),
    Contender(_peer("limits moving window"), peers.limits("MovingWindowRateLimiter"), quick=False),
    Contender(
        _peer("throttled-py token bucket", token_bucket=True),
        peers.throttled("token_bucket"),
        peers.throttled_asyncio("token_bucket"),
    ),
    Contender(_peer("throttled-py GCRA"), peers.throttled("gcra"), peers.throttled_asyncio("gcra"), quick=False),
    Contender(
        _peer("pyrate-limiter token bucket", token_bucket=True, several=True),
        peers.pyrate(log=False),
        peers.pyrate_asyncio,
    ),
    Contender(_peer("pyrate-limiter log", several=True), peers.pyrate(log=True), quick=False),
]

WAITING: Final = Contender(
    Entrant("self-limiters token bucket", Kind.PEER, token_bucket=True, single_script=True),
    asyncio=peers.self_limiters,
    quick=False,
)
"""Sleeps at every call, also where there are tokens: in the scenarios of asyncio on one key only."""

NOTHING_REMEMBERED: Final = Contender(
    Entrant(FORGETFUL, Kind.OURS, token_bucket=True, several=True),
    ours.sync(remembering=False),
    ours.asyncio(remembering=False),
)
"""Has the server decide by a script, always: in the scenario of the server's time only."""

PARTS: Final = [
    Contender(Entrant(CORE, Kind.PART), parts.core, quick=False),
    Contender(Entrant(CONNECTION, Kind.PART), asyncio=parts.connection, quick=False),
    Contender(Entrant(CORE_OVER_CONNECTION, Kind.PART), asyncio=parts.core_over_connection, quick=False),
]
"""In the scenarios whose goals they help to explain."""

MEMORY: Final = [
    Contender(Entrant(OURS, Kind.OURS, token_bucket=True), ours.sync()),
    Contender(_peer("limits fixed window"), peers.limits("FixedWindowRateLimiter")),
    Contender(_peer("limits moving window"), peers.limits("MovingWindowRateLimiter"), quick=False),
    Contender(_peer("limits sliding window counter"), peers.limits("SlidingWindowCounterRateLimiter"), quick=False),
    Contender(_peer("throttled-py token bucket", token_bucket=True), peers.throttled("token_bucket")),
    Contender(_peer("throttled-py GCRA"), peers.throttled("gcra"), quick=False),
    Contender(_peer("pyrate-limiter token bucket", token_bucket=True, several=True), peers.pyrate(log=False)),
    Contender(_peer("pyrate-limiter log", several=True), peers.pyrate(log=True)),
]

ENTRANTS: Final = {
    contender.name: contender.entrant for contender in (*MEMORY, *REDIS, *PARTS, WAITING, NOTHING_REMEMBERED)
} | {ONE_AFTER_THE_OTHER: Entrant(ONE_AFTER_THE_OTHER, Kind.PART)}
"""The last one is in the scenario of several buckets only, which makes it for each number of buckets."""
BY_NAME: Final = {contender.name: contender for contender in (*REDIS, *PARTS, WAITING)}

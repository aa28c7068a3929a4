"""Fixtures for the tests of services that limit their requests; pytest finds them where this library is installed.

None of them does anything unless a test asks for it, by an argument or by ``@pytest.mark.usefixtures``.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest

from ratelimit.keys import Key
from ratelimit.testing import ManualClock

_BEGINNING = 1_700_000_000 * 10**9  # a time on a whole second, in nanoseconds since the epoch


@pytest.fixture
def ratelimit_disabled() -> Generator[None]:
    """Switch the limits of all integrations off, whatever ``RATELIMIT_ENABLED`` says."""
    from ratelimit.policy.switch import enabled

    with enabled(False):
        yield


@pytest.fixture
def ratelimit_clock() -> Generator[ManualClock]:
    """Switch the limits of all integrations on, in memory, with a clock that the test moves.

    Every test begins with full buckets. Redis is not needed: managers that integrations find by a URL, or by default,
    are replaced by managers over a store in memory. Managers that the application has made itself are left alone.
    """
    from ratelimit import AsyncMemoryStore, AsyncProxyManager, MemoryStore, ProxyManager
    from ratelimit.policy.managers import PREFIX, replaced
    from ratelimit.policy.switch import enabled

    clock = ManualClock(_BEGINNING)
    store = MemoryStore(clock=clock)
    manager = ProxyManager(store, prefix=PREFIX, clock=clock)
    with enabled(True), replaced(manager, AsyncProxyManager(AsyncMemoryStore(store), prefix=PREFIX, clock=clock)):
        yield clock


class Decisions:
    """What the limits of all integrations have decided since the test began."""

    def __init__(self) -> None:
        from ratelimit.policy.recording import RecordedDecision

        self.all: list[RecordedDecision] = []

    def count(self, name: str | None = None, *, key: Key | None = None, admitted: bool | None = None) -> int:
        """Return how many decisions there were.

        :param name: only those of the limit with this name, or with these limits where it has none.
        :param key: only those about this key.
        :param admitted: True: only those that admitted; False: only those that refused.
        """
        return sum(
            name in (None, decision.name) and key in (None, decision.key) and admitted in (None, decision.admitted)
            for decision in self.all
        )

    def assert_refused(self, name: str | None = None, *, key: Key | None = None, times: int | None = None) -> None:
        """Fail unless a limit has refused: at least once, or exactly this many times."""
        self._check("refused", name, key, times, self.count(name, key=key, admitted=False))

    def assert_admitted(self, name: str | None = None, *, key: Key | None = None, times: int | None = None) -> None:
        """Fail unless a limit has admitted: at least once, or exactly this many times."""
        self._check("admitted", name, key, times, self.count(name, key=key, admitted=True))

    def _check(self, what: str, name: str | None, key: Key | None, times: int | None, found: int) -> None:
        if found == times or (times is None and found):
            return
        limit = "a limit" if name is None else f"the limit {name!r}"
        about = "" if key is None else f" the key {key!r}"
        wanted = "at least once" if times is None else f"{times} times"
        decided = "\n".join(f"  {decision}" for decision in self.all) or "  none"
        pytest.fail(
            f"{limit} should have {what}{about} {wanted}, and has {found} times; the decisions were:\n{decided}"
        )


@pytest.fixture
def ratelimit_decisions() -> Generator[Decisions]:
    """Record what the limits of all integrations decide, for assertions."""
    from ratelimit.policy.recording import recording

    decisions = Decisions()
    with recording() as decisions.all:
        yield decisions

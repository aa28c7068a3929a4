from __future__ import annotations

from typing import Any

from ratelimit.stores.protocol import Decided, Lost
from tests.promises.simulation import script
from tests.promises.simulation.ledger import Decision, Ledger, Record
from tests.promises.simulation.world import MILLISECOND, World


class Server:
    """What is stored, and a replica that lags behind.

    :ivar term: how often a replica has taken over; what was sent to the one before does not arrive any more.
    """

    def __init__(self, world: World, ledger: Ledger) -> None:
        self.world = world
        self.ledger = ledger
        self.records: dict[bytes, Record] = {}
        self.term = 0
        self._history: list[tuple[int, dict[bytes, Record]]] = [(0, {})]

    def get(self, decision: Decision) -> bytes | None:
        return _state(self._record(decision.key))

    def swap(self, decision: Decision, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        stored = _state(self._record(decision.key))
        if stored != before:
            return Lost(stored)
        self._write(decision, after, ttl_millis)
        return None

    def decide(self, decision: Decision, arguments: tuple[bytes, ...]) -> Decided | int:
        before = _state(self._record(decision.key))
        done, after, ttl_millis, consumed = script.decide(before, arguments)
        if after is not None:
            self._write(decision, after, ttl_millis)
        return Decided(done, before) if consumed is None else consumed

    def delete(self, decision: Decision) -> None:
        record = self._record(decision.key)
        if record is not None:
            self.ledger.removed(decision.key, record)
            self._forget(decision.key)

    def now_nanos(self, decision: Decision) -> int:
        return decision.reading

    def bucket(self, key: bytes) -> Any:
        """The ledger's, of what is stored; None where nothing is."""
        record = self._record(key)
        return None if record is None else record.bucket

    def fail_over(self, lag: int) -> None:
        """A replica takes over, which knows what was stored so many nanoseconds ago."""
        known = next(records for at, records in reversed(self._history) if at <= max(0, self.world.now - lag))
        for key in sorted(self.records.keys() | known.keys()):
            self.ledger.failed_over(key, self.records.get(key), known.get(key))
        if self.world.tracing:
            self.world.note(f"the store fails over, and goes back by {lag / MILLISECOND:g} ms")
        self.records = dict(known)
        self.term += 1
        self._history.append((self.world.now, known))

    def _record(self, key: bytes) -> Record | None:
        record = self.records.get(key)
        if record is not None and record.expires_at is not None and record.expires_at <= self.world.now:
            if self.world.tracing:
                self.world.note(f"{key!r} expires")
            self.ledger.expired(key, record)
            self._forget(key)
            return None
        return record

    def _forget(self, key: bytes) -> None:
        del self.records[key]
        self._history.append((self.world.now, dict(self.records)))

    def _write(self, decision: Decision, state: bytes, ttl_millis: int) -> None:
        record = self.ledger.written(self.records.get(decision.key), decision, state, ttl_millis)
        self.records[decision.key] = record
        self._history.append((self.world.now, dict(self.records)))


def _state(record: Record | None) -> bytes | None:
    return None if record is None else record.state

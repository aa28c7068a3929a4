"""A map whose memory is bounded: the values that were used least recently are dropped first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

V = TypeVar("V")


class BoundedMap(Generic[V]):
    """Values under keys, in the order of their last use. Callers that share one between threads hold a lock.

    :param limit_bytes: roughly the memory that it may take.
    :param weigh: gives the bytes that a key and its value take, roughly. A value weighs the same for as long as it is
        in the map.
    :ivar values: the values by their keys, the least recently used first.
    :ivar size: roughly the bytes that are taken.
    """

    __slots__ = ("__weakref__", "limit", "size", "values", "weigh")

    def __init__(self, limit_bytes: int, weigh: Callable[[bytes, V], int]) -> None:
        self.limit = limit_bytes
        self.weigh = weigh
        self.size = 0
        self.values: OrderedDict[bytes, V] = OrderedDict()

    def put(self, key: bytes, value: V) -> None:
        """Put a value under a key as the one that was used last; nothing is dropped for it."""
        self.drop(key)
        weight = self.weigh(key, value)
        # There must be no call between these two lines: a signal handler could run there.
        self.values[key] = value
        self.size += weight

    def drop(self, key: bytes) -> None:
        """Drop the value under a key, if there is one."""
        value = self.values.get(key)
        if value is not None:
            weight = self.weigh(key, value)
            # There must be no call here either.
            del self.values[key]
            self.size -= weight

    def shrink(self, least: int = 0) -> None:
        """Drop values until the rest fits, or no more than ``least`` are left."""
        while self.size > self.limit and len(self.values) > least:
            self.drop(next(iter(self.values)))

    def clear(self) -> None:
        """Drop all values."""
        self.values.clear()
        self.size = 0

"""Copies of objects that belong to their process, because they hold its connections, locks or counts."""

from __future__ import annotations

from typing import Any, ClassVar, Self, SupportsIndex


class OfThisProcess:
    """An object that several parts of a process share: ``copy`` and ``deepcopy`` give the object itself.

    :cvar _advice: what to do where it would have to be pickled, for the ``TypeError`` that says so.
    """

    __slots__ = ()

    _advice: ClassVar[str]

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        raise TypeError(f"{type(self).__name__} cannot be pickled, as it belongs to its process; {self._advice}")

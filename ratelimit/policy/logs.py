"""What integrations log: requests that are refused, and limits that are not those of the code."""

from __future__ import annotations

import hashlib
import logging
from typing import Final

from ratelimit.core.algorithm import Configuration
from ratelimit.keys import Key
from ratelimit.runtime.clock import monotonic

_REFUSALS_PER_SECOND: Final = 10
_HASH_BYTES: Final = 6
_MOST_NAMES: Final = 10_000

_logger = logging.getLogger("ratelimit")


class RefusalLog:
    """Logs refusals at the level INFO: ten lines in a second at most, and then how many were left out."""

    def __init__(self) -> None:
        self._second = 0
        self._lines = 0
        self._left_out = 0

    def log(self, name: str, key: Key | None, limits: Configuration | None) -> None:
        """Log a refusal.

        :param name: of the rule, or the limit.
        :param key: whose tokens there were not enough of; its hash is logged, the same for the same key. None where the
            rule has one bucket for all.
        :param limits: of the bucket; None where the store has failed and they are not known.
        """
        if not _logger.isEnabledFor(logging.INFO):
            return
        second = int(monotonic())
        if second != self._second:
            self._second, self._lines = second, 0
        if self._lines >= _REFUSALS_PER_SECOND:
            self._left_out += 1
            return
        self._lines += 1
        left_out, self._left_out = self._left_out, 0
        more = f"; {left_out} refusals before it were not logged" if left_out else ""
        whose = "" if key is None else f"key {hashed(key)}, "
        _logger.info("refused by %r: %slimits %s%s", name, whose, limits or "unknown", more)


class OtherLimits:
    """A warning, once for each name, where the buckets of a limit are stored with other limits than the code has."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def compare(self, name: str, wanted: Configuration, stored: Configuration) -> None:
        """Compare the limits by which a bucket was decided with the limits in the code."""
        if stored is wanted or stored == wanted or name in self._warned or len(self._warned) >= _MOST_NAMES:
            return
        self._warned.add(name)
        _logger.warning(
            "the limits of %r are %s in the code, but %s in the store, and those count; raise version= to replace them,"
            " unless a newer version of the service has stored them",
            name,
            wanted,
            stored,
        )


def hashed(key: Key) -> str:
    """Return what stands for a key in a log: twelve hexadecimal digits of its BLAKE2 hash."""
    raw = key.encode("utf-8", "surrogatepass") if isinstance(key, str) else key
    return hashlib.blake2b(raw, digest_size=_HASH_BYTES).hexdigest()

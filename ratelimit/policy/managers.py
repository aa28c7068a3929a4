"""Which manager an integration asks, and how the buckets of an integration are named."""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache
from typing import Final
from weakref import WeakSet

from ratelimit.checks import refusal
from ratelimit.errors import InvalidArgumentError, InvalidConfigurationError
from ratelimit.keys import Key, brief
from ratelimit.manager import AsyncProxyManager, ProxyManager
from ratelimit.stores.urls import default_url

PREFIX: Final = "ratelimit:"
"""The beginning of the keys of all buckets that an integration keeps in a manager of its own."""

NAMESPACE_VARIABLE: Final = "RATELIMIT_NAMESPACE"
"""The environment variable that names the namespace of a process whose integrations are not given one."""

# Weak references: a manager that the caches below have dropped is not kept alive.
_made: Final[WeakSet[ProxyManager]] = WeakSet()
_async_made: Final[WeakSet[AsyncProxyManager]] = WeakSet()
_replacements: Final[list[tuple[ProxyManager, AsyncProxyManager]]] = []
_ESCAPED: Final = str.maketrans({"\\": r"\\", ":": r"\:", "|": r"\|", "{": r"\(", "}": r"\)"})
# What requests bring along is escaped only where there are braces in it, so that all other keys are stored as they are.
_ESCAPED_IN_KEYS: Final = str.maketrans({"\\": r"\\", "{": r"\(", "}": r"\)"})
_NAMESPACE: Final = re.compile(r"[\x21-\x7e]{1,100}")


def manager_of(manager: ProxyManager | str | None) -> ProxyManager:
    """Return the manager itself, or the one that the process has for a URL.

    :param manager: None stands for the URL in the variable ``RATELIMIT_URL``, or Redis on this machine.
    :raises InvalidArgumentError: for a manager of asyncio, or anything else that is not a manager.
    :raises InvalidConfigurationError: for a URL that is not valid.
    """
    if isinstance(manager, ProxyManager):
        return manager
    if manager is None or isinstance(manager, str):
        return _replacements[-1][0] if _replacements else _of_url(manager or default_url())
    raise InvalidArgumentError(f"manager must be a ProxyManager or a URL; got {_kind(manager)}")


def async_manager_of(manager: AsyncProxyManager | str | None) -> AsyncProxyManager:
    """Return the manager of asyncio itself, or the one that the process has for a URL.

    :param manager: None stands for the URL in the variable ``RATELIMIT_URL``, or Redis on this machine.
    :raises InvalidArgumentError: for a manager of sync code, or anything else that is not a manager.
    :raises InvalidConfigurationError: for a URL that is not valid.
    """
    if isinstance(manager, AsyncProxyManager):
        return manager
    if manager is None or isinstance(manager, str):
        return _replacements[-1][1] if _replacements else _async_of_url(manager or default_url())
    raise InvalidArgumentError(f"manager must be an AsyncProxyManager or a URL; got {_kind(manager)}")


@contextmanager
def replaced(manager: ProxyManager, async_manager: AsyncProxyManager) -> Generator[None]:
    """Put these managers in place of those by URL, in all integrations, for as long as the block runs."""
    _replacements.append((manager, async_manager))
    try:
        yield
    finally:
        _replacements.pop()


def managers_made() -> tuple[list[ProxyManager], list[AsyncProxyManager]]:
    """Return the managers by URL of this process, those of sync code and those of asyncio, or what replaces them."""
    if _replacements:
        manager, async_manager = _replacements[-1]
        return [manager], [async_manager]
    return list(_made), list(_async_made)


def _kind(manager: object) -> str:
    name = type(manager).__name__
    return f"an {name}" if name[0] in "AEIOU" else f"a {name}"


def namespace_of(namespace: str | None) -> str:
    """Return the namespace of an integration; empty where there is none.

    :param namespace: None stands for what the variable ``RATELIMIT_NAMESPACE`` says.
    :raises InvalidConfigurationError: for what is not 1 to 100 printable ASCII characters without spaces.
    """
    chosen = os.environ.get(NAMESPACE_VARIABLE, "") if namespace is None else namespace
    if chosen == "" or (isinstance(chosen, str) and _NAMESPACE.fullmatch(chosen)):
        return chosen
    where = NAMESPACE_VARIABLE if namespace is None else "namespace"
    raise InvalidConfigurationError(
        f"{where} must be 1 to 100 printable ASCII characters without spaces; got {brief(chosen)}", "namespace"
    )


def checked_version(version: int | None) -> int | None:
    """Return the version of limits.

    :raises InvalidConfigurationError: for what is neither None nor an int of 0 or more.
    """
    if version is not None and (isinstance(version, bool) or not isinstance(version, int) or version < 0):
        raise refusal("version", "None or an int of 0 or more", version, InvalidConfigurationError)
    return version


def bucket_key(names: tuple[str, ...], key: Key | None, namespace: str = "") -> Key:
    r"""Return the key of a bucket: ``login:203.0.113.7``, ``shop||login:203.0.113.7`` in a namespace.

    Different arguments never give the same key. In namespace and names, ``:``, ``|`` and the backslash have a backslash
    before them, so that a plain ``:`` ends the names, a plain ``|`` stands between two of them, and ``||`` ends a
    namespace. Braces become ``\(`` and ``\)``: a Redis cluster would put all keys with ``{id}`` in their name on one
    node.

    Clients supply keys, and must not choose a slot of the cluster, nor which calls go together. So the braces of a key
    are escaped as well, and its backslashes with them: ``login|:\(a\)`` for ``{a}``. The empty name before the key,
    which no limit has, says so. A key without braces stays as it is.

    :param names: one that was given to a limit, or several that distinguish a limit without a name; only the first of
        them may be empty.
    :param key: whose bucket it is; None where a limit has one bucket for all.
    """
    beginning = _beginning(names, namespace)
    if key is None:
        return beginning
    if isinstance(key, str):
        if "{" in key or "}" in key:
            return f"{beginning}|:{key.translate(_ESCAPED_IN_KEYS)}"
        return f"{beginning}:{key}"
    if b"{" in key or b"}" in key:
        escaped = key.replace(b"\\", rb"\\").replace(b"{", rb"\(").replace(b"}", rb"\)")
        return b"%b|:%b" % (beginning.encode(), escaped)
    return b"%b:%b" % (beginning.encode(), key)


@lru_cache(maxsize=4096)
def _beginning(names: tuple[str, ...], namespace: str) -> str:
    escaped = "|".join(name.translate(_ESCAPED) for name in names)
    return f"{namespace.translate(_ESCAPED)}||{escaped}" if namespace else escaped


@lru_cache(maxsize=64)
def _of_url(url: str) -> ProxyManager:
    manager = ProxyManager.from_url(url, prefix=PREFIX)
    _made.add(manager)
    return manager


@lru_cache(maxsize=64)
def _async_of_url(url: str) -> AsyncProxyManager:
    manager = AsyncProxyManager.from_url(url, prefix=PREFIX)
    _async_made.add(manager)
    return manager

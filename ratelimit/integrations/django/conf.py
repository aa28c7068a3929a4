"""The setting ``RATELIMIT``, read at its first use, and again where a test overrides it.

========================= =========================================================================================
``URL``                   the store: ``redis://localhost:6379/0``, say. None: that in the variable ``RATELIMIT_URL``,
                          or localhost
``RULES``                 what the middleware limits by: a list of ``Rule``, of limits (``"100/minute"``: for all
                          requests, by the client's address), and of dotted paths to either
``CLIENT_IP``             the key of rules without a key: ``client_ip(hops=1)`` behind a proxy. By default
                          ``client_ip()``, which is the peer
``ANSWERS``               what clients are sent: an ``Answers``, or a class of them
``ON_ERROR``              what is decided where the store fails: an ``OnError``, a callable that returns one, or
                          ``"allow"``, ``"deny"`` or ``"raise"``. By default deny, which is answered with 503
``ON_REFUSED``            is called with the request and the decision for each request that is refused
``NAMESPACE``             separates services that share a Redis. None: that in the variable ``RATELIMIT_NAMESPACE``
``ENABLED``               False: nothing is limited, as if the variable ``RATELIMIT_ENABLED`` were ``false``
``MANAGER``               a ``ProxyManager`` in place of the URL, for sync code
``ASYNC_MANAGER``         an ``AsyncProxyManager`` in place of the URL, for async code
========================= =========================================================================================

All but ``URL`` and ``ENABLED`` may be given as a dotted path. An invalid value raises ``ImproperlyConfigured``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, NoReturn, TypeVar

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from django.utils.module_loading import import_string

from ratelimit.engine.on_error import ErrorPolicy, OnError
from ratelimit.errors import InvalidArgumentError, InvalidConfigurationError
from ratelimit.integrations.http import (
    Answers,
    AsyncLimiter,
    HttpRequest,
    Limiter,
    LimiterSettings,
    OnRefused,
    Rule,
    client_ip,
)
from ratelimit.integrations.http.rules import checked_rules
from ratelimit.keys import Key, brief
from ratelimit.manager import AsyncProxyManager, ProxyManager
from ratelimit.policy.managers import namespace_of
from ratelimit.policy.rule import Names

T = TypeVar("T")

ClientKey = Callable[[HttpRequest], Key | None]

SETTING: Final = "RATELIMIT"
_KNOWN: Final = (
    *("URL", "RULES", "CLIENT_IP", "ANSWERS", "ON_ERROR", "ON_REFUSED", "NAMESPACE", "ENABLED"),
    *("MANAGER", "ASYNC_MANAGER"),
)
_PEER: Final = client_ip()


@dataclass(frozen=True, slots=True, eq=False)
class RateLimitSettings:
    """The setting, checked."""

    url: str | None
    rules: tuple[Rule, ...]
    client_ip: ClientKey
    limiters: LimiterSettings
    enabled: bool
    manager: ProxyManager | None
    async_manager: AsyncProxyManager | None

    @property
    def answers(self) -> Answers:
        """Makes what clients are sent."""
        return self.limiters.get("answers") or Answers()

    def keyed(self, rule: Rule) -> Rule:
        """Return the rule, with the key of the setting where it has none of its own."""
        return rule.by(self.client_ip)


@lru_cache(maxsize=1)
def current() -> RateLimitSettings:
    """Return the setting as it is now.

    :raises ImproperlyConfigured: for a setting that is not valid.
    """
    given: Any = getattr(settings, SETTING, {})
    if not isinstance(given, Mapping):
        raise ImproperlyConfigured(f"{SETTING} must be a dict; got {brief(given)}")
    unknown = [name for name in given if name not in _KNOWN]
    if unknown:
        raise ImproperlyConfigured(f"{SETTING} knows {', '.join(_KNOWN)}, and not {brief(unknown[0])}")
    return RateLimitSettings(
        url=_of_type(given, "URL", str),
        rules=_rules(given.get("RULES", [])),
        client_ip=_client_ip(given),
        limiters={
            "answers": _answers(given),
            "on_error": _on_error(given),
            "on_refused": _on_refused(given),
            "namespace": _namespace(given),
        },
        enabled=_enabled(given),
        manager=_of_type(given, "MANAGER", ProxyManager),
        async_manager=_of_type(given, "ASYNC_MANAGER", AsyncProxyManager),
    )


@lru_cache(maxsize=1024)
def limiter(rules: tuple[Rule, ...]) -> Limiter:
    """Return the limiter for some rules, for sync code."""
    now = current()
    if now.manager is None and now.async_manager is not None and now.url is None:
        _wrong("MANAGER", "is needed, or URL, because there is sync code too: ASYNC_MANAGER is not for that")
    return Limiter(
        *map(now.keyed, rules),
        manager=now.url if now.manager is None else now.manager,
        **now.limiters,
    )


@lru_cache(maxsize=1024)
def async_limiter(rules: tuple[Rule, ...]) -> AsyncLimiter:
    """Return the limiter for some rules, for async code."""
    now = current()
    if now.async_manager is None and now.manager is not None and now.url is None:
        _wrong("ASYNC_MANAGER", "is needed, or URL, because there is async code too: MANAGER is not for that")
    return AsyncLimiter(
        *map(now.keyed, rules),
        manager=now.url if now.async_manager is None else now.async_manager,
        **now.limiters,
    )


@lru_cache(maxsize=1)
def names() -> Names:
    """Return the rules of all views by their names. A process has one project, so they last as long as the setting."""
    return Names()


def _forget(*, setting: str, **_: Any) -> None:
    if setting == SETTING:
        for kept in (current, limiter, async_limiter, names):
            kept.cache_clear()


setting_changed.connect(_forget)


def _wrong(name: str, what: str, cause: Exception | None = None) -> NoReturn:
    raise ImproperlyConfigured(f"{SETTING}[{name!r}] {what}") from cause


def _imported(name: str, value: Any) -> Any:
    """Return what a dotted path leads to, and any other value itself."""
    if not isinstance(value, str) or "." not in value or not all(part.isidentifier() for part in value.split(".")):
        return value
    try:
        return import_string(value)
    except ImportError as error:
        _wrong(name, f"names what cannot be imported: {error}", error)


def _of_type(given: Mapping[str, Any], name: str, kind: type[T]) -> T | None:
    value = given.get(name)
    if kind is not str:
        value = _imported(name, value)
    if value is None or isinstance(value, kind):
        return value
    _wrong(name, f"must be a {kind.__name__}; got {brief(value)}")


def _enabled(given: Mapping[str, Any]) -> bool:
    enabled = given.get("ENABLED", True)
    if not isinstance(enabled, bool):  # "False" from an environment, say
        _wrong("ENABLED", f"must be True or False; got {brief(enabled)}")
    return enabled


def _client_ip(given: Mapping[str, Any]) -> ClientKey:
    key: Any = _imported("CLIENT_IP", given.get("CLIENT_IP", _PEER))
    if not callable(key):
        _wrong("CLIENT_IP", f"must be a key such as client_ip(hops=1); got {brief(key)}")
    return key  # type: ignore[no-any-return]  # a callable cannot be checked further


def _answers(given: Mapping[str, Any]) -> Answers:
    answers = _imported("ANSWERS", given.get("ANSWERS", Answers))
    if isinstance(answers, type) and issubclass(answers, Answers):
        answers = answers()
    if not isinstance(answers, Answers):
        _wrong("ANSWERS", f"must be an Answers; got {brief(answers)}")
    return answers


def _on_error(given: Mapping[str, Any]) -> ErrorPolicy | None:
    policy: Any = _imported("ON_ERROR", given.get("ON_ERROR"))
    if policy in ("allow", "deny", "raise"):
        return OnError(policy)
    if policy is not None and not isinstance(policy, OnError) and not callable(policy):
        _wrong("ON_ERROR", f"must be an OnError, 'allow', 'deny' or 'raise'; got {brief(policy)}")
    return policy  # type: ignore[no-any-return]  # a callable cannot be checked further


def _on_refused(given: Mapping[str, Any]) -> OnRefused | None:
    hook: Any = _imported("ON_REFUSED", given.get("ON_REFUSED"))
    if hook is not None and not callable(hook):
        _wrong("ON_REFUSED", f"must be a callable; got {brief(hook)}")
    return hook  # type: ignore[no-any-return]  # a callable cannot be checked further


def _namespace(given: Mapping[str, Any]) -> str:
    try:
        return namespace_of(given.get("NAMESPACE"))
    except InvalidConfigurationError as error:
        _wrong("NAMESPACE", f"is not valid: {error}", error)


def _rules(given: Any) -> tuple[Rule, ...]:
    given = _imported("RULES", given)
    if not isinstance(given, list | tuple):
        _wrong("RULES", f"must be a list; got {brief(given)}")
    try:
        return checked_rules([_imported("RULES", one) for one in given])
    except (InvalidConfigurationError, InvalidArgumentError) as error:
        _wrong("RULES", f"is not valid: {error}", error)

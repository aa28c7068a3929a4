"""A base class for Celery's tasks that stay under somebody else's limit, in all workers together.

::

    limit = OutboundLimit("10/second", key="api.example.com", max_wait=600)

    @app.task(base=RateLimitedTask, outbound_limit=limit)
    def call_api(customer): ...
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from ratelimit.errors import InvalidConfigurationError
from ratelimit.integrations.extras import needing

with needing("celery"):
    from celery import Task
    from celery.exceptions import Retry

    from ratelimit.integrations.outbound import OutboundLimit

__all__ = ["OutboundLimit", "RateLimitedTask"]

# A header of the message. It names the attempt of the task that tokens are reserved for.
_RESERVED: Final = "ratelimit_reserved"


class RateLimitedTask(Task):  # type: ignore[misc]  # Celery has no types
    """A task that runs when its turn comes. Until then it is a message with a countdown, which keeps no worker busy.

    Before the task runs, its tokens are reserved. If they will be there only later, it is retried once, exactly then,
    with its tokens already reserved: first reserved is first served, in whichever worker. This retry does not count
    against the task's ``max_retries``. Each retry of the task's own needs new tokens.

    A task that runs eagerly sleeps, since there is no worker to keep free. One that is called as a function is not
    limited.

    :cvar outbound_limit: its callables are given the request of the task, which has ``args`` and ``kwargs``. Where the
        turn would come later than its ``max_wait``, the task fails with :class:`ratelimit.RateLimitExceeded`.
    """

    abstract = True
    outbound_limit: ClassVar[OutboundLimit | None] = None

    @classmethod
    def on_bound(cls, app: Any) -> None:
        """Check that there is a limit, and that it is one for sync code.

        :raises InvalidConfigurationError: where there is none.
        """
        super().on_bound(app)
        _limit_of(cls).check_face(asynchronous=False)

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        """Let the task run if it is its turn, or retry it then. A method that overrides this one must call it first."""
        super().before_start(task_id, args, kwargs)
        limit, request = _limit_of(self), self.request
        if request.is_eager:
            limit.acquire(request)
            return
        attempt = f"{request.id}:{request.retries}"
        is_reserved = (request.headers or {}).get(_RESERVED) == attempt
        # Tokens that were reserved before a hold are void.
        if is_reserved and not limit.remaining_hold(request):
            return
        wait = limit.reserve(request)
        if wait:
            headers = {**(request.headers or {}), _RESERVED: attempt}
            signature: Any = self.signature_from_request(request, countdown=wait, headers=headers)
            signature.apply_async()
            raise Retry(f"its turn is in {wait:g} s", when=wait, sig=signature)

    def learn(self, status: int, headers: Mapping[str, str]) -> None:
        """Hold all tasks back if an answer that this task has received says so."""
        limit = _limit_of(self)
        limit.learn(limit.key_of(self.request), status, headers)


def _limit_of(task: Any) -> OutboundLimit:
    limit = task.outbound_limit
    if not isinstance(limit, OutboundLimit):
        raise InvalidConfigurationError(
            f"a RateLimitedTask needs an outbound_limit=OutboundLimit(...), and {task.name} has none",
            "outbound_limit",
        )
    return limit

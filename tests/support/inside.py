"""The inside of managers and buckets, for white-box tests: the one place that knows how they are built."""

from __future__ import annotations

from typing import Any

from ratelimit.core.commands import Command
from ratelimit.engine.coalescing.tasks import TaskCoalescing
from ratelimit.engine.coalescing.threads import ThreadCoalescing
from ratelimit.engine.local_buckets import LocalBuckets
from ratelimit.engine.local_decisions import LocalDecisions
from ratelimit.engine.pipeline import Pipeline
from ratelimit.engine.proxy import BucketProxy
from ratelimit.engine.question import Question
from ratelimit.runtime.steps import Steps


def pipeline_of(manager: Any) -> Pipeline:
    """Return what the buckets of a manager have in common."""
    pipeline = getattr(manager, "face", manager)._pipeline
    assert isinstance(pipeline, Pipeline)
    return pipeline


def proxy_of(bucket: Any) -> BucketProxy:
    """Return what a bucket asks through."""
    proxy = bucket._proxy
    assert isinstance(proxy, BucketProxy)
    return proxy


def coalescing_of(manager: Any) -> ThreadCoalescing | TaskCoalescing:
    """Return the layer of a manager that lets one question at a time through."""
    coalescing = pipeline_of(manager).coalescing
    assert coalescing is not None
    return coalescing


def local_decisions_of(manager: Any) -> LocalDecisions:
    """Return what a manager has decided without the store."""
    return pipeline_of(manager).local_decisions


def local_buckets_of(manager: Any) -> LocalBuckets:
    """Return the buckets that stand in for those of a store that has failed."""
    return pipeline_of(manager).local_buckets


def steps_of(bucket: Any, command: Command[Any], timeout: float | None = None) -> Steps[Any]:
    """Return the steps to the answer to a command.

    :param timeout: None: without a deadline.
    """
    proxy = proxy_of(bucket)
    question: Question = proxy.question(command, timeout)
    return proxy.layer(question if timeout is not None else question._replace(deadline=None))

"""A proxy before a language model: requests and tokens per minute, of each user and of the whole organisation.

RATELIMIT_URL=redis://localhost:6379/0 MODEL_URL=http://localhost:9000 uvicorn app:app --port 8001

Nobody knows beforehand how many tokens an answer will have. So the most that it may have is reserved before the model
is asked, and what it had is settled when the stream has ended, in whatever way. All four limits are asked in one
decision: where one of them refuses, nothing is charged to the others.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import anyio
import httpx
from fastapi import FastAPI, Header, Query, Response
from fastapi.responses import JSONResponse, StreamingResponse

from ratelimit import AsyncCombinedReservation, AsyncProxyManager, RateLimitExceeded, all_of

REDIS = os.environ.get("RATELIMIT_URL", "redis://localhost:6379/0")
MODEL = os.environ.get("MODEL_URL", "http://localhost:9000")
TOKENS_OF_A_USER = os.environ.get("TOKENS_OF_A_USER", "90000/minute")
TOKENS_OF_AN_ORGANISATION = os.environ.get("TOKENS_OF_AN_ORGANISATION", "180000/minute")
NAME = r"^[\w-]+$"
"""Names of users and organisations: without braces, which would choose the slot of a key."""
LONGEST_WAIT = 5
"""Seconds that a request waits for its tokens. One that would have to wait for longer is refused at once."""

# Buckets that are decided about together are in one store, which the first manager opens.
user_tokens = AsyncProxyManager.from_url(REDIS, TOKENS_OF_A_USER, prefix="llm-tokens:user:", timeout=10)
store = user_tokens.store
tokens = AsyncProxyManager(store, TOKENS_OF_AN_ORGANISATION, prefix="llm-tokens:organisation:", timeout=10)
user_requests = AsyncProxyManager(store, "6000/minute", prefix="llm-requests:user:", timeout=10)
requests = AsyncProxyManager(store, "12000/minute", prefix="llm-requests:organisation:", timeout=10)
model = httpx.AsyncClient(base_url=MODEL, timeout=60)

billing = logging.getLogger("billing")
if path := os.environ.get("BILLING"):
    billing.addHandler(logging.FileHandler(path))
    billing.setLevel(logging.INFO)
    billing.propagate = False


@asynccontextmanager
async def closing(_: FastAPI) -> AsyncGenerator[None]:
    async with model, user_tokens:
        yield


app = FastAPI(lifespan=closing)


def reservation_for(user: str, organisation: str, estimate: int) -> AsyncCombinedReservation:
    """Return the reservation of a request and of so many tokens, both of the user and of the organisation."""
    # In a cluster the text in braces puts all four keys into one slot.
    tag = f"{{{organisation}}}"
    limits = all_of(
        user_requests.bucket(f"{tag}:{user}"),
        requests.bucket(tag),
        (user_tokens.bucket(f"{tag}:{user}"), estimate),
        (tokens.bucket(tag), estimate),
    )
    return limits.reserve(max_wait=LONGEST_WAIT)


@app.post("/chat")
async def chat(
    user: Annotated[str, Header(alias="x-user", pattern=NAME)],
    organisation: Annotated[str, Header(alias="x-organisation", pattern=NAME)],
    max_tokens: Annotated[int, Query(ge=1, le=4_000)],
) -> Response:
    reservation = reservation_for(user, organisation, max_tokens)
    try:
        # The block ends here. What it has reserved stays charged until the stream settles it.
        async with reservation:
            pass
    except RateLimitExceeded as error:
        problem = {"title": "too many requests or tokens", "limits": [str(key) for key in error.probe.refused_by]}
        return JSONResponse(problem, 429, {"Retry-After": str(round(error.retry_after or 1))})
    return StreamingResponse(relayed(user, max_tokens, reservation), media_type="application/jsonl")


async def relayed(user: str, max_tokens: int, reservation: AsyncCombinedReservation) -> AsyncIterator[str]:
    """Relay what the model answers, and settle what has come of it, also where the client goes away before the end."""
    used = 0
    try:
        async with model.stream("POST", "/completions", params={"max_tokens": max_tokens}) as answer:
            async for line in answer.aiter_lines():
                used += json.loads(line).get("tokens", 0)
                yield line + "\n"
    finally:
        # A client that goes away cancels the stream, and all that it would await from then on.
        with anyio.CancelScope(shield=True):
            # This is what was used of both buckets of tokens. The request stays charged.
            await reservation.settle(used)
            billing.info("%s %d", user, used)

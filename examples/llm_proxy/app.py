"""A proxy before a language model: requests and tokens per minute, of each user and of the whole organisation.

RATELIMIT_URL=redis://localhost:6379/0 MODEL_URL=http://localhost:9000 uvicorn app:app --port 8001

Nobody knows beforehand how many tokens an answer will have. So the most that it may have is reserved before the model
is asked, and what it had is settled when the stream has ended, in whatever way.
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
from fastapi import Depends, FastAPI, Header, Query, Response
from fastapi.responses import JSONResponse, StreamingResponse

from ratelimit import AsyncProxyManager, AsyncReservation, RateLimitExceeded
from ratelimit.integrations.fastapi import RateLimit
from ratelimit.integrations.http import header

REDIS = os.environ.get("RATELIMIT_URL", "redis://localhost:6379/0")
MODEL = os.environ.get("MODEL_URL", "http://localhost:9000")
OF_A_USER = os.environ.get("TOKENS_OF_A_USER", "90000/minute")
OF_AN_ORGANISATION = os.environ.get("TOKENS_OF_AN_ORGANISATION", "180000/minute")
LONGEST_WAIT = 5
"""Seconds that a request waits for its tokens. One that would have to wait for longer is refused at once."""

requests = RateLimit("6000/minute", name="llm-requests", key=header("x-user"), manager=REDIS)
users = AsyncProxyManager.from_url(REDIS, OF_A_USER, prefix="llm-tokens:user:", timeout=10)
organisations = AsyncProxyManager.from_url(REDIS, OF_AN_ORGANISATION, prefix="llm-tokens:organisation:", timeout=10)
model = httpx.AsyncClient(base_url=MODEL, timeout=60)

billing = logging.getLogger("billing")
if path := os.environ.get("BILLING"):
    billing.addHandler(logging.FileHandler(path))
    billing.setLevel(logging.INFO)
    billing.propagate = False


@asynccontextmanager
async def closing(_: FastAPI) -> AsyncGenerator[None]:
    async with model, users, organisations:
        yield


app = FastAPI(lifespan=closing)


@app.post("/chat", dependencies=[Depends(requests)])
async def chat(
    user: Annotated[str, Header(alias="x-user")],
    organisation: Annotated[str, Header(alias="x-organisation")],
    max_tokens: Annotated[int, Query(ge=1, le=4_000)],
) -> Response:
    by_user = users.reserve(user, max_tokens, max_wait=LONGEST_WAIT, refund_on=RateLimitExceeded)
    by_organisation = organisations.reserve(organisation, max_tokens, max_wait=LONGEST_WAIT)
    try:
        # The blocks end here. What they have reserved stays charged until the stream settles it.
        async with by_user, by_organisation:
            pass
    except RateLimitExceeded as error:
        problem = {"title": "too many tokens", "limit": str(error.key)}
        return JSONResponse(problem, 429, {"Retry-After": str(round(error.retry_after or 1))})
    return StreamingResponse(relayed(user, max_tokens, by_user, by_organisation), media_type="application/jsonl")


async def relayed(user: str, max_tokens: int, *reservations: AsyncReservation) -> AsyncIterator[str]:
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
            for reservation in reservations:
                await reservation.settle(used)
            billing.info("%s %d", user, used)

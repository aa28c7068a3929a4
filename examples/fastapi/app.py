"""Ten requests an hour for each client, whichever instance it asks.

RATELIMIT_URL=redis://localhost:6379/0 uvicorn app:app --no-proxy-headers --port 8001

Without ``--no-proxy-headers`` uvicorn believes the ``X-Forwarded-For`` of every peer on its own machine.
"""

from __future__ import annotations

import os

from fastapi import Depends, FastAPI

from ratelimit.integrations.fastapi import RateLimit

limit = RateLimit(os.environ.get("RATELIMIT_LIMIT", "10/hour"), name="fastapi-example")

app = FastAPI()


@app.get("/", dependencies=[Depends(limit)])
async def hello() -> dict[str, str]:
    return {"hello": "world"}

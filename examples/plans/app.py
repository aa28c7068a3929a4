"""Each customer may ask each route as often as its plan says; a new plan counts within a second, on live buckets.

RATELIMIT_URL=redis://localhost:6379/0 DATABASE=customers.sqlite3 uvicorn app:app --no-proxy-headers --port 8001

curl -i -H 'X-API-Key: key-of-acme' http://localhost:8001/search
curl -X PUT -H 'X-API-Key: key-of-acme' http://localhost:8001/plan/basic
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, closing
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Header, HTTPException

from ratelimit import TokensInheritance
from ratelimit.integrations.fastapi import RateLimit
from ratelimit.integrations.http import Assigned, Plans, api_key, combined, route

DATABASE = os.environ.get("DATABASE", "customers.sqlite3")
PLANS = {"free": "20/hour", "basic": "40/hour", "professional": "100/hour"}

customer = api_key(secret=os.environ.get("API_KEY_SECRET", "a secret for examples only"))


def query(statement: str, *values: object) -> Any:
    """The first row of what a statement gives."""
    with closing(sqlite3.connect(DATABASE)) as database, database:
        return database.execute(statement, values).fetchone()


async def plan_of(hashed_key: str | bytes) -> Assigned | None:
    row = await asyncio.to_thread(query, "SELECT plan, version FROM customers WHERE hashed_key = ?", hashed_key)
    return None if row is None else Assigned(*row)


plans = Plans(
    PLANS,
    plan_of,
    by=customer,
    ttl=1,  # second, for which processes go on with the plan that they know
    # A customer that had used up 20 and now has 40 gets 20 more. If customers may change plans back and forth as they
    # like, choose AS_IS: it adds no tokens at the change itself.
    inheritance=TokensInheritance.ADDITIVE,
)
limit = RateLimit(plans, key=combined(customer, route()), name="plans-example")


async def account(x_api_key: Annotated[str, Header()] = "") -> str:
    """The customer whose key a request has. Keys that nobody has do not get as far as to a bucket."""
    hashed_key = customer.hashed(x_api_key)
    if await plan_of(hashed_key) is None:
        raise HTTPException(401)
    return hashed_key


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
    query("CREATE TABLE IF NOT EXISTS customers (hashed_key TEXT PRIMARY KEY, plan TEXT, version INTEGER)")
    for key, plan in ("key-of-acme", "free"), ("key-of-globex", "professional"):
        query("INSERT OR IGNORE INTO customers VALUES (?, ?, 1)", customer.hashed(key), plan)
    yield


app = FastAPI(lifespan=lifespan)


@app.get("/search", dependencies=[Depends(account), Depends(limit)])
async def search() -> list[str]:
    return ["a result"]


@app.get("/reports/{year}", dependencies=[Depends(account), Depends(limit)])
async def report(year: int) -> dict[str, int]:
    return {"year": year}


@app.put("/plan/{plan}", status_code=204)  # not limited: who has nothing left should be able to buy more
async def change_plan(
    plan: Literal["free", "basic", "professional"], account: Annotated[str, Depends(account)]
) -> None:
    change = "UPDATE customers SET plan = ?, version = version + 1 WHERE hashed_key = ?"
    await asyncio.to_thread(query, change, plan, account)
    plans.forget(account)  # so that at least this process knows at once

"""One of many workers that call somebody else's API as often as it allows, all of them together.

RATELIMIT_URL=redis://localhost:6379/0 API_URL=http://localhost:9000 python worker.py

The API allows 20 calls a second, and bursts of 50. A worker waits for its turn, and then calls; so its call may come
late, when the machine or the network stalls, but never early. The calls that are late all come at once in the end,
and there may be one of each worker. Hence the burst of the API has to cover the calls that the fleet may save up in a
stall (40, those of two seconds, and without them a stall would cost a part of the quota), one of each of the eight
workers, and two for the clocks.
"""

from __future__ import annotations

import os
import time

import httpx

from ratelimit import ProxyManager, StoreError
from ratelimit.integrations.httpx import OutboundLimit, RateLimitTransport

LIMIT = "20/second burst 40 initial 1"  # nothing is saved up before there is a stall


def main() -> None:
    url = os.environ.get("RATELIMIT_URL", "redis://localhost:6379/0")
    with ProxyManager.from_url(url, timeout=10) as manager:  # seconds, as a worker is rather late than in error
        limit = OutboundLimit(LIMIT, key="example-api", manager=manager)
        work(httpx.Client(transport=RateLimitTransport(limit), timeout=30))


def work(client: httpx.Client) -> None:
    api, worker = os.environ.get("API_URL", "http://localhost:9000"), str(os.getpid())
    while True:
        try:
            client.get(api, headers={"X-Worker": worker, "X-Asked": str(time.monotonic())})
        except (StoreError, httpx.HTTPError) as error:
            print(f"worker {worker}: {error}", flush=True)
            time.sleep(0.5)


if __name__ == "__main__":
    main()

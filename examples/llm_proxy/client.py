"""A client of the proxy, which asks one question after the other.

PROXY_URL=http://localhost:8001 LLM_USER=alice python client.py
"""

from __future__ import annotations

import os
import time

import httpx

MAX_TOKENS = 400


def main() -> None:
    fields = {"x-user": os.environ.get("LLM_USER", "alice"), "x-organisation": "acme"}
    with httpx.Client(base_url=os.environ.get("PROXY_URL", "http://localhost:8001"), timeout=60) as client:
        while True:
            with client.stream("POST", "/chat", params={"max_tokens": MAX_TOKENS}, headers=fields) as answer:
                if answer.status_code == 200:
                    for line in answer.iter_lines():
                        print(line, flush=True)
                    continue
            print(f"refused with {answer.status_code}", flush=True)
            time.sleep(float(answer.headers.get("Retry-After", 1)))


if __name__ == "__main__":
    main()

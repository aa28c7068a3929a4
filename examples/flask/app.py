"""Ten requests an hour for each client, whichever instance it asks, and whichever of its processes.

RATELIMIT_URL=redis://localhost:6379/0 gunicorn app:app --workers 2 --bind localhost:8001
"""

from __future__ import annotations

import os

from flask import Flask

from ratelimit.integrations.flask import RateLimiter

app = Flask(__name__)
limiter = RateLimiter(app=app)


@app.get("/")
@limiter.limit(os.environ.get("RATELIMIT_LIMIT", "10/hour"), name="flask-example")
def hello() -> dict[str, str]:
    return {"hello": "world"}

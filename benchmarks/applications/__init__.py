"""One small application in each framework: bare, limited by this library, and by the libraries people use there.

Called in this process, without a server. Frameworks and libraries are imported when they are opened: where one is
missing, it is left out of the results, and all else runs.
"""

from __future__ import annotations

from typing import Final

from benchmarks.applications.common import ALONE, BARE, BUCKET, REDIS_PY, Framework, addresses
from benchmarks.applications.django import DJANGO, DJANGO_ASGI, REST_FRAMEWORK
from benchmarks.applications.fastapi import FASTAPI
from benchmarks.applications.flask import FLASK
from benchmarks.applications.starlette import STARLETTE

__all__ = ["ALONE", "BARE", "BUCKET", "FRAMEWORKS", "REDIS_PY", "Framework", "addresses"]

FRAMEWORKS: Final = (STARLETTE, FASTAPI, FLASK, DJANGO, DJANGO_ASGI, REST_FRAMEWORK)

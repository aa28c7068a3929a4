"""Make the description and the URLs that a package index shows, when a package is built.

An index shows README.md alone, so that links into the repository would lead nowhere. RATELIMIT_REPOSITORY_URL names the
repository for a release, as in ``make dist RATELIMIT_REPOSITORY_URL=https://github.com/OWNER/NAME``: links then lead
there, and the package lists its URLs. Without it each link becomes its text and the path in the sdist.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

VARIABLE = "RATELIMIT_REPOSITORY_URL"
RELATIVE_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)")
PAGES = {
    "Repository": "",
    "Documentation": "/blob/main/docs/index.md",
    "Changelog": "/blob/main/CHANGELOG.md",
    "Security": "/blob/main/docs/SECURITY.md",
}


class PackageMetadata(MetadataHookInterface):
    """Is asked by hatchling for the fields that ``pyproject.toml`` calls dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        repository = os.environ.get(VARIABLE, "").rstrip("/")
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": description(readme, repository)}
        metadata["urls"] = {name: repository + page for name, page in PAGES.items()} if repository else {}


def description(readme: str, repository: str) -> str:
    """Return the text of README.md for readers that do not have the repository beside it.

    :param repository: the URL of the repository; empty: there is none.
    """

    def replaced(link: re.Match[str]) -> str:
        image, text, target = link.groups()
        if repository:
            return f"{image}[{text}]({repository}/{'raw' if image else 'blob'}/main/{target})"
        path = target.partition("#")[0]
        return text if image or text == path else f"{text} (`{path}`)"

    return RELATIVE_LINK.sub(replaced, readme)

"""Each integration is an extra of its own, and says so where it is missing."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ratelimit.integrations
from tests.integrations.conftest import LEFT_OUT
from tests.integrations.packages import PACKAGES

ROOT = Path(__file__).parents[2]
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
WITHOUT_EXTRAS = "RATELIMIT_TEST_WITHOUT_EXTRAS"
HELPERS = {"extras", "logs", "managers", "marks", "recording", "switch"}


def test_every_integration_is_tested() -> None:
    assert not LEFT_OUT or WITHOUT_EXTRAS in os.environ, (
        f"left out for want of packages: {LEFT_OUT}; pip install 'ratelimit-redis[test]', or set {WITHOUT_EXTRAS}"
    )


def test_every_integration_is_listed_with_what_it_needs() -> None:
    here = Path(ratelimit.integrations.__path__[0])
    modules = {path.stem for path in here.iterdir() if not path.name.startswith("_")} - HELPERS
    assert modules == set(PACKAGES)


@pytest.mark.parametrize(
    ("module", "package"), [(module, package) for module, packages in PACKAGES.items() for package in packages]
)
def test_an_integration_without_its_package_says_what_to_install(module: str, package: str) -> None:
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"try:\n    import ratelimit.integrations.{module}\n"
        "except ImportError as error:\n    print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    extra = re.search(r"is not installed; run: pip install 'ratelimit-redis\[(.*)\]'$", told.strip())
    assert extra, told
    assert extra[1] == module
    assert extra[1] in DECLARED


def test_extras_are_called_as_users_guess() -> None:
    assert {"drf", "rest_framework"} <= set(DECLARED)
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    named = {
        extra.strip()
        for page in pages
        for extras in re.findall(r"ratelimit-redis\[([^]]*)\]", page.read_text())
        for extra in extras.split(",")
    }
    assert named
    assert named <= set(DECLARED)


@pytest.mark.parametrize("module", [module for module, packages in PACKAGES.items() if not packages])
def test_what_needs_no_extra_imports_no_package(module: str) -> None:
    program = (
        "import sys\n"
        f"import ratelimit.integrations.{module}\n"
        "print(*{name.partition('.')[0] for name in sys.modules})\n"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    packages = {package for needed in PACKAGES.values() for package in needed} | {"starlette", "werkzeug"}
    assert not packages & set(loaded)
    assert importlib.import_module(f"ratelimit.integrations.{module}").__doc__

"""The settings of type checkers that docs/asyncio.md names find an await that was forgotten."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs/asyncio.md").read_text()
SETTINGS = re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)

PROGRAM = """\
from ratelimit import AsyncProxyManager


async def main(manager: AsyncProxyManager) -> int:
    if manager.try_consume("a"):
        return 1
    manager.try_consume("b")
    return await manager.available_tokens("c")
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    assert SETTINGS
    (tmp_path / "pyproject.toml").write_text(SETTINGS[1])
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    return program


def test_mypy_finds_it(program: Path) -> None:
    pytest.importorskip("mypy", reason="it is of the extra `lint`, as `make lint` has it")
    command = [sys.executable, "-m", "mypy", "--no-incremental", program.name]
    found = subprocess.run(command, capture_output=True, text=True, cwd=program.parent, check=False).stdout
    assert [int(line) for line in re.findall(r"^program.py:(\d+): error", found, re.MULTILINE)] == [5, 7], found


def test_pyright_finds_it(program: Path) -> None:
    pytest.importorskip("pyright", reason="it is of the extra `lint`, as `make lint` has it")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, program.name]
    found = subprocess.run(command, capture_output=True, text=True, cwd=program.parent, check=False).stdout
    errors = json.loads(found)["generalDiagnostics"]
    assert [each["range"]["start"]["line"] + 1 for each in errors if each["severity"] == "error"] == [5, 7], found

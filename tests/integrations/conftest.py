"""Leaves out the tests of integrations whose packages are not installed, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integrations.packages import missing_for

HERE = Path(__file__).parent
LEFT_OUT = {path.name: missing for path in sorted(HERE.glob("test_*.py")) if (missing := missing_for(path.stem))}

collect_ignore = list(LEFT_OUT)


def pytest_report_header() -> list[str]:
    return [f"left out: {name}, for want of {', '.join(missing)}" for name, missing in LEFT_OUT.items()]


@pytest.fixture(params=[False, True], ids=["sync", "asyncio"])
def asynchronous(request: pytest.FixtureRequest) -> bool:
    """Whether a limiter is that of asyncio."""
    return bool(request.param)

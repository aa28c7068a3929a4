"""Fixtures of the tests of stores."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from tests.support.scripted_server import ScriptedServer


@pytest.fixture
async def scripted() -> AsyncGenerator[ScriptedServer]:
    server = ScriptedServer()
    async with server.listening():
        yield server

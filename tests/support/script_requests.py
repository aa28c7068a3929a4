"""Requests to the script that decides, as the engine makes them."""

from __future__ import annotations

from typing import Any

from ratelimit import Expiration
from ratelimit.core.commands import Command, Terms
from ratelimit.engine.script_arguments import MUST_EXIST, form_of, plain_consumption


def request(
    command: Command[Any], terms: Terms, expiration: Expiration, now: int, *, must_exist: bool, flags: int = 0
) -> tuple[bytes, ...] | None:
    """Return the arguments of the script for this command; None where the script does not know the command."""
    form = form_of(terms, expiration)
    if form is None:
        return None
    if must_exist:
        flags |= MUST_EXIST
    consumption = plain_consumption(command)
    if consumption is None:
        return form.request(command, terms, now, flags)
    return form.request_to_consume(consumption.tokens, consumption.calls, terms, now, flags)

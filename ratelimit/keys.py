"""Keys of buckets, and how keys and other values are printed in messages."""

from __future__ import annotations

Key = str | bytes
"""The name of a bucket: ``str``, which is encoded as UTF-8, or ``bytes``."""


def shown(key: Key) -> str:
    """Print a key for a message; keys are user input and may be a megabyte of anything."""
    return (
        repr(key)
        if len(key) <= 100
        else f"{key[:60]!r}... ({len(key)} {'bytes' if isinstance(key, bytes) else 'characters'})"
    )


def brief(value: object) -> str:
    """Print a value that is refused for a message, in short, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  # an int of more digits than Python prints, or an object with a repr of its own
        return f"a value of type {type(value).__name__} that cannot be printed"
    return text if len(text) <= 200 else f"{text[:160]}... ({len(text)} characters)"

"""Stores: they move bytes, and know nothing of tokens."""

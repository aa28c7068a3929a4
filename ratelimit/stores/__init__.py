"""Stores move bytes, and know nothing of tokens; only the one in this process can also carry out commands."""

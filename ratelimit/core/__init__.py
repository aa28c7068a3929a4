"""Limiting as pure values: limits, states, decisions and bytes.

No clock, lock, await or store in here: the time is an argument, and a change makes a new value. The token bucket
behaves as that of Bucket4j 8.19, to the byte; ``docs/bytes.md`` describes it.
"""

"""Bucket4j's token bucket: its limits, its state, its arithmetic and its bytes."""

"""Counts of decisions, for metrics."""

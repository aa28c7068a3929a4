"""The library beside its peers, on the same work: ``make bench``, or ``make bench-quick`` for every day."""

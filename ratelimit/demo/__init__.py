"""The command ``ratelimit demo``: a fleet of processes, and proof that its limit holds."""

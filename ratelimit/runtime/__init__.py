"""Clocks of the process, and what it must do after a fork."""

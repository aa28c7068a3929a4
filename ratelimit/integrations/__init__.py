"""Limits for other people's software: one module for each framework or client, imported only where it is used."""

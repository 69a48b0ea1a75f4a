"""Checks whether a run reproduces published results or this project's own: acceptance bands as data."""

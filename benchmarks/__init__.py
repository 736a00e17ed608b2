"""Measurements of bsprof itself; none of this is installed."""

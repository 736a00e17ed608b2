"""Order, budget, journal and resume; the process a case runs in."""

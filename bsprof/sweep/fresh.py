"""A child that is started by exec: `python -m bsprof.sweep.fresh FD TARGET REQUESTED_NS SCRATCH`."""

from __future__ import annotations

import sys

from bsprof.sweep.process import enter_fresh

if __name__ == "__main__":
    _, handle, target, requested_ns, scratch = sys.argv
    enter_fresh(int(handle), target, int(requested_ns), scratch)

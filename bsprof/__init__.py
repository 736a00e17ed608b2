"""Where a PyTorch training step's time goes, in numbers that can be trusted.

`Recorder` puts bsprof's phases into a training loop of one's own; `load` and `save` read and write result files.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bsprof.measure.recorder import Recorder
    from bsprof.model import Result
    from bsprof.store import load, save

__all__ = ["Recorder", "Result", "load", "save"]

_HOMES = {
    "Recorder": "bsprof.measure.recorder",
    "Result": "bsprof.model",
    "load": "bsprof.store",
    "save": "bsprof.store",
}


def __getattr__(name: str) -> Any:
    # Looked up when it is asked for, so that `import bsprof` and the command line load no torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

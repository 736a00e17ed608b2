"""Where a PyTorch training step's time goes, in numbers that can be trusted.

`Recorder` puts bsprof's phases into a training loop of one's own, `watch_loaders` watches its DataLoaders; `load` and
`save` read and write result files.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bsprof.loader.watching import Watching, watch_loaders
    from bsprof.measure.recorder import Recorder
    from bsprof.model import Result
    from bsprof.store import load, save

__all__ = ["Recorder", "Result", "Watching", "load", "save", "watch_loaders"]

_HOMES = {
    "Recorder": "bsprof.measure.recorder",
    "Result": "bsprof.model",
    "Watching": "bsprof.loader.watching",
    "load": "bsprof.store",
    "save": "bsprof.store",
    "watch_loaders": "bsprof.loader.watching",
}


def __getattr__(name: str) -> Any:
    # Looked up when it is asked for, so that `import bsprof` and the command line load no torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

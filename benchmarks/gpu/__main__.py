"""Run the suite: `python -m benchmarks.gpu`, or `python benchmarks/gpu`."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    # Run as a folder, Python puts that folder first; its modules are to be found in their package only.
    sys.path[:] = [str(HERE.parents[1]), *(entry for entry in sys.path if Path(entry or ".").resolve() != HERE)]
    from benchmarks.gpu.suite import main

    sys.exit(main())

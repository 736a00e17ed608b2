"""Errors that a user can act on, and the one place where they become exit codes."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of the command line.

    `DONE` everything asked for was done; `VERDICT` it was done and the answer is negative;
    `USAGE` it could not be done as asked; `INTERRUPTED` stopped by the user, what was measured is saved. A comparison
    has three more: `INCOMPARABLE` the two sides do not belong side by side, `INCONCLUSIVE` (only where that was asked
    for) something could not be decided, `MISSING` a case of the one side has no figures on the other.
    """

    DONE = 0
    VERDICT = 1
    USAGE = 2
    INCOMPARABLE = 3
    INCONCLUSIVE = 4
    MISSING = 5
    INTERRUPTED = 130


class BsprofError(Exception):
    """What went wrong in one line, naming the flag, file or path in the file, and a hint at the cure."""

    def __init__(self, message: str, *, hint: str | None = None, exit_code: Exit = Exit.USAGE) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code

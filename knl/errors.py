"""What can go wrong, the exit code that tells it to a shell, the line that tells it to a user."""

from __future__ import annotations

import contextlib
import sys
from typing import Any


def say(text: str) -> None:
    """A line for the user beside the result: on stderr, and known as knl's. A full disk under a log
    is no reason to stop."""
    with contextlib.suppress(OSError):
        print(f"knl: {text}", file=sys.stderr, flush=True)


class KnlError(Exception):
    """A failure told to the user in one line that says what, which value, and the cure.

    `shared` says that every rank raises the same error at the same point, so that one line and an
    ordinary end will do; otherwise the rank that fails must take the others down with it.
    """

    exit_code = 1

    def __init__(self, message: str, *, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared


class InputError(KnlError):
    """Wrong usage or input: refused before work starts."""

    exit_code = 2


class FailedError(KnlError):
    """The work failed."""


class CollectiveTimeoutError(FailedError):
    """A collective did not end in time: a rank is gone, stopped or late."""


class NonFiniteError(FailedError):
    """A loss or a gradient is no longer a number. `detail`: more than fits into a line."""

    def __init__(
        self, message: str, *, shared: bool = False, detail: dict[str, Any] | None = None
    ) -> None:
        super().__init__(message, shared=shared)
        self.detail = detail or {}


class DamagedError(FailedError):
    """A file is not as it was written."""


class StoppedError(KnlError):
    """Stopped early, in order, with a checkpoint to go on from."""

    exit_code = 75

"""Bounds calls that wait for other ranks and cannot be told to give up, and ends a job at once."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

from knl.errors import FailedError, InputError, say
from knl.leftovers import remove_segments, segments_of

_ABORT_S = 10.0
_VARIABLE = "KNL_START_TIMEOUT_S"
START_LIMIT = f"({_VARIABLE} sets the limit)"


def start_timeout() -> float:
    """Seconds for the ranks to meet, before a recipe is read: KNL_START_TIMEOUT_S, else 300.
    Raises InputError."""
    text = os.environ.get(_VARIABLE, "300")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InputError(f"{_VARIABLE}={text!r}: must be a number of seconds above 0, such as 300")
    return seconds


@contextlib.contextmanager
def limit(
    what: str, seconds: float, rank: int, tell: Callable[[str], str | None]
) -> Iterator[None]:
    """End the job when the block takes longer. `tell` completes the line for the user (rank
    `rank` prints it) or returns None where another rank prints it."""
    done = threading.Event()

    def watch() -> None:
        if done.wait(seconds):
            return
        problem = f"{what}: not done after {seconds:g} s"
        text: str | None = problem
        with contextlib.suppress(Exception):  # whatever it is, the job must end
            text = tell(problem)
        if done.is_set():
            return  # it came about while this rank asked around
        if text is not None:
            say(f"rank {rank}: {text}: look there, then start the job again {START_LIMIT}")
        end_job(FailedError.exit_code)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def end_job(code: int) -> NoReturn:
    """End this process now, and through MPI the other ranks, who would wait for it."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # knl's own line says more than MPI's
        timer = threading.Timer(_ABORT_S, os._exit, [code])  # an abort may hang, too
        timer.daemon = True
        timer.start()
        mpi.COMM_WORLD.Abort(code)
    remove_segments(segments_of("self"))
    os._exit(code)

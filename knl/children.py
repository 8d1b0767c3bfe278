"""Child processes that leave nothing running: ended by a mark in their environment."""

from __future__ import annotations

import contextlib
import queue
import signal
import subprocess
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from knl.leftovers import remove_openmp_segments

_MARK = "KNL_CHILD"
_GRACE_S = 5.0


@contextlib.contextmanager
def child(
    command: Sequence[str],
    environment: Mapping[str, str],
    cwd: Path | None = None,
    stderr: IO[bytes] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A command under way in a session of its own, its stdout a pipe. On leaving, it and all that
    it started are gone."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        command,
        env={**environment, _MARK: mark},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        start_new_session=True,
    )
    try:
        yield process
    except BaseException:
        _end(process, mark)
        raise
    for number in _end(process, mark):
        signal.raise_signal(number)


def lines_of(process: subprocess.Popen[bytes], silence_s: float) -> Iterator[bytes]:
    """The lines of its stdout, until it ends. Raises TimeoutError after `silence_s` seconds without
    one."""
    pipe = process.stdout
    assert pipe is not None  # `child` opens one
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        with pipe:
            for line in pipe:
                lines.put(line)
        lines.put(b"")

    threading.Thread(target=read, daemon=True).start()
    try:
        while line := lines.get(timeout=silence_s):
            yield line
        process.wait(timeout=silence_s)
    except (queue.Empty, subprocess.TimeoutExpired):
        raise TimeoutError(f"nothing for {silence_s:.0f} s: ended") from None


def last_words(text: str) -> str:
    """The line of a command's stderr that says best why it failed: not knl's notes beside, nor
    mpiexec's box around."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" =\t")]
    own = [line for line in lines if not line.startswith(("knl: ", "|", "="))]
    return (own or lines or ["no message"])[-1]


def _end(process: subprocess.Popen[bytes], mark: str) -> list[int]:
    """Leave nothing running: mpiexec passes SIGTERM on; what does not obey is killed. Ctrl-C must
    not come between: returns the signals that came meanwhile."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    held = {n: signal.signal(n, lambda number, _: came.append(number)) for n in numbers}
    try:
        started = _processes_of(mark)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        psutil.wait_procs(started, timeout=_GRACE_S)
        for survivor in _processes_of(mark):
            with contextlib.suppress(psutil.Error):
                survivor.kill()
        process.wait()
        psutil.wait_procs(started, timeout=1.0)
        remove_openmp_segments(each.pid for each in started)
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
    return came


def _processes_of(mark: str) -> list[psutil.Process]:
    """What runs with this mark in its environment: ranks have sessions of their own, and outlive an
    mpiexec that was killed."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == mark:
                found.append(process)
    return found

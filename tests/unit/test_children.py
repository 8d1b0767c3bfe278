"""Child processes: nothing is left of them, and no Ctrl-C is lost while they are ended."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time

import psutil
import pytest

from knl.children import child

STUBBORN = (
    "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "p = subprocess.Popen(['sleep', '60'], start_new_session=True); print(p.pid, flush=True);"
    "time.sleep(60)"
)


def test_what_does_not_obey_is_killed_with_all_that_it_started(monkeypatch):
    monkeypatch.setattr("knl.children._GRACE_S", 0.3)
    with child([sys.executable, "-c", STUBBORN], os.environ) as process:
        started = int(process.stdout.readline())
    assert process.returncode == -signal.SIGKILL
    with contextlib.suppress(psutil.NoSuchProcess):  # a container may leave its dead unburied
        killed, deadline = psutil.Process(started), time.monotonic() + 5.0
        while killed.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.01)
        assert killed.status() == psutil.STATUS_ZOMBIE
    process.stdout.close()


def test_a_ctrl_c_while_a_child_is_ended_is_not_lost(monkeypatch):
    monkeypatch.setattr("knl.children._GRACE_S", 1.0)

    def interrupt() -> None:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    killer = threading.Thread(target=interrupt)
    with (
        pytest.raises(KeyboardInterrupt),
        child([sys.executable, "-c", STUBBORN], os.environ) as process,
    ):
        process.stdout.readline()
        killer.start()
    killer.join()
    assert process.returncode == -signal.SIGKILL  # and it is ended all the same
    process.stdout.close()

"""The lock on a run directory: one owner, and who has died is recognised."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import threading
import time

import msgspec
import pytest

from knl.errors import InputError
from knl.train import lock as module
from knl.train.lock import Lock, Owner


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "_BEAT_S", 0.05)
    monkeypatch.setattr(module, "_POLL_S", 0.02)
    monkeypatch.setattr(module, "_PATIENCE_S", 0.5)


def leave(folder, **changed):
    """A lock as a job that was killed leaves it."""
    owner = msgspec.structs.replace(module._myself({}), token="old", **changed)
    (folder / "lock").write_bytes(msgspec.json.encode(owner))
    return owner


def owner_in(folder) -> Owner:
    return msgspec.json.decode((folder / "lock").read_bytes(), type=Owner)


def assert_taken(folder, environment=()):
    lock = Lock(folder, dict(environment))
    assert owner_in(folder).pid == os.getpid() and owner_in(folder).token != "old"
    assert not lock.lost()
    lock.release()
    assert list(folder.iterdir()) == []


def test_it_is_held_once_and_names_its_owner(tmp_path):
    held = Lock(tmp_path, {"SLURM_JOB_ID": "4711"})
    with pytest.raises(InputError) as caught:
        Lock(tmp_path, {})
    line = str(caught.value)
    assert f"in use by process {os.getpid()} on host {platform.node()}, job 4711: " in line
    held.release()
    assert_taken(tmp_path)


def test_a_dead_process_of_this_host_is_known_at_once(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    leave(tmp_path, pid=child.pid, started="123")
    assert_taken(tmp_path)


def test_a_process_number_that_was_given_again_is_not_its_owner(tmp_path):
    leave(tmp_path, started="123")
    assert_taken(tmp_path)


def test_a_host_that_has_started_anew_has_none_of_its_owners(tmp_path):
    leave(tmp_path, boot="another")
    assert_taken(tmp_path)


@pytest.mark.parametrize("where", [{"host": "elsewhere"}, {"pids": "another container"}])
def test_a_silent_owner_that_cannot_be_seen_is_given_up(tmp_path, capsys, where):
    leave(tmp_path, **where)
    assert_taken(tmp_path)
    assert re.search(r"waiting 0.5 s to see whether that still runs", capsys.readouterr().err)


def test_an_owner_elsewhere_that_beats_is_respected(tmp_path):
    owner = leave(tmp_path, host="elsewhere", job="12")
    done = threading.Event()

    def beat():
        number = 0
        while not done.wait(0.1):
            number += 1
            text = msgspec.json.encode(msgspec.structs.replace(owner, beat=number))
            (tmp_path / "lock").write_bytes(text)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(InputError, match=r"in use by process .* on host elsewhere, job 12: "):
            Lock(tmp_path, {})
    finally:
        done.set()
        thread.join()


def test_the_same_job_queued_again_does_not_wait_for_itself(tmp_path, capsys):
    leave(tmp_path, host="elsewhere", job="12", restarts="0")
    assert_taken(tmp_path, {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"}.items())
    assert "waiting" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "waits"),
    [("exit 0", False), ("echo RUNNING", True), ("echo Invalid job id >&2; exit 1", False),
     ("echo down >&2; exit 1", True)],
)  # fmt: skip
def test_slurm_is_asked_about_another_job(tmp_path, monkeypatch, capsys, answer, waits):
    tools, folder = tmp_path / "bin", tmp_path / "run"
    tools.mkdir()
    folder.mkdir()
    (tools / "squeue").write_text(f"#!/bin/sh\n{answer}\n")
    (tools / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    leave(folder, host="elsewhere", job="12")
    assert_taken(folder, {"SLURM_JOB_ID": "13"}.items())
    assert ("waiting" in capsys.readouterr().err) == waits


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": 1}'])
def test_half_a_lock_is_waited_for_and_taken(tmp_path, content):
    (tmp_path / "lock").write_bytes(content)
    assert_taken(tmp_path)


def test_a_lock_that_is_taken_away_is_noticed_and_left(tmp_path):
    held = Lock(tmp_path, {})
    (tmp_path / "lock").rename(tmp_path / "aside")
    assert held.lost()
    leave(tmp_path, host="elsewhere")
    assert held.lost()
    time.sleep(0.2)  # some beats
    held.release()
    assert owner_in(tmp_path).token == "old"


def test_of_many_that_come_at_once_one_takes_a_stale_lock(tmp_path):
    leave(tmp_path, started="123")
    taken, refused = [], []

    def take():
        try:
            taken.append(Lock(tmp_path, {}))
        except InputError as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [lock.lost() for lock in taken].count(False) == 1
    for lock in taken:
        lock.release()


def test_jobs_of_another_cluster_are_not_asked_for_here(tmp_path, monkeypatch):
    """Both write to one file system, and number their jobs alike."""
    squeue = tmp_path / "squeue"
    squeue.write_text(
        "#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n"
    )
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    here = module._myself({"SLURM_JOB_ID": "5", "SLURM_CLUSTER_NAME": "one"})
    for cluster, over in (("one", True), ("two", False), ("", False)):
        other = msgspec.structs.replace(here, job="777", cluster=cluster)
        assert module._job_is_over(other, here) is over
    again = msgspec.structs.replace(here, restarts="1")
    assert module._job_is_over(here, again)
    assert not module._job_is_over(msgspec.structs.replace(here, cluster="two"), again)

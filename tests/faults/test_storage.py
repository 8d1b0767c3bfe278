"""Where a run writes there is no room, no permission, no folder any more; and other surroundings
that a job may meet. Needs root, for small file systems and names of its own."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from knl.errors import DamagedError
from knl.train.checkpoint import listed, read

from ..mpi.launch import knl, run
from .campaign import build_preload
from .jobs import knl_lines, only_line, rank, steps, stop, training, until

OFTEN = ("--set", "train.checkpoint_minutes=0.005")
SHORT = ("--set", "train.epochs=4", "--profile", "none", *OFTEN)
root = pytest.mark.skipif(os.geteuid() != 0, reason="not root: cannot mount a small file system")


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    """A file system of its own, of so many bytes."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(path: Path) -> None:
    """Until there is no room left."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 4096)


@root
def test_a_full_disk_stops_no_training_and_is_told_once(tmp_path):
    with small_disk(tmp_path / "disk", "8m") as disk:
        folder = disk / "run"
        filler = disk / "filler"
        with training(folder, *OFTEN) as job:
            until(lambda: len(listed(folder / "checkpoints")) >= 2, job)
            fill(filler)
            at = steps(folder)
            until(lambda: not list((folder / "checkpoints").glob(".step*")), job)
            old = [path.name for path in listed(folder / "checkpoints")]
            until(lambda: (folder / "lock").exists() and running_on(job, 3.0), job)
            assert [path.name for path in listed(folder / "checkpoints")][-1:] <= old
            filler.unlink()
            until(lambda: steps(folder) > at + 3 and newer(folder, old), job)
            job.process.send_signal(signal.SIGTERM)
            done = job.finish(30.0)
    assert done.returncode == 75, done.stderr
    lines = knl_lines(done.stderr)
    assert sum("No space left on device" in x and "checkpoint of step" in x for x in lines) == 1
    assert sum("is written: there is room again" in line for line in lines) == 1
    assert "Traceback" not in done.stderr


def running_on(job, seconds: float) -> bool:
    """The job runs for so long."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        job.process.wait(seconds)
        return False
    return True


def newer(folder: Path, old: list[str]) -> bool:
    found = listed(folder / "checkpoints")
    return bool(found) and found[0].name > max(old)


@root
def test_a_last_checkpoint_without_room_is_a_failure_that_names_the_last_good_one(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:  # room for one of 0.6 MB, not for a second
        command = knl("train", "digits", "-n", "2", *SHORT, "--run-dir", str(disk / "run"))
        first = run([*command, "--max-steps", "2"])
        assert first.returncode == 75, first.stderr
        done = run(command)
    assert done.returncode == 1, done.stderr
    lines = knl_lines(done.stderr)
    assert "could not be written (No space left on device); the last good" in lines[-1], lines


@root
def test_a_run_directory_that_is_read_only_is_refused(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        done = run(knl("train", "digits", *SHORT, "--run-dir", str(disk / "run")))
    assert done.returncode == 2
    (line,) = knl_lines(done.stderr)
    assert line.endswith("cannot be written: Read-only file system")


@root
def test_checkpoints_that_become_read_only_stop_no_training(tmp_path):
    folder = tmp_path / "run"
    with training(folder, *OFTEN) as job:
        until(lambda: listed(folder / "checkpoints"), job)
        place = folder / "checkpoints"
        subprocess.run(["mount", "--bind", place, place], check=True)
        try:
            readonly = ["mount", "-o", "remount,bind,ro", place]
            until(lambda: subprocess.run(readonly, check=False).returncode == 0, job)
            assert running_on(job, 3.0)
        finally:
            subprocess.run(["umount", "-l", place], check=True)
        before = [path.name for path in listed(place)]
        until(lambda: newer(folder, before), job)
        job.process.send_signal(signal.SIGTERM)
        done = job.finish(30.0)
    assert done.returncode == 75, done.stderr
    lines = knl_lines(done.stderr)
    assert sum("Read-only file system" in line for line in lines) == 1, lines


def test_a_run_directory_removed_under_a_job_ends_it(tmp_path):
    folder = tmp_path / "run"
    with training(folder) as job:
        shutil.rmtree(folder)
        line = only_line(job.finish(30.0))
    assert "stopped after step " in line
    assert "the run directory's lock is not this job's any more: it was removed" in line


def test_flips_at_200_places_of_a_real_checkpoint_are_never_read_as_good(tmp_path):
    folder = tmp_path / "run"
    run(knl("train", "digits", *SHORT, "--max-steps", "3", "--run-dir", str(folder)))
    path = listed(folder / "checkpoints")[0]
    whole = path.read_bytes()
    for place in random.Random(0).sample(range(8 * len(whole)), 200):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(DamagedError):
            read(path)
    done = run(knl("checkpoint", "verify", str(folder), "--json"))
    assert done.returncode == 1 and not json.loads(done.stdout)["whole"]


def test_a_clock_that_is_set_back_changes_nothing(tmp_path):
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to build slow_and_back.c with: install g++")
    folder, back = tmp_path / "run", tmp_path / "back"
    preload = {"LD_PRELOAD": str(build_preload(tmp_path)), "KNL_TEST_CLOCK_FILE": str(back)}
    with training(folder, *OFTEN, KNL_TIME_LIMIT="86400", **preload) as job:
        back.touch()
        at = steps(folder)
        until(lambda: steps(folder) > at + 5, job)
        newest = listed(folder / "checkpoints")[0].name
        until(lambda: newer(folder, [newest]), job)
        job.process.send_signal(signal.SIGTERM)
        assert job.finish(30.0).returncode == 75
    at = steps(folder)
    with training(folder) as job:  # what is there is from the future, if clocks are asked
        until(lambda: steps(folder) > at + 5, job)
        job.process.send_signal(signal.SIGTERM)
        done = job.finish(30.0)
    assert done.returncode == 75 and "goes on after step" in done.stderr


def apart(*setup: str) -> list[str]:
    """A command in surroundings of its own, set up by these shell commands."""
    return ["unshare", "--mount", "--uts", "sh", "-ec", "; ".join([*setup, 'exec "$@"']), "sh"]


@root
@pytest.mark.parametrize("provider", ["auto", "gloo"])
def test_no_room_in_shared_memory_is_named(tmp_path, provider):
    setup = apart("mount -t tmpfs -o size=16k none /dev/shm")
    options = ("-n", "2", *SHORT, "--provider", provider, "--run-dir", str(tmp_path / "run"))
    done = run([*setup, *knl("train", "digits", *options)], timeout=120.0)
    assert "make room in /dev/shm, which has " in only_line(done)


@root
def test_a_hostname_that_does_not_resolve_is_no_matter(tmp_path):
    setup = apart("hostname nowhere.invalid")
    options = ("-n", "2", *SHORT, "--json", "--run-dir", str(tmp_path / "run"))
    done = run([*setup, *knl("train", "digits", *options)], timeout=120.0)
    assert done.returncode == 0, done.stderr
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["hosts"] == ["nowhere.invalid"]


def test_two_jobs_cannot_train_into_one_folder(tmp_path):
    folder = tmp_path / "run"
    with training(folder) as job:
        pids = [rank(job, number) for number in (0, 1)]
        for (
            pid
        ) in pids:  # Linux 6.18 was seen to let others wait for 35 s for CPUs that ranks keep busy
            stop(pid)
        command = ["env", "SLURM_JOB_ID=77", *knl("train", "digits", "--run-dir", str(folder))]
        done = run(command)
        assert done.returncode == 2, done.stderr
        (line,) = knl_lines(done.stderr)
        assert f"{folder} is in use by process {pids[0]} on host " in line
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        job.process.send_signal(signal.SIGTERM)
        assert job.finish(30.0).returncode == 75


def test_secrets_are_not_written_down_and_umask_is_kept(tmp_path):
    folder = tmp_path / "run"
    secrets = {"KNL_API_TOKEN": "geheim", "AWS_SECRET_ACCESS_KEY": "geheim", "HOME_KEY": "geheim"}
    command = knl("train", "digits", *SHORT, "-n", "2", "--run-dir", str(folder))
    done = run(["sh", "-c", 'umask 077; exec "$@"', "sh", *command], **secrets)
    assert done.returncode == 0, done.stderr
    assert "geheim" not in done.stderr
    for path in (folder, *folder.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path
        assert path.is_dir() or b"geheim" not in path.read_bytes(), path
    assert "KNL_" in (folder / "environment.json").read_text()


def test_nothing_that_is_read_is_executed(tmp_path):
    """A pickle under a checkpoint's name."""
    import pickle

    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    evil = tmp_path / "evil"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(evil),)

    path = folder / "checkpoints" / "step-00000001.safetensors"
    path.write_bytes(pickle.dumps(Evil()))
    done = run(knl("train", "digits", "--run-dir", str(folder)))
    assert done.returncode == 2 and "is damaged" in done.stderr
    assert not evil.exists()

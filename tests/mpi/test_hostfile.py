"""`knl run --hostfile`: over two hosts with a network between them, by each kind of mpiexec; and
what is refused before anything starts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time

import pytest

from knl.errors import InputError
from knl.hosts import read_hosts, with_ranks

from .hosts import NAMES, two_hosts
from .launch import knl, mpiexec, run, started
from .runs import ARGUMENTS, Run

WHO = "echo rank $PMI_RANK $MPI_LOCALRANKID $(hostname) $(pwd) ${I_MPI_FABRICS-none} $I_MPI_PIN"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with two_hosts(tmp_path_factory.mktemp("hosts")) as both:
        (both.work / "hostfile").write_text("# the cluster\nhere\n\nthere:2  # two CPUs\n")
        yield both


@pytest.fixture
def folder(hosts):
    return hosts.work


def on_hosts(hosts, *arguments):
    return [*hosts.inside, *knl("run", "--hostfile", "hostfile", *arguments)]


def by_intel(hosts):
    mpiexec(1)  # skips where there is no stack
    return {"I_MPI_HYDRA_BOOTSTRAP_EXEC": str(hosts.ssh), "FI_PROVIDER": "tcp"}


def test_slots_say_how_many_ranks_start_on_which_host(hosts, folder):
    done = run(on_hosts(hosts, "--", "sh", "-c", WHO), **by_intel(hosts))
    assert done.returncode == 0, done.stderr
    ranks = sorted(re.findall(r"^rank (\d) (\d) (\w+) (.+) (\S+) (\S+)$", done.stdout, re.M))
    usual = len(ranks) - 2  # what the plan has for a host without slots
    assert [host for _, _, host, *_ in ranks] == ["here"] * usual + ["there"] * 2
    assert [int(local) for _, local, *_ in ranks] == [*range(usual), 0, 1]
    # No fabric of one host, nothing pinned by MPI, the same folder.
    assert {(cwd, *rest) for *_, cwd, rest, pin in ranks for rest in [(rest, pin)]} == {
        (str(folder), "none", "0")
    }
    assert "there" in (hosts.ssh.parent / "connected").read_text()


def test_digits_train_over_the_network_as_on_one_host(hosts, folder, single):
    train = knl(*ARGUMENTS, "--run-dir", "run")
    done = run(on_hosts(hosts, "-n", "1", "--", *train), timeout=120, **by_intel(hosts))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["ranks"], result["provider"]) == (2, "oneccl")
    assert Run(done, folder / "run").losses == pytest.approx(single.losses, abs=1e-4)
    environment = (folder / "run" / "environment.json").read_text()
    assert all(name in environment for name in NAMES)


def test_a_signal_stops_a_training_with_a_checkpoint(hosts, folder):
    train = knl("train", "digits", "--run-dir", "long", "--set", "train.epochs=4000")
    with started(on_hosts(hosts, "-n", "1", "--", *train), **by_intel(hosts)) as job:
        wait_for(lambda: (folder / "long" / "metrics.jsonl").exists(), job)
        job.process.send_signal(signal.SIGTERM)
        done = job.finish(40)
    assert done.returncode == 75, done.stderr
    assert "with a checkpoint" in done.stderr
    assert list((folder / "long" / "checkpoints").glob("step-*"))


def test_a_second_signal_ends_what_does_not_listen(hosts, folder):
    deaf = f"trap '' USR1; touch '{folder}'/up-$PMI_RANK; while :; do sleep 0.1; done"
    with started(on_hosts(hosts, "-n", "1", "--", "sh", "-c", deaf), **by_intel(hosts)) as job:
        wait_for(lambda: len(list(folder.glob("up-*"))) == 2, job)
        for _ in range(2):
            job.process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        done = job.finish(20)
    assert done.returncode == 128 + signal.SIGINT


def test_where_a_rank_is_killed_the_others_are_ended(hosts):
    script = "echo to you >&2; if [ $PMI_RANK = 1 ]; then kill -9 $$; fi; sleep 100"
    command = on_hosts(hosts, "-n", "1", "--prefix", "--", "sh", "-c", script)
    done = run(command, **by_intel(hosts))
    assert {"[0] to you", "[1] to you"} <= set(done.stderr.splitlines())
    assert "knl-rank" not in done.stderr
    assert done.returncode == 128 + signal.SIGKILL
    assert "knl: ended with status 137: rank 1" in done.stderr.splitlines()


def test_a_rank_that_stops_first_leaves_the_others_time(hosts, folder):
    """Rank 0 may be at its checkpoint; mpiexec left to itself would kill it."""
    script = f"[ $PMI_RANK = 1 ] || {{ sleep 2; touch '{folder}/written'; }}; exit 75"
    command = on_hosts(hosts, "-n", "1", "--", "sh", "-c", script)
    assert run(command, **by_intel(hosts)).returncode == 75
    assert (folder / "written").exists()


def test_a_host_that_is_not_there_is_told_with_the_cure(hosts, folder):
    (folder / "wrong").write_text("here\nnowhere\n")
    command = [*hosts.inside, *knl("run", "--hostfile", "wrong", "-n", "1", "--", "true")]
    done = run(command, **by_intel(hosts), KNL_START_TIMEOUT_S="3")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("knl: no rank has started")
    assert "be reached by ssh without a password" in last


@pytest.mark.parametrize(
    ("program", "package", "agent"),
    [
        ("mpiexec.mpich", "mpich", "HYDRA_LAUNCHER_EXEC"),
        ("mpiexec.openmpi", "openmpi-bin", "OMPI_MCA_plm_rsh_agent"),
    ],
)
def test_another_mpi_s_mpiexec_starts_them_too(hosts, folder, program, package, agent, tmp_path):
    if shutil.which(program) is None:
        pytest.skip(f"no {program}: this machine lacks Debian package {package}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mpiexec").write_text(f'#!/bin/sh\nexec {program} "$@"\n')
    (tmp_path / "bin" / "mpiexec").chmod(0o755)
    # An environment without Intel MPI: that one would be taken first.
    bare = f"import sys; sys.prefix = '{tmp_path}'; from knl.cli import main; main()"
    script = 'echo rank "${PMI_RANK-$OMPI_COMM_WORLD_RANK}" $(hostname) "$KNL_ASKED"; exit 3'
    command = [sys.executable, "-c", bare, "run", "--hostfile", "hostfile", "-n", "1", "--"]
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    environment = {agent: str(hosts.ssh), "PATH": path, "KNL_ASKED": "yes"}
    done = run([*hosts.inside, *command, "sh", "-c", script], **environment)
    assert sorted(re.findall(r"^rank .*$", done.stdout, re.M)) == [
        "rank 0 here yes",
        "rank 1 there yes",
    ], done
    assert done.returncode == 3
    assert "knl: ended with status 3: rank 0, 1" in done.stderr.splitlines()


def wait_for(there, job):
    deadline = time.monotonic() + 60
    while not there():
        assert job.process.poll() is None and time.monotonic() < deadline, job.process.communicate()
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\nb c\n", r"line 2: 'b c': must be host or host:slots"),
        ("a:0\n", r"line 1: 'a:0': must be .* 1 to 9999 slots"),
        ("-oProxyCommand=x\n", r"line 1: '-oProxyCommand=x': must be host"),
        ("a\n# b\nb\na:2\n", r"line 4: a is on line 1 already"),
        ("# none\n", r"names no host"),
    ],
)
def test_a_malformed_line_is_refused_by_its_number(tmp_path, text, words):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        read_hosts(path)


def test_ranks_come_from_n_then_the_file_then_the_plan(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("a\nb:3\n")
    hosts = read_hosts(path)
    assert [host.slots for host in with_ranks(path, hosts, None, 2)] == [2, 3]
    assert [host.slots for host in with_ranks(path, hosts, 1, 2)] == [1, 1]
    with pytest.raises(InputError, match=r"-n 4: .*line 2 gives b 3 slots"):
        with_ranks(path, hosts, 4, 2)


def test_what_cannot_start_is_refused_in_one_line(tmp_path):
    (tmp_path / "hosts").write_text("a\n")
    for arguments, words in (
        (("--hostfile", "no-file", "--", "true"), "--hostfile no-file: No such file"),
        (("--hostfile", "hosts", "--", "no-such-program"), "no-such-program: no such program"),
    ):
        done = run(knl("run", *arguments), cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert words in line
    done = run(knl("run", "--hostfile", "hosts", "--", "true"), cwd=tmp_path, RANK="0",
               WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2")  # fmt: skip
    assert done.returncode == 2
    assert "this is already rank 0 of 2 of a launch by torchrun" in done.stderr

"""Two hosts on this machine: namespaces of their own for network, host name, shared memory and
/etc/hosts, joined by a virtual cable. A stand-in for ssh enters them with a bare environment, as
ssh would. Nothing outlives the processes, and nothing has a fixed name."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

NAMES = ("here", "there")
# ssh [options] HOST COMMAND...: HOST is the first word that is no option.
SSH = """#!/bin/sh
while case $1 in -*) true;; *) false;; esac; do shift; done
echo "$1" >> "{folder}/connected"
pid=$(cat "{folder}/$1.pid") || exit 255
shift
exec nsenter --target "$pid" --net --uts --ipc --mount -- \\
    env -i PATH=/usr/bin:/bin HOME="$HOME" {mark} sh -c "cd /; $*"
"""


@dataclass(frozen=True)
class Hosts:
    """`inside`: what to put before a command to run it on the first, in the folder `work`; `ssh`:
    the stand-in, which notes in the file `connected` beside it what it was asked for."""

    inside: list[str]
    ssh: Path
    work: Path


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Skips where namespaces cannot be made."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        pytest.skip("hosts of their own need root rights, and Debian packages util-linux, iproute2")
    table = folder / "hosts"
    addresses = {name: f"10.77.0.{number}" for number, name in enumerate(NAMES, start=1)}
    table.write_text(
        "127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in addresses.items())
    )
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(_host(folder, name, table)) for name in NAMES]
        pids = [str(process.pid) for process in processes]
        cable = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0"]
        _run([*_enter(pids[0]), *cable, "netns", pids[1]])
        for pid, ip in zip(pids, addresses.values()):
            for command in (f"addr add {ip}/24 dev eth0", "link set eth0 up", "link set lo up"):
                _run([*_enter(pid), "ip", *command.split()])
        ssh = folder / "ssh"
        ssh.write_text(SSH.format(folder=folder, mark="KNL_TEST_MARK=$KNL_TEST_MARK"))
        ssh.chmod(0o755)
        work = folder / "a folder"
        work.mkdir()
        yield Hosts([*_enter(pids[0])[:-1], f"--wdns={work}", "--"], ssh, work)


def _enter(pid: str) -> list[str]:
    return ["nsenter", "--target", pid, "--net", "--uts", "--ipc", "--mount", "--"]


@contextlib.contextmanager
def _host(folder: Path, name: str, table: Path) -> Iterator[subprocess.Popen]:
    script = (
        f"hostname {name} && mount -t tmpfs -o size=1g shm /dev/shm "
        f'&& mount --bind "{table}" /etc/hosts && touch "{folder}/{name}.up" && exec sleep 600'
    )
    process = subprocess.Popen(
        ["unshare", "--net", "--uts", "--ipc", "--mount", "sh", "-c", script],
        stdin=subprocess.DEVNULL,
        stderr=sys.stderr,
    )
    try:
        deadline = time.monotonic() + 10
        while not (folder / f"{name}.up").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.skip("this machine does not let root make namespaces")
            time.sleep(0.02)
        (folder / f"{name}.pid").write_text(str(process.pid))
        yield process
    finally:
        process.kill()
        process.wait()


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)

"""`knl bundle`: the Python environment as one archive, which runs wherever it is unpacked.

The archive holds one folder, knl-env/: not a virtual environment, which would point to an
interpreter elsewhere, but an interpreter with its standard library and the packages of the
environment. Python finds both from where its executable lies.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from knl.bar import progress_bar
from knl.bundle.archive import write_archive
from knl.bundle.contents import FOLDER, Contents, collect
from knl.bundle.environment import Environment, environment_here
from knl.bundle.try_out import Proof, try_out
from knl.errors import FailedError, InputError, say
from knl.files import replace_file

_SMALLEST_PART = 0.5  # that gzip leaves of libraries and byte code: 0.35 to 0.4 was measured


@dataclass(frozen=True)
class Bundle:
    """What was written. `bytes`: of the archive; `left_out`: bytes by reason; `outside`: libraries
    that the proof loaded from folders which the nodes must have as well."""

    path: str
    bytes: int
    unpacked_bytes: int
    files: int
    seconds: float
    left_out: dict[str, int]
    ranks: int
    provider: str
    outside: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def write_bundle(out: Path, variables: Mapping[str, str]) -> Bundle:
    """Pack the environment that this Python runs in, and prove that the archive works.

    `variables`: the environment variables. Raises InputError for what cannot be packed and where
    there is no room, FailedError when the bundle does not run; then no archive is left.
    """
    began = time.monotonic()
    if not out.name.endswith((".tar.gz", ".tgz")):
        raise InputError(f"--out {out}: a bundle is a .tar.gz file, so let its name end in that")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}; make it first")
    environment = environment_here()
    say(f"packing {environment.prefix}")
    with tempfile.TemporaryDirectory(prefix="knl-bundle-") as scratch:
        contents = collect(environment, Path(scratch))
        _require_room(out.parent, contents.size * _SMALLEST_PART, "--out chooses another place")
        _require_room(
            Path(scratch), contents.size, "the bundle is tried out there; TMPDIR=/folder moves it"
        )
        try:
            size, proof = _write(out, contents, environment, Path(scratch), variables)
        except OSError as error:
            where = error.filename or out
            raise FailedError(f"{where}: {error.strerror}; no bundle was written") from None
    seconds = time.monotonic() - began
    return Bundle(
        str(out),
        size,
        contents.size,
        len(contents.entries),
        round(seconds, 1),
        contents.left_out,
        proof.ranks,
        proof.provider,
        proof.outside,
    )


def _write(
    out: Path,
    contents: Contents,
    environment: Environment,
    scratch: Path,
    variables: Mapping[str, str],
) -> tuple[int, Proof]:
    with replace_file(out) as file:
        with progress_bar(Console(stderr=True), "packing, MB") as bar:
            task = bar.add_task(out.name, total=round(contents.size / 1e6))
            write_archive(file, contents.entries, lambda n: bar.advance(task, n / 1e6))
        file.flush()
        say(f"trying it out below {scratch.parent}")
        unpacked = scratch / "unpacked"
        unpacked.mkdir()
        proof = try_out(Path(file.name), unpacked, environment, variables)
        return os.fstat(file.fileno()).st_size, proof


def _require_room(folder: Path, needed: float, cure: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder}: {free / 1e9:.2f} GB free, up to {needed / 1e9:.2f} GB are needed: {cure}"
        )


def describe(bundle: Bundle) -> str:
    """For people, in a few lines."""
    left_out = ", ".join(
        f"{reason} {size / 1e6:.0f}"
        for reason, size in sorted(bundle.left_out.items(), key=lambda item: -item[1])
    )
    lines = [
        f"{bundle.path}: {bundle.bytes / 1e9:.2f} GB, unpacked "
        f"{bundle.unpacked_bytes / 1e9:.2f} GB in {bundle.files} files; {bundle.seconds:.0f} s",
        f"left out (MB): {left_out or 'nothing'}",
        f"tried: unpacked elsewhere, trained on {bundle.ranks} rank(s) over {bundle.provider}",
        f"use: tar -xzf {bundle.path} -C /tmp; /tmp/{FOLDER}/bin/python -m knl --help",
    ]
    if bundle.outside:
        lines.append(f"the nodes need these as well: {', '.join(bundle.outside)}")
    return "\n".join(lines)

"""`knl bundle`: the Python environment as one archive for node-local storage."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import typer

from knl.errors import InputError


def bundle(
    out: Path = typer.Option(Path("knl-env.tar.gz"), metavar="FILE", help="Archive to write."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Pack the Python environment that this knl is in, for the nodes' own disks.

    Example: knl bundle --out $WORK/knl-env.tar.gz

    Hundreds of nodes that import torch from a parallel file system bring it to its knees; from an
    archive each reads one file. It unpacks to one folder, knl-env, with an interpreter of its own:
    knl-env/bin/python -m knl works wherever it lies. Tests, headers, tools and GPU libraries stay
    out. Before the archive is there, it is unpacked below TMPDIR and trains a step on two ranks.
    """
    from knl.bundle import describe, write_bundle

    if out.is_dir():
        raise InputError(
            f"--out {out}: is a folder; name a file in it, such as {out}/knl-env.tar.gz"
        )
    for number in (signal.SIGTERM, signal.SIGHUP):  # leave no half archive, as at Ctrl-C
        signal.signal(number, signal.default_int_handler)
    written = write_bundle(out, os.environ)
    print(json.dumps(written.to_json()) if as_json else describe(written))

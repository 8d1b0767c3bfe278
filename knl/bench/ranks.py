"""Runs a module of a bench as the ranks of a node, under the plan as `knl train` has them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from knl.children import child, last_words
from knl.comm.watchdog import end_job
from knl.errors import FailedError
from knl.launch import ranks_command


def run_ranks(
    module: str,
    ranks: int,
    wanted: Mapping[str, Any],
    environment: Mapping[str, str],
    limit_s: float,
    profile: Path | None = None,
) -> dict[str, Any]:
    """Start `python -m module WANTED` (as JSON) as so many ranks on this host, each bound by the
    plan; return the JSON object that rank 0 tells. `profile`: the newest that fits, or the rule, if
    not given.

    Raises FailedError with the ranks' last words, or when there is no end after `limit_s` seconds.
    """
    plan = ["--profile", str(profile)] if profile else []
    rank = ["-m", "knl", "run", *plan, "--", sys.executable, "-m", module, json.dumps(wanted)]
    command, environment = ranks_command(ranks, rank, environment, planned=True)
    out = output(command, environment, limit_s, module)
    found = [line for line in out.splitlines() if line.startswith("{")]
    if not found:
        raise FailedError(f"{module}: the ranks ended without a result")
    result: dict[str, Any] = json.loads(found[-1])
    return result


def output(command: list[str], environment: Mapping[str, str], limit_s: float, name: str) -> str:
    """What a command writes to stdout. Raises FailedError when it fails or takes longer."""
    with tempfile.TemporaryFile() as stderr, child(command, environment, None, stderr) as process:
        try:
            out, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise FailedError(f"{name}: no end after {limit_s:.0f} s") from None
        if process.returncode != 0:
            stderr.seek(0)
            last = last_words(stderr.read().decode(errors="replace"))
            raise FailedError(f"{name}: status {process.returncode}: {last}")
    return out.decode(errors="replace")


def as_rank(work: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """The main of such a module: do `work` and, where it returns something, tell it. A rank that
    fails takes the others down."""
    from knl.native import stdout_to

    with stdout_to(2) as stdout:
        try:
            result = work(json.loads(sys.argv[1]))
        except BaseException as error:
            kind = "" if isinstance(error, FailedError) else f"{type(error).__name__}: "
            print(kind + " ".join(str(error).split()), file=sys.stderr, flush=True)
            end_job(FailedError.exit_code)
        if result is not None:
            os.write(stdout, b"\n" + json.dumps(result).encode() + b"\n")

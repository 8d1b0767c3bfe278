"""What the rank scripts share: open the world, and note the outcome of each check."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from knl.comm.bootstrap import open_bootstrap
from knl.comm.world import world_from

LIMIT_S = 20.0  # for a rank to come to a collective


class Checks:
    """Opens the world, and writes the outcome of each check at once, so that a run that hangs says
    where."""

    def __init__(self, folder: Path) -> None:
        self.world = world_from(os.environ)
        self.bootstrap = open_bootstrap(self.world)
        self._file = (folder / f"rank-{self.world.rank}.jsonl").open("x", buffering=1)

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[None]:
        """Everything in here must pass on this rank."""
        outcome = "ok"
        try:
            yield
        except Exception:
            outcome = traceback.format_exc()
        self._file.write(json.dumps([name, outcome]) + "\n")
        passed = [text == "ok" for text in self.bootstrap.gather(outcome)]
        if any(passed) and not all(passed):
            sys.exit(f"{name}: some ranks passed, so the others are out of step: no more checks")

"""A rank that writes down who it is: ranks_world.py FOLDER [mpi]; "mpi": and what MPI says."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import astuple
from pathlib import Path

from knl.comm.world import world_from

world = world_from(os.environ)
record = [astuple(world)]
if sys.argv[2:] == ["mpi"]:
    from mpi4py import MPI

    node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    record.append((MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size, node.rank, node.size, "mpi"))
(Path(sys.argv[1]) / f"{os.getpid()}.json").write_text(json.dumps(record))

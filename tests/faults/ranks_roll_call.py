"""Three ranks that act three hosts call the roll: ranks_roll_call.py FOLDER ABSENT."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from knl.comm import roll_call
from knl.comm.bootstrap import MpiBootstrap
from knl.comm.roll_call import MpiReports, Place, RollCall
from knl.comm.world import world_from

folder, absent = Path(sys.argv[1]), int(sys.argv[2])
world = world_from(os.environ)
bootstrap = MpiBootstrap(world)
places = [Place(f"h{rank}", 100 + rank) for rank in range(world.size)]
call = RollCall(world, places, MpiReports(bootstrap.comm))
told = folder / "told"
if world.rank == absent:
    while not told.exists():
        time.sleep(0.05)
else:
    roll_call._SILENCE_S = 60.0
    text = call.tell("x")  # whoever is not to tell is silent until the job ends
    with told.open("x") as file:
        file.write(f"{world.rank} {text}")
    time.sleep(0.5)
    bootstrap.comm.Abort(1)

"""A rank that meets the others at torchrun's store and sums over gloo: ranks_store.py FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from ranks_common import LIMIT_S, Checks

from knl.comm.bootstrap import StoreBootstrap
from knl.comm.collectives import open_ranks
from knl.errors import FailedError

checks = Checks(Path(sys.argv[1]))
world, bootstrap = checks.world, checks.bootstrap

with checks.check("bootstrap"):
    assert isinstance(bootstrap, StoreBootstrap)
    for turn in range(3):
        assert bootstrap.gather(f"{turn} {world.rank}") == [
            f"{turn} {r}" for r in range(world.size)
        ]
        assert bootstrap.broadcast(b"%d" % world.rank) == b"0"
        assert bootstrap.broadcast(b"\0\xff" * (1 - world.rank)) == b"\0\xff"

with checks.check("oneccl is refused"):
    with pytest.raises(FailedError, match=r"^no provider works; oneccl: needs an Intel") as told:
        open_ranks(world, bootstrap, "oneccl", LIMIT_S)
    assert told.value.shared

with checks.check("gloo"):
    ranks = open_ranks(world, bootstrap, "auto", LIMIT_S)
    assert ranks.provider == "gloo"
    reasons = [reason.split(":")[0] for reason in ranks.passed_over]
    assert reasons == ["oneccl", "torch_ccl", "mpi"]
    tensor = torch.arange(1000.0) * (world.rank + 1)
    ranks.collectives.allreduce(tensor).wait(LIMIT_S)
    assert tensor.equal(torch.arange(1000.0) * sum(range(1, world.size + 1)))
    ranks.collectives.barrier()
ranks.collectives.close()
bootstrap.gather("done")  # a store that rank 0 serves ends with it

"""Ranks that put every provider through its collectives: ranks_collectives.py FOLDER."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks_common import LIMIT_S, Checks

from knl.comm.bootstrap import Bootstrap, together
from knl.comm.collectives import Collectives, open_ranks
from knl.errors import CollectiveTimeoutError, FailedError, InputError

DTYPES = ("float32", "float64", "int64", "int32")
SIZES = (1, 1000, 1_000_003)


def values(size: int, dtype: str, rank: int) -> np.ndarray:
    """Whole numbers whose sums are exact in every type."""
    return np.random.default_rng(rank).integers(-(2**20), 2**20, size).astype(dtype)


def expected(size: int, dtype: str, ranks: int) -> np.ndarray:
    return sum(values(size, dtype, rank) for rank in range(ranks))


def allreduce_sums(c: Collectives, rank: int, ranks: int) -> None:
    for dtype in DTYPES:
        for size in SIZES:
            # A part of a larger tensor: its neighbours must stay as they are.
            whole = torch.full((size + 8,), 7).to(getattr(torch, dtype))
            part = whole[4:-4]
            part.copy_(torch.from_numpy(values(size, dtype, rank)))
            c.allreduce(part).wait(LIMIT_S)
            np.testing.assert_array_equal(part.numpy(), expected(size, dtype, ranks))
            assert whole[:4].eq(7).all() and whole[-4:].eq(7).all()


def allreduce_rounds_like_its_type(c: Collectives, rank: int, ranks: int) -> None:
    for dtype, tolerance in (("float32", 1e-6), ("float64", 1e-15)):
        parts = [np.random.default_rng(r).random(5000).astype(dtype) for r in range(ranks)]
        tensor = torch.from_numpy(parts[rank].copy())
        c.allreduce(tensor).wait(LIMIT_S)
        np.testing.assert_allclose(tensor.numpy(), sum(parts), rtol=tolerance)


def broadcasts(c: Collectives, rank: int, ranks: int) -> None:
    for root in range(ranks):
        for dtype in DTYPES:
            for size in SIZES:
                tensor = torch.from_numpy(values(size, dtype, rank))
                c.broadcast(tensor, root)
                np.testing.assert_array_equal(tensor.numpy(), values(size, dtype, root))


def barrier_waits_for_all(c: Collectives, rank: int, ranks: int, folder: Path) -> None:
    time.sleep(0.3 * rank)
    (folder / f"{c.name}-{rank}").touch()
    c.barrier()
    assert len(list(folder.glob(f"{c.name}-*"))) == ranks


def handle_becomes_done(c: Collectives, rank: int, ranks: int) -> None:
    tensor = torch.from_numpy(values(1000, "float32", rank))
    handle = c.allreduce(tensor)
    deadline = time.monotonic() + LIMIT_S
    while not handle.test():
        assert time.monotonic() < deadline
    assert handle.test()
    handle.wait(0.0)
    np.testing.assert_array_equal(tensor.numpy(), expected(1000, "float32", ranks))


def several_in_flight(c: Collectives, rank: int, ranks: int) -> None:
    sizes = (300_000, 1, 70_000, 5, 500_000)
    tensors = [torch.from_numpy(values(size, "float32", rank)) for size in sizes]
    handles = [c.allreduce(tensor) for tensor in tensors]
    for number in (3, 0, 4, 2, 1) if rank else (2, 4, 1, 0, 3):
        handles[number].wait(LIMIT_S)
        wanted = expected(sizes[number], "float32", ranks)
        np.testing.assert_array_equal(tensors[number].numpy(), wanted)


def late_rank_is_told(c: Collectives, rank: int, ranks: int) -> None:
    """The last rank comes late: the others give up after their limit, and may ask again."""
    c.barrier()
    if rank == ranks - 1:
        time.sleep(1.0)
    tensor = torch.ones(1000)
    handle = c.allreduce(tensor)
    if rank != ranks - 1:
        with pytest.raises(CollectiveTimeoutError, match=r"not done after 0\.2 s"):
            handle.wait(0.2)
    handle.wait(LIMIT_S)
    assert tensor.eq(ranks).all()


def one_rank_fails(bootstrap: Bootstrap, rank: int, ranks: int) -> None:
    def fail_on(*failing: int) -> int:
        if rank in failing:
            raise InputError(f"no file on {rank}")
        return rank

    assert together(bootstrap, fail_on) == rank
    with pytest.raises(InputError, match=f"^rank {ranks - 1}: no file on {ranks - 1}$") as told:
        together(bootstrap, lambda: fail_on(ranks - 1))
    assert told.value.shared
    with pytest.raises(InputError, match=r"^no file on 0$"):  # all alike: rank 0's words will do
        together(bootstrap, lambda: fail_on(*range(ranks)))


def main(folder: Path) -> None:
    checks = Checks(folder)
    world, bootstrap = checks.world, checks.bootstrap
    here = (world.rank, world.size)

    with checks.check("auto takes oneccl"):
        ranks = open_ranks(world, bootstrap, "auto", LIMIT_S)
        ranks.collectives.close()
        assert (ranks.provider, ranks.passed_over) == ("oneccl", ())
        line = f"{world.size} rank(s) over oneccl {ranks.collectives.version}"
        assert ranks.describe() == line and ranks.collectives.version.startswith("2021.")

    with checks.check("torch_ccl is not there"):
        with pytest.raises(FailedError, match="torch_ccl: oneccl-bind-pt is not installed") as told:
            open_ranks(world, bootstrap, "torch_ccl", LIMIT_S)
        assert told.value.shared

    with checks.check("one rank without oneccl"):
        if world.rank == world.size - 1:
            os.environ["CCL_ROOT"] = str(folder / "broken")
        ranks = open_ranks(world, bootstrap, "auto", LIMIT_S)
        ranks.collectives.close()
        os.environ.pop("CCL_ROOT", None)
        assert ranks.provider == "mpi"
        oneccl, torch_ccl = ranks.passed_over
        assert oneccl.startswith(f"oneccl: rank {world.size - 1}: {folder}/broken/lib/libccl.so.1")
        assert torch_ccl.startswith("torch_ccl: oneccl-bind-pt is not installed")
        assert f"not {oneccl}; not {torch_ccl}" in ranks.describe()

    with checks.check("one rank fails before there are collectives"):
        one_rank_fails(bootstrap, *here)

    for provider in ("oneccl", "mpi", "gloo"):
        c = open_ranks(world, bootstrap, provider, LIMIT_S).collectives
        for check in (
            allreduce_sums,
            allreduce_rounds_like_its_type,
            broadcasts,
            handle_becomes_done,
            several_in_flight,
        ):
            with checks.check(f"{provider}: {check.__name__}"):
                check(c, *here)
        with checks.check(f"{provider}: barrier_waits_for_all"):
            barrier_waits_for_all(c, *here, folder)
        with checks.check(f"{provider}: late_rank_is_told"):
            late_rank_is_told(c, *here)
        with checks.check(f"{provider}: close"):
            c.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

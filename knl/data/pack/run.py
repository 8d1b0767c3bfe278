"""`knl data pack`: all shards of a set, or a part of them, by several processes; then the set."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from knl.data.pack.convert import Form
from knl.data.pack.finish import finish
from knl.data.pack.plan import (
    Plan,
    ShardPlan,
    describe,
    items_of,
    make_plan,
    read_plan,
    require_same,
)
from knl.data.pack.progress import PackProgress
from knl.data.pack.shards import PARTS, read_note, write_shard
from knl.data.pack.sources import Reader
from knl.data.packed_set import META, Meta, read_meta
from knl.errors import FailedError, InputError

_PR_SET_PDEATHSIG = 1
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOOK_EVERY_S = 0.2


def pack(
    source: Path, folder: Path, form: Form, part: tuple[int, int], processes: int, max_rejected: int
) -> dict[str, Any]:
    """Write the shards of part (i, n) that are not whole yet. Returns counts of what was done.

    Raises InputError for a source that cannot be packed, FailedError where it cannot be finished;
    whole shards stay, and the same command goes on from there.
    """
    began = time.monotonic()
    refuse_finished(source, folder, form)
    try:
        plan = make_plan(source, folder, form)
    except OSError as error:
        raise InputError(f"{error.filename or folder}: {error.strerror}") from None
    mine = plan.shards[part[0] - 1 :: part[1]]
    left = [shard for shard in mine if read_note(folder, shard.name) is None]
    there = sum(shard.count for shard in mine) - sum(shard.count for shard in left)
    _require_room(folder, plan, left)
    progress = PackProgress(sum(shard.count for shard in mine), there)
    taken = rejected = 0
    try:
        if left:
            taken, rejected = _pack_shards(plan, folder, left, processes, max_rejected, progress)
    finally:
        progress.close()
    return {
        "shards": len(mine),
        "shards_there_before": len(mine) - len(left),
        "packed_now": taken,
        "rejected_now": rejected,
        "wall_s": time.monotonic() - began,
    }


def finish_set(source: Path, folder: Path, form: Form, max_rejected: int) -> Meta:
    """Make the shards of all parts a set, with a contact sheet. Raises FailedError where one is
    missing, InputError where they are of another source or form."""
    refuse_finished(source, folder, form)
    require_same(read_plan(folder), source, folder, form)
    try:
        return finish(folder, max_rejected)
    except OSError as error:
        raise FailedError(
            f"{folder}: {error.strerror}: make room and run knl data pack ... --finish again"
        ) from None


def refuse_finished(source: Path, folder: Path, form: Form) -> None:
    """Raise InputError where the folder is a finished set, or holds something else."""
    if (folder / META).exists():
        meta = read_meta(folder)
        shutil.rmtree(folder / PARTS, ignore_errors=True)  # of one that was killed at its end
        raise InputError(
            f"{folder} is a finished set of {meta.source} already: knl data info shows it; to pack "
            f"{source} as {describe(form)} choose another folder"
        )
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file, must be a folder to pack into")


def _require_room(folder: Path, plan: Plan, left: Sequence[ShardPlan]) -> None:
    needed = sum(shard.count for shard in left) * plan.record_bytes
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FailedError(
            f"{folder}: {free / 1e9:.2f} GB free, about {needed / 1e9:.2f} GB needed for "
            f"{len(left)} shards: free some, choose another folder, or a smaller --short-side"
        )


def _pack_shards(
    plan: Plan,
    folder: Path,
    left: Sequence[ShardPlan],
    processes: int,
    max_rejected: int,
    progress: PackProgress,
) -> tuple[int, int]:
    """How many pictures were taken, and how many not."""
    context = multiprocessing.get_context("spawn")
    counts = context.Array("q", 2)
    pool = ProcessPoolExecutor(min(processes, len(left)), context, _begin, (counts, os.getpid()))
    try:
        waiting = {pool.submit(_pack_shard, plan, folder, shard) for shard in left}
        while waiting:
            done, waiting = wait(waiting, _LOOK_EVERY_S, FIRST_COMPLETED)
            _results(done, folder)
            progress.show(counts[0] + counts[1])
            if counts[1] > max_rejected:
                raise FailedError(
                    f"{counts[1]} pictures cannot be taken, more than --max-rejected "
                    f"{max_rejected}; the first: {_first_rejected(folder, plan)}"
                )
        return counts[0], counts[1]
    finally:
        # Else leaving would wait for shards under way.
        for child in multiprocessing.active_children():
            child.kill()
        pool.shutdown(cancel_futures=True)


def _results(done: set[Future[None]], folder: Path) -> None:
    for future in done:
        try:
            future.result()
        except BrokenProcessPool:
            raise FailedError(
                f"{folder}: a packing process was killed (out of memory?): run the same command "
                "again, it goes on from the whole shards; --processes 1 takes the least memory"
            ) from None
        except OSError as error:
            if error.errno not in _FULL:
                raise FailedError(f"{folder}: {error.strerror}: {error.filename}") from None
            free = shutil.disk_usage(folder).free / 1e9
            raise FailedError(
                f"{folder}: {error.strerror} ({free:.2f} GB free): make room and run the same "
                "command again, it goes on from the whole shards"
            ) from None


def _first_rejected(folder: Path, plan: Plan) -> str:
    for shard in plan.shards:
        note = read_note(folder, shard.name)
        if note and note.rejected:
            return "{key}: {reason}".format(**note.rejected[0])
    return "in a shard under way"


_counts: Any = None


def _begin(counts: Any, parent: int) -> None:
    """In a process of the pool: it ends with the packer, however that ends."""
    global _counts
    _counts = counts
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _pack_shard(plan: Plan, folder: Path, shard: ShardPlan) -> None:
    reader = Reader(Path(plan.source), plan.kind)
    items = items_of(folder, shard)
    write_shard(folder, shard.name, items, reader, plan.form, len(plan.classes), _count)


def _count(taken: bool) -> None:
    with _counts.get_lock():
        _counts[0 if taken else 1] += 1

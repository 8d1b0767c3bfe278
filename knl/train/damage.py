"""Damaged training records, counted over all ranks, so that all of them stop at the same step."""

from __future__ import annotations

from knl.comm.collectives import Ranks, allreduce_numbers
from knl.data.dataset import Dataset


class Damage:
    """Counts what the ranks' datasets had to replace since this start. A record that several ranks
    came across, in different epochs, is one."""

    def __init__(self, dataset: Dataset, ranks: Ranks, limit: int, timeout: float) -> None:
        self._dataset, self._ranks = dataset, ranks
        self._limit, self._timeout = limit, timeout
        self._known: set[int] = set()  # to all ranks

    @property
    def total(self) -> int:
        return len(self._known)

    def here(self) -> int:
        """How many this rank has found beside those that all know; to be summed over ranks."""
        return len(set(self._dataset.damaged) - self._known)

    def learn(self, sum_here: int) -> None:
        """Let all ranks know what any has found. `sum_here`: the sum of `here`, the same on all
        ranks."""
        if not sum_here:
            return
        self._known |= self._exchange(min(self._limit + 1, sum_here))

    @property
    def problem(self) -> str:
        """Why the run cannot go on, the same on every rank; "" while it can."""
        if self.total <= self._limit:
            return ""
        return (
            f"{self.total} records are damaged, more than data.max_damaged = {self._limit}, the "
            f"first of them {self._dataset.place_of(min(self._known))}: knl data verify names them "
            "all; pack or copy the shard again, or raise data.max_damaged"
        )

    def _exchange(self, room: int) -> set[int]:
        """The records that any rank has found; of each rank up to `room`."""
        slots = [0.0] * (room * self._ranks.world.size)
        for place, record in enumerate(sorted(set(self._dataset.damaged) - self._known)[:room]):
            slots[self._ranks.world.rank * room + place] = record + 1.0
        sums = allreduce_numbers(self._ranks.collectives, slots, self._timeout, "damaged records")
        return {int(number) - 1 for number in sums if number}

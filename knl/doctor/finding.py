"""What doctor has to say about one cause."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One cause. `severity`: broken (training fails), slow (it works, but loses much), note (worth
    knowing: knl sets it itself, or it may be meant so)."""

    name: str
    severity: Literal["broken", "slow", "note"]
    message: str
    cure: str

"""knl: trains ImageNet-class networks with LARS on CPU clusters."""

from __future__ import annotations

__version__ = "0.1.0"

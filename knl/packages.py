"""Versions of installed packages, without importing them."""

from __future__ import annotations

from importlib import metadata

IPEX = "intel-extension-for-pytorch"
ONEDNN = "onednn-cpu-gomp"


def version_of(package: str) -> str:
    """The installed version; "" where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""

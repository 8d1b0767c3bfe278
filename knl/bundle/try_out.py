"""Proves a bundle: unpacks it elsewhere, trains with it, looks at what that loaded."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from knl.bundle.contents import FOLDER
from knl.bundle.environment import SYSTEM, Environment
from knl.children import child
from knl.errors import FailedError

_TIMEOUT_S = 300.0
# What would lead back to the environment that was packed.
_DROPPED = ("PYTHON", "VIRTUAL_ENV", "CONDA", "KNL_", "I_MPI_ROOT", "MPI4PY_", "FI_PROVIDER_PATH")


@dataclass(frozen=True)
class Proof:
    """`ranks` trained over `provider`; `outside`: libraries that came from folders which are
    neither the system's nor the bundle's."""

    ranks: int
    provider: str
    outside: list[str]


def try_out(
    archive: Path, folder: Path, environment: Environment, variables: Mapping[str, str]
) -> Proof:
    """Unpack as a node would, train a step, look at the libraries and modules that were loaded.

    Raises FailedError when it does not run or still needs the environment that was packed.
    """
    unpacking = subprocess.run(
        ["tar", "-xzf", str(archive), "-C", str(folder)], capture_output=True, text=True
    )
    if unpacking.returncode != 0:
        raise FailedError(f"{folder}: tar -xzf failed: {_last(unpacking.stderr)}")
    root = folder.resolve() / FOLDER
    command = [str(root / "bin" / "python"), "-m", "knl.bundle.proof"]
    kept = _elsewhere(variables, environment, folder)
    with tempfile.TemporaryFile() as errors, child(command, kept, folder, errors) as process:
        try:
            told, _ = process.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise FailedError(f"the bundle does not train a step in {_TIMEOUT_S:.0f} s") from None
        errors.seek(0)
        last = _last(errors.read().decode(errors="replace"))
    if process.returncode != 0:
        raise FailedError(f"the bundle does not run, so it was not written: {last}")
    report = json.loads(told)
    return Proof(report["ranks"], report["provider"], _outside(report["files"], root, environment))


def _elsewhere(
    variables: Mapping[str, str], environment: Environment, folder: Path
) -> dict[str, str]:
    """The user's variables without what leads to the environment; libraries of the site's modules
    stay within reach, as they are in a job."""
    kept = {name: value for name, value in variables.items() if not name.startswith(_DROPPED)}
    for name in ("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD"):
        if name in kept:
            parts = [p for p in kept[name].split(":") if p and not _original(Path(p), environment)]
            kept[name] = ":".join(parts)
    return {**kept, "HOME": str(folder)}


def _original(path: Path, environment: Environment) -> bool:
    """Whether a path lies in what was packed, as far as that is no folder of every system."""
    tops = [environment.prefix]
    tops += [environment.base] if environment.base not in (Path("/usr"), Path("/usr/local")) else []
    return any(top in (path, *path.parents) for top in tops)


def _outside(files: list[str], root: Path, environment: Environment) -> list[str]:
    outside = []
    for file in files:
        path = Path(file)
        if root in path.parents or (".so" in path.name and file.startswith(SYSTEM)):
            continue
        if _original(path, environment) or ".so" not in path.name:
            raise FailedError(f"the bundle was not written, as it still loads {file}: report it")
        outside.append(file)
    return outside


def _last(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "without a word"

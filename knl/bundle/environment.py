"""The environment to pack: where its packages, its interpreter and the standard library are."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from knl.errors import InputError

# Folders that every node of a cluster has on a disk of its own.
SYSTEM = ("/lib/", "/lib64/", "/usr/lib/", "/usr/lib64/")

# Loads all extension modules of the standard library and says which libraries came with them, and
# in which folders of its own an interpreter looks for packages.
_ASK_BASE = """
import importlib, pathlib, site, sysconfig
folder = pathlib.Path(sysconfig.get_path("platstdlib"), "lib-dynload")
for path in sorted(folder.glob("*.so")):
    try:
        importlib.import_module(path.name.split(".")[0])
    except Exception:
        pass
found = {line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if ".so" in line}
print("\\n".join(sorted(found)))
print("\\n".join("packages " + folder for folder in site.getsitepackages()))
"""
# What a job loads, whichever of it links the libraries.
_ASK_LOADED = """
import torch, knl.native, numpy, sklearn, pyarrow
try:
    import intel_extension_for_pytorch
except ImportError:
    pass
print("\\n".join(knl.native.loaded_libraries()))
"""


@dataclass(frozen=True)
class Environment:
    """`prefix`: the environment's folder; `base`: its interpreter's; `executable`: the interpreter
    itself; `stdlib`: the standard library, `headers`: of Python, both relative to `base`;
    `libraries`: below `base`, which the interpreter needs; `packages_to`: where an unpacked
    interpreter looks for packages; `loaded`: libraries that a job loads."""

    prefix: Path
    base: Path
    executable: Path
    stdlib: Path
    headers: Path
    libraries: frozenset[Path]
    packages: Path
    packages_to: Path
    loaded: frozenset[Path]

    @property
    def version(self) -> str:
        """Such as python3.9."""
        return f"python{sys.version_info[0]}.{sys.version_info[1]}"


def environment_here() -> Environment:
    """The one of this process. Raises InputError for one that cannot be packed."""
    prefix, base = Path(sys.prefix), Path(sys.base_prefix)
    cure = "install knl into a virtual environment (make demo does) and call that one's knl"
    try:
        home = Path(str(metadata.distribution("knl").locate_file(""))).resolve()
    except metadata.PackageNotFoundError:
        raise InputError(f"knl is not installed, it runs from its source: {cure}") from None
    if prefix in (Path("/usr"), Path("/usr/local")):
        raise InputError(f"{prefix} is the whole system, not an environment: {cure}")
    if prefix.resolve() not in home.parents:
        raise InputError(f"knl is in {home}, outside the environment {prefix}: {cure}")
    if "true" in _setting(prefix / "pyvenv.cfg", "include-system-site-packages"):
        raise InputError(
            f"{prefix}/pyvenv.cfg: include-system-site-packages = true: what comes from the system "
            f"would be missing; {cure}"
        )
    executable = Path("/proc/self/exe").resolve()
    lines = _ask([str(executable), "-I", "-c", _ASK_BASE]).splitlines()
    searched = [Path(line.split(" ", 1)[1]) for line in lines if line.startswith("packages ")]
    libraries = [Path(line) for line in lines if line.startswith(f"{base}/")]
    packages = prefix / home.relative_to(prefix.resolve())
    stdlib = Path(sysconfig.get_path("stdlib"))
    return Environment(
        prefix=prefix,
        base=base,
        executable=executable,
        stdlib=stdlib.relative_to(base),
        headers=Path(sysconfig.get_path("include")).relative_to(base),
        libraries=frozenset(
            path
            for path in libraries
            if stdlib not in path.parents and not str(path).startswith(SYSTEM)
        ),
        packages=packages,
        packages_to=_packages_to(searched, base, packages.relative_to(prefix)),
        loaded=frozenset(map(Path, _ask([sys.executable, "-c", _ASK_LOADED]).splitlines())),
    )


def _packages_to(searched: list[Path], base: Path, usual: Path) -> Path:
    """Debian's interpreter looks for packages in folders named dist-packages."""
    inside = [path.relative_to(base) for path in searched if base in path.parents]
    if usual in inside or not inside:
        return usual
    same_depth = [path for path in inside if len(path.parts) == len(usual.parts)]
    return (same_depth or inside)[-1]


def _setting(path: Path, name: str) -> str:
    """A value of pyvenv.cfg in small letters; "" where there is none."""
    if not path.exists():
        return ""
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition("=")
        if key.strip().lower() == name:
            return value.strip().lower()
    return ""


def _ask(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise InputError(f"{command[0]} cannot load what a job loads: {last[0]}; reinstall it")
    return done.stdout

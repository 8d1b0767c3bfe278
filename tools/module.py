"""Installs knl as a module that `module load knl` finds, for a user or a site. See Makefile.

PREFIX/knl/VERSION           the environment: a copy, which needs this folder no more
PREFIX/modulefiles           for Lmod (Lua)
PREFIX/modulefiles-tcl       for Tcl Environment Modules, which Lmod reads as well

Runs on the Python that is to be the environment's own, so it imports the standard library alone.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from install import ROOT, check_python, install

# Lmod and Tcl split paths at colons and blanks; the others mean something to one of the languages.
UNFIT = re.compile(r"[\s:;\"'`\\$\[\]{}]")
MODULE_NAME = re.compile(r"[A-Za-z0-9_.+-]+(/[A-Za-z0-9_.+-]+)*")


@dataclass(frozen=True)
class Module:
    """What the files say. `mpi`: a module to load before, "" for none; `hidden`: from module avail,
    yet what `module load knl` takes."""

    version: str
    stack: str
    home: Path
    mpi: str = ""
    hidden: bool = False


def main() -> None:
    """Install the environment and the two module files; print how to use them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefix", required=True, help="folder for knl and its module files")
    parser.add_argument("--stack", default="", help="knl, modern; from Python's version if empty")
    parser.add_argument("--mpi", default="", help="the site's MPI module, such as impi/19.0.9")
    parser.add_argument("--hidden", action="store_true", help="not shown by module avail")
    arguments = parser.parse_args()
    stack = arguments.stack or ("knl" if sys.version_info < (3, 10) else "modern")
    check_python(stack)
    prefix = checked_prefix(arguments.prefix)
    if arguments.mpi and not MODULE_NAME.fullmatch(arguments.mpi):
        sys.exit(f"MPI={arguments.mpi}: must be the name of one module, such as impi/19.0.9")
    version = own_version()
    home = prefix / "knl" / version
    refuse_another_stack(home, stack)
    install(home, stack, [stack], editable=False)
    write_modules(prefix, Module(version, stack, home, arguments.mpi, arguments.hidden))
    print(f"module use {prefix}/modulefiles      # Tcl modules: {prefix}/modulefiles-tcl")
    print("module load knl")


def checked_prefix(text: str) -> Path:
    """The folder, absolute. Exits with one line where modules could not live there."""
    if not text:
        sys.exit(
            "PREFIX is empty: say where to install, such as PREFIX=$HOME/knl or PREFIX=/opt/apps"
        )
    prefix = Path(os.path.normpath(Path.cwd() / Path(text).expanduser()))
    if found := UNFIT.search(str(prefix)):
        sys.exit(
            f"PREFIX={text}: {found.group()!r} in a path cannot be written into every module file; "
            "choose a folder without blanks, colons, quotes, brackets, backslashes and $"
        )
    return prefix


def refuse_another_stack(home: Path, stack: str) -> None:
    """A module is one stack: the other one would be mixed into its environment."""
    stamp = home / "stack"
    if home.exists() and (not stamp.exists() or stamp.read_text().strip() != stack):
        what = f"the {stamp.read_text().strip()} stack" if stamp.exists() else "something else"
        sys.exit(f"{home}: holds {what} already; remove it or choose another PREFIX")
    try:
        home.mkdir(parents=True, exist_ok=True)
        stamp.write_text(f"{stack}\n")
    except OSError as error:
        sys.exit(f"{home}: {error.strerror}; choose a PREFIX that you may write to")


def own_version() -> str:
    """The version of knl in this folder."""
    text = (ROOT / "knl" / "__init__.py").read_text()
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    assert found, "knl/__init__.py names no version"
    return found.group(1)


def write_modules(prefix: Path, module: Module) -> None:
    """Write the module files, each by rename: others may load it meanwhile."""
    for tree, name, template in (
        ("modulefiles", f"{module.version}.lua", "knl.lua.in"),
        ("modulefiles-tcl", module.version, "knl.tcl.in"),
    ):
        folder = prefix / tree / "knl"
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / name, render(template, module))
        hide(folder / ".modulerc", module.version, module.hidden)


def render(template: str, module: Module) -> str:
    """The text of a module file."""
    lua = template.endswith(".lua.in")
    depends = f'depends_on("{module.mpi}")' if lua else TCL_DEPENDS.replace("@MPI@", module.mpi)
    values = {
        "VERSION": module.version,
        "STACK": module.stack,
        "HOME": str(module.home),
        "DEPENDS": depends if module.mpi else "",
    }
    text = (ROOT / "modules" / template).read_text()
    return re.sub("@([A-Z]+)@", lambda found: values[found.group(1)], text)


# depends-on leaves an MPI alone that you had loaded yourself; Modules before 5.1 do not have it.
TCL_DEPENDS = """\
if { [llength [info commands depends-on]] } {
    depends-on @MPI@
} else {
    prereq @MPI@
}"""


def hide(rc: Path, version: str, hidden: bool) -> None:
    """Note in a .modulerc whether a version is hidden; the newest hidden one is the default."""
    old = rc.read_text() if rc.exists() else ""
    versions = [found for found in re.findall(r"^ *hide knl/(\S+)$", old, re.M) if found != version]
    versions += [version] if hidden else []
    if versions:
        lines = [f"hide knl/{each}" for each in versions]
        write(rc, "\n".join([RC, f"module-version knl/{versions[-1]} default", *lines, ""]))
    else:
        rc.unlink(missing_ok=True)


# A marked default is taken though it is hidden. Lmod has hide-version, Modules from 4.6 on
# module-hide; older ones show the module.
RC = """\
#%Module1.0
proc hide { name } {
    if { [llength [info commands hide-version]] } {
        hide-version $name
    } elseif { [llength [info commands module-hide]] } {
        module-hide --soft $name
    }
}"""


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    main()

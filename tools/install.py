"""Makes the virtual environment of one stack: checks the machine, installs, builds. See Makefile.

Runs on the Python that is to be the environment's own, with nothing installed, so it imports the
standard library alone. Says nothing and does nothing when the environment is up to date.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What the installed environment depends on; Python files are used from where they are.
SOURCES = ["pyproject.toml", "CMakeLists.txt", "knl/native/*.cpp", "knl/native/*.h"]
# The versions of Python that the stack's torch has wheels for.
PYTHONS = {"knl": ((3, 9), (3, 9)), "modern": ((3, 10), (3, 14))}
# Free space that an install needs, in GB: the environment and pip's temporary files.
ROOM_GB = {"knl": 4.5, "modern": 3.0}
DEBIAN = [
    "dataset-fashion-mnist", "slurm-wlm", "munge", "libpmi2-0", "openmpi-bin", "mpich", "hwloc",
    "numactl", "libtcmalloc-minimal4", "libjemalloc2", "lmod", "shellcheck", "libsimgrid-dev",
    "chromium",
]  # fmt: skip


def main() -> None:
    """Print the folder of the environment, made ready."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", required=True, type=Path)
    parser.add_argument("--stack", default="", help="knl, modern; from Python's version if empty")
    parser.add_argument("--test", action="store_true", help="what the tests need, too")
    arguments = parser.parse_args()
    stack = arguments.stack or ("knl" if sys.version_info < (3, 10) else "modern")
    check_python(stack)
    venv = arguments.venv / stack
    extras = [stack, "test"] if arguments.test else [stack]
    stamp = venv / f"installed-{'-'.join(extras)}"
    if not stamp.exists() or stamp.read_text() != fingerprint():
        install(venv, stack, extras)
        # Tests bring all of the stack, so a demo after them has nothing to do.
        for name in {stamp, venv / f"installed-{stack}"}:
            name.write_text(fingerprint())
    if arguments.test:
        install_debian()
    print(venv)


def check_python(stack: str) -> None:
    """Before anything is written: pip's own message for a wrong Python does not say the cure."""
    if stack not in PYTHONS:
        sys.exit(f"STACK={stack}: must be knl or modern")
    low, high = PYTHONS[stack]
    if not low <= sys.version_info[:2] <= high:
        span = " to ".join(".".join(map(str, version)) for version in sorted({low, high}))
        sys.exit(
            f"Python {sys.version_info[0]}.{sys.version_info[1]}: the {stack} stack needs Python "
            f"{span}; choose one with make PYTHON=python{low[0]}.{low[1]} STACK={stack}"
        )


def install(venv: Path, stack: str, extras: list[str], *, editable: bool = True) -> None:
    """Create the environment and install the package, its stack and its compiled part into it.
    `editable`: Python files are used from where they are, else copied."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        sys.exit(f"no C++ compiler ({compiler}): install g++ (apt install g++), or module load gcc")
    venv.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(venv.parent).free / 1e9
    if free < ROOM_GB[stack]:
        sys.exit(
            f"{venv.parent}: {free:.1f} GB free, the {stack} stack needs {ROOM_GB[stack]} GB; "
            "free some, or choose another place with make VENV=/path (PREFIX=/path of a module)"
        )
    print(f"installing the {stack} stack into {venv} (a minute or two)", file=sys.stderr)
    if not (venv / "bin" / "python").exists():
        run([sys.executable, "-m", "venv", str(venv)], "python -m venv (Debian: python3-venv)")
    requirement = f"{ROOT}[{','.join(extras)}]"
    how = ["-e"] if editable else []
    run([str(venv / "bin" / "pip"), "install", "-q", *how, requirement], "pip install")


def run(command: list[str], what: str) -> None:
    """Run a step of the installation; its messages are shown only when it fails."""
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.stderr.write(done.stderr)
        sys.exit(f"{what} failed with status {done.returncode}; its own words are above")


def install_debian() -> None:
    """Packages that tests use: by apt where that can be done, else the tests say what they miss."""
    missing = [name for name in DEBIAN if not debian_has(name)]
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        print(
            f"tests that need {', '.join(missing)} will be skipped: not root on Debian, so install "
            f"them yourself (apt install {' '.join(missing)})",
            file=sys.stderr,
        )
        return
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["update", "-qq"],
        ["install", "-y", "-qq", "--no-install-recommends", *missing],
    ):
        done = subprocess.run(["apt-get", *command], env=quiet, stdout=subprocess.DEVNULL)
        if done.returncode != 0:
            print(
                f"apt-get {command[0]} failed; skipped will be what needs {', '.join(missing)}",
                file=sys.stderr,
            )
            return


def debian_has(package: str) -> bool:
    """Whether a Debian package is installed."""
    if shutil.which("dpkg-query") is None:
        return False
    query = ["dpkg-query", "-W", "-f", "${Status}", package]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.returncode == 0 and "ok installed" in done.stdout


def fingerprint() -> str:
    """Changes when the environment has to be installed again."""
    digest = hashlib.sha256(sys.version.encode() + str(ROOT).encode())
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()

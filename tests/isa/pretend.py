"""oneDNN with the CPUID of a Xeon Phi 7250, on any x86 host.

A copy of the environment's oneDNN has ud2 wherever it asks for CPUID, and pretend.c answers for the
processor. oneDNN then chooses and generates the kernels of a KNL. Its choice runs everywhere; its
kernels run where the host has AVX-512F.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from knl.models import onednn

HERE = Path(__file__).parent
THREADS = "2"  # of a child; the order of sums, and so every bit, depends on it

Done = subprocess.CompletedProcess[str]

# What takes the place of an instruction of the same length: ud2, which raises SIGILL, and nop.
_INSTEAD = {"cpuid": b"\x0f\x0b", "xgetbv": b"\x0f\x0b\x90"}

# knl.models.onednn asks this one function where the library is; all else is as in a run. The
# handler is there first: constructors of the library ask for CPUID.
_AS_KNL = """
import ctypes
from pathlib import Path
pretend = ctypes.CDLL({handler!r})
from knl.models import onednn
onednn.library_path = lambda: Path({library!r})
assert onednn.isa() == "avx512_mic", onednn.isa()
assert onednn.block() == 16 and pretend.pretend_answers() > 0
"""


class Knl(NamedTuple):
    """The parts of a pretended KNL: a copy of oneDNN, and the library that answers for it."""

    library: Path
    handler: Path

    def run(self, code: str, folder: Path | None = None, **environment: str) -> Any:
        """What `code` passes to `answer`, run in a folder where oneDNN sees a KNL. Fails with the
        child's words."""
        return _answer(self.child(code, folder, **environment))

    def child(self, code: str, folder: Path | None = None, **environment: str) -> Done:
        """The same, with the status and all that it wrote."""
        start = _AS_KNL.format(handler=str(self.handler), library=str(self.library))
        return _child(start + code, folder, environment)


def build(folder: Path) -> Knl:
    """Patch the library and compile the handler."""
    library, handler = folder / "libdnnl.so.2", folder / "libpretend.so"
    places = _patch(onednn.library_path(), library)
    subprocess.run(
        ["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", handler,
         f"-DSITES={','.join(map(str, places))}", HERE / "pretend.c", "-ldl"],
        check=True,
    )  # fmt: skip
    return Knl(library, handler)


def run_python(code: str, folder: Path | None = None, **environment: str) -> Any:
    """What `code` passes to `answer`, run where oneDNN sees this host."""
    return _answer(_child(code, folder, environment))


def _answer(done: Done) -> Any:
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


def _child(code: str, folder: Path | None, environment: dict[str, str]) -> Done:
    code = "import json\n\ndef answer(found):\n    print(json.dumps(found))\n\n" + code
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    own = {"OMP_NUM_THREADS": THREADS, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **own, **environment}, cwd=folder,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def _patch(source: Path, target: Path) -> list[int]:
    """Copy a library without CPUID and XGETBV; returns where they were, from its start."""
    headers = subprocess.run(
        ["objdump", "-h", "-j", ".text", source], capture_output=True, text=True, check=True
    ).stdout
    section = re.search(r"\.text\s+\S+\s+(\S+)\s+\S+\s+(\S+)", headers)
    assert section, headers
    into_file = int(section[2], 16) - int(section[1], 16)
    content, places = bytearray(source.read_bytes()), []
    for address, name in _found(source):
        place, instead = int(address, 16), _INSTEAD[name]
        content[place + into_file : place + into_file + len(instead)] = instead
        places.append(place)
    assert places, f"{source} does not ask for CPUID"
    target.write_bytes(content)
    return places


def _found(library: Path) -> Iterator[tuple[str, str]]:
    """Addresses and names of the instructions to replace. The listing of oneDNN is a quarter of a
    gigabyte, so no more of it is kept than a line."""
    command = ["objdump", "-d", "-j", ".text", "--no-show-raw-insn", library]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as objdump:
        assert objdump.stdout is not None
        for line in objdump.stdout:
            address, _, text = line.partition(":\t")
            if (name := text.strip()) in _INSTEAD:
                yield address.strip(), name
    assert objdump.returncode == 0, f"objdump -d {library}: status {objdump.returncode}"

"""Which instructions of machine code a processor does not have.

The assembler is the judge: what objdump finds is handed back to it with the processor's extensions
alone, and it refuses all else. So no list of mnemonics here has to be kept whole.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

# A Xeon Phi 7250 without its ER and PF: a kernel with those would run on a Xeon Phi alone. ibt is
# ENDBR64, a NOP where it is not known.
KNL = (
    "generic64", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "popcnt", "movbe", "aes", "pclmul",
    "rdrnd", "rdseed", "adx", "prfchw", "xsaveopt", "fsgsbase", "cx16", "ibt", "avx512f",
    "avx512cd",
)  # fmt: skip

# An address and a text, behind the bytes; what follows a name of a function is its code. objdump
# writes {evex} where VEX has the instruction as well: the assembler takes it as it was.
_LINE = re.compile(r"^\s*([0-9a-f]+):\t(?:[0-9a-f]{2} )+\s*\t(.*)$")
_FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
# What every processor has, and the assembler does not take back as it is printed: branches to an
# address in this code, and what fills the gaps between functions.
_PLAIN = re.compile(r"\b(j\w+|call|loop\w*)\s+(0x)?[0-9a-f]+\b|\bnop[wl]?\b")
_REFUSED = re.compile(r":(\d+): Error: (.*)")

Listing = list[tuple[str, str]]  # the place and the text of each


def disassembled(library: Path, functions: str = "") -> Listing:
    """The distinct instructions of a library, each with the place of its first; of the functions
    whose name has a match of a pattern, where one is given."""
    return _read(["-d", library], functions)


def generated(*files: Path) -> Listing:
    """The same of kernels that oneDNN left in files: code up to its return, then constants."""
    raw = ["-D", "-b", "binary", "-m", "i386:x86-64"]
    distinct = {file.read_bytes(): file for file in files}.values()
    return [one for file in distinct for one in _read([*raw, file], "", ends_at_return=True)]


def foreign(instructions: Listing, extensions: tuple[str, ...] = KNL) -> list[str]:
    """Those that a processor with these extensions does not have."""
    done = subprocess.run(
        ["as", f"-march={'+'.join(extensions)}", "-o", "/dev/null", "-"],
        input="".join(f"{text}\n" for _, text in instructions),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    refused = {int(line): reason for line, reason in _REFUSED.findall(done.stderr)}
    assert refused or done.returncode == 0, done.stderr
    return [
        f"{place}: {text} ({refused[line]})"
        for line, (place, text) in enumerate(instructions, 1)
        if line in refused
    ]


def _read(arguments: list[str | Path], functions: str, ends_at_return: bool = False) -> Listing:
    done = subprocess.run(["objdump", *arguments], capture_output=True, text=True, check=True)
    found: dict[str, str] = {}
    name = ""
    for line in done.stdout.splitlines():
        if (heading := _FUNCTION.match(line)) is not None:
            name = heading[1]
        parts = _LINE.match(line)
        if parts is None or not re.search(functions, name):
            continue
        text = re.sub(r"\s*(#|<).*", "", parts[2])
        if _PLAIN.search(text):
            continue
        found.setdefault(text, f"{Path(arguments[-1]).name} {name} {parts[1]}")
        if ends_at_return and text == "ret":
            break
    return [(place, text) for text, place in found.items()]

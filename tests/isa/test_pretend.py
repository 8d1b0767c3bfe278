"""The pretended KNL itself: what it says of the processor, and what it does not hide."""

from __future__ import annotations

import pytest

from . import pretend

# Code that a process writes into its own memory and runs.
WRITTEN = """
import ctypes, mmap
memory = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
memory.write(bytes.fromhex({code!r}))
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
answer([start, ctypes.CFUNCTYPE(ctypes.c_int)(start)()])
"""


def test_onednn_sees_a_processor_with_f_cd_er_and_pf_alone(as_knl):
    # avx512_mic is F, CD, ER and PF; with BW, DQ and VL it would be avx512_core.
    code = "answer([onednn.isa(), onednn.block(), onednn.version()])"
    isa, block, version = as_knl.run(code)
    assert (isa, block) == ("avx512_mic", 16)
    assert version == pretend.run_python("from knl.models import onednn; answer(onednn.version())")


def test_code_that_the_host_can_run_runs(as_knl):
    _, found = as_knl.run(WRITTEN.format(code="b8 2a 00 00 00 c3"))  # mov $42, %eax; ret
    assert found == 42


@pytest.mark.parametrize("code", ["06 c3", "0f 0b 90 c3"])
def test_an_instruction_that_the_host_lacks_ends_the_process_with_its_bytes(as_knl, code):
    """The second is ud2, which answers for CPUID, but only where CPUID was."""
    done = as_knl.child(WRITTEN.format(code=code))
    assert done.returncode == 99
    assert "SIGILL of a real instruction at 0x" in done.stderr
    assert f": {code} " in done.stderr
    with pytest.raises(AssertionError, match=f"status 99.*{code}"):
        as_knl.run(WRITTEN.format(code=code))

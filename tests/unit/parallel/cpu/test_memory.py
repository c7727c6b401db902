"""By the faults that the kernel counts while large arrays come and go, in processes of their own: what is set there stays."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

COUNT = """
import resource
import numpy
from dist_trainer.parallel.cpu.memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if {keeping}:
    print(keep_freed_memory())
numpy.ones(2**23)
before = faults()
for _ in range(5):
    numpy.ones(2**23)
print(faults() - before)
"""
PAGES = 5 * 2**23 * 8 // os.sysconf("SC_PAGE_SIZE")


def said(*, keeping: bool, **environment: str) -> list[str]:
    return output_of(COUNT.format(keeping=keeping), **environment)


def output_of(code: str, **environment: str) -> list[str]:
    command = [sys.executable, "-c", code]
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env={**own, **environment}).stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc alone")
def test_memory_that_was_freed_is_had_again_without_a_fault():
    # Huge pages, where the kernel gives them unasked, count as one fault of 512 pages.
    kept, faults = said(keeping=True)
    assert kept == "True"
    assert int(faults) < PAGES / 1000
    assert int(faults) < int(said(keeping=False)[0]) / 10


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc alone")
def test_large_blocks_apart_go_back_to_the_kernel_and_later_ones_are_kept_again():
    code = COUNT.replace("numpy.ones(2**23)\nbefore", "{block}\nnumpy.ones(2**23)\nbefore")
    block = """
from dist_trainer.parallel.cpu.memory import large_blocks_apart

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

with large_blocks_apart():
    held = resident()
    numpy.ones(2**23)
    print(resident() - held)
"""
    _, left, faults = output_of(code.format(keeping=True, block=block))
    assert int(left) < 2**23
    assert int(faults) < PAGES / 1000


def test_a_user_s_malloc_settings_are_kept():
    assert said(keeping=True, MALLOC_TRIM_THRESHOLD_="0")[0] == "False"
    assert said(keeping=True, GLIBC_TUNABLES="glibc.malloc.mmap_max=7")[0] == "False"

"""A rank on the CPU keeps the memory that a step frees."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from megatron_mer.engine.host_memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    raise SystemExit(3)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    held = [torch.ones(12_000_000) for _ in range(3)]
for _ in range(10):  # the heap finds its size
    step()
before = faults()
for _ in range(3):
    step()
print(faults() - before)
"""


def page_faults(what):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, what], capture_output=True, text=True, timeout=120
    )
    if done.returncode == 3:
        return None
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_what_a_step_frees_is_not_cleared_again():
    kept = page_faults("keep")
    if kept is None:
        pytest.skip("this C library is not glibc")
    # 48 MB a tensor are 11,700 pages.
    assert kept < 5000
    assert page_faults("default") > 50_000

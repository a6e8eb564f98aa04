"""On a CPU, freed memory stays with the process: counted in page faults, which no other load on the machine changes."""

import os
import platform
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or torch.cuda.is_available(), reason="of glibc's malloc, where there is no GPU"
)
TENSORS_OF_64_MIB = """
from resource import RUSAGE_SELF, getrusage
import torch
from malpyeong.models.load import load_for_prediction
from malpyeong.samples import TINY_BASE
load_for_prediction(str(TINY_BASE))
torch.zeros(1 << 24)
before = getrusage(RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.zeros(1 << 24).add_(1)
print((getrusage(RUSAGE_SELF).ru_minflt - before) / 8)
"""


def faults_of_a_tensor(**environment):
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", TENSORS_OF_64_MIB]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=own | environment).stdout)


def test_memory_that_a_tensor_had_is_the_next_ones_but_for_an_allocator_of_the_users():
    """Of eight tensors one may still find the place of the last too small by its alignment."""
    assert faults_of_a_tensor() < faults_of_a_tensor(GLIBC_TUNABLES="glibc.malloc.check=0") / 4

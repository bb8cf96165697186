"""Settings of a process: memory is kept, and what the user has set wins."""

import ctypes
import json
import os
import platform
import subprocess
import sys

import pytest
from conftest import ROOT

from cappa_tf.utils import cpu

# Takes, fills and frees the memory of 500 records as TensorFlow does, by the
# C library's malloc, and prints the page faults of the second and fourth time.
_TAKE_AND_FREE = f"""
import ctypes, json, resource
import {cpu.__name__} as memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(100_000) for _ in range(500)]
    for block in blocks:
        ctypes.memset(block, 1, 100_000)
    for block in blocks:
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = [faults(), faults()]
memory.keep_freed_memory()
found += [faults(), faults()]
print(json.dumps(found))
"""


def test_freed_memory_is_kept():
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("the C library has no mallopt")
    output = subprocess.run(
        [sys.executable, "-c", _TAKE_AND_FREE],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    _, given_back, _, kept = json.loads(output)
    # 50 MB are 12,000 pages; how many of them are given back is up to what the
    # interpreter has taken before.
    assert given_back > 5_000
    assert kept < 1_000


def settings(**environment):
    """The variables of a process after `cpu.prepare`."""
    code = (
        "import json, os; from cappa_tf.utils import cpu; cpu.prepare(); "
        "print(json.dumps(dict(os.environ)))"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TF_")}
    return json.loads(
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**clean, **environment},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
    )


def test_variables_that_are_set_win():
    default = settings()
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    assert default.get("TF_ENABLE_ONEDNN_OPTS") == ("1" if is_x86 else None)
    assert default["TF_CPU_ALLOCATOR_USE_BFC"] == "true"
    limit = int(default["TF_CPU_BFC_MEM_LIMIT_IN_MB"])
    assert limit == cpu.memory_bytes() // 2**20
    given = settings(TF_ENABLE_ONEDNN_OPTS="0")
    assert given["TF_ENABLE_ONEDNN_OPTS"] == "0"
    assert given["TF_CPU_ALLOCATOR_USE_BFC"] == "true"

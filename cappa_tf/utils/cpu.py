"""The CPU and the memory of this machine, and how TensorFlow uses them.

TensorFlow reads such settings once, when it is loaded. The tools make them
before that; a program that imports this package may call `prepare`, too.
"""

import ctypes
import os
import platform

# Variables of the environment; those that are set already win.
_VARIABLES = {
    # Keeps the memory of a step for the next one. By default large blocks are
    # returned to the system after every use, and page faults took a seventh of
    # the CPU time of a training step.
    "TF_CPU_ALLOCATOR_USE_BFC": "true",
}
# The same of x86. By default oneDNN is on only for processors with instructions
# for bfloat16 or int8. One without encoded images in 0.85 of the CPU time, as
# attention's products take a quarter to a half of theirs.
_X86_VARIABLES = {"TF_ENABLE_ONEDNN_OPTS": "1"}
# From glibc's malloc.h, which refuses a threshold above 32 MB.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_TRIM_BYTES, _MMAP_BYTES = (1 << 31) - 1, 32 << 20


def memory_bytes():
    """Bytes of physical memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def prepare():
    """Sets what makes TensorFlow fast on a CPU; call it before importing it.

    Environment variables that are set already stay as they are.
    """
    variables = dict(_VARIABLES)
    # 64 GiB by default, however much there is.
    variables["TF_CPU_BFC_MEM_LIMIT_IN_MB"] = str(memory_bytes() >> 20)
    if platform.machine() in ("x86_64", "AMD64"):
        variables |= _X86_VARIABLES
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    keep_freed_memory()


def keep_freed_memory():
    """Makes this process reuse the memory of records it has read.

    A record is a string of some 100 KB, which TensorFlow allocates with the C
    library's `malloc`. By default that returns much of it to the system as soon
    as it is free, and the next record causes page faults, which took a fifth of
    the CPU time of the shuffled stream. Only glibc has these settings; other C
    libraries are left unchanged.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)

# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Memory that large tensors leave is used again.

glibc gives every block above 32 MB fresh pages from the system, and the pages back when it is freed. A program that
makes and frees such tensors then waits for the system to find and clear pages. So programs, and no library behind its
user's back, ask glibc to keep what is freed.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform


# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """To be called when a program starts; does nothing where the C library is not glibc."""
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return
    # A program whose memory is somebody else's, as jemalloc's, works as well.
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # Never.
